"""Chooses weight and KV formats within what the user allowed, by running the pipeline with each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hetcomp.errors import DoesNotFit, HetcompError
from hetcomp.ir.plan import Plan, ValueKind
from hetcomp.passes.choose_formats import weight_role
from hetcomp.passes.context import ROLES, Context, FormatRequest, Role, formats_of
from hetcomp.passes.mix_time import mix_us

Planner = Callable[[Context], Plan]

# Whole pipelines are run with every combination of the formats that the user allowed.
MAX_COMBINATIONS = 12
# Times within half a percent are equal: the simulation's samples are not more exact. The finer formats then win.
TIE = 1.005
# What gives way first where memory is short: experts hold nearly all bytes and are the least sensitive, each is one of
# several that are averaged; the KV cache next; attention, dense layers and embeddings last. Routers never.
_STEPS: tuple[tuple[tuple[Role, ...], str], ...] = (
    (("experts", "attention", "dense", "embedding"), "bf16"),
    (("experts",), "q8"),
    (("experts",), "q4"),
    (("kv",), "q8"),
    (("attention", "dense", "embedding"), "q8"),
    (("attention", "dense", "embedding"), "q4"),
)
# The order in which combinations are tried: that of the most sensitive role changes last, so that of equally fast ones
# the first is the finest where it matters.
_SENSITIVE_FIRST: tuple[Role, ...] = ("router", "embedding", "attention", "dense", "kv", "experts")


@dataclass(frozen=True)
class _Tried:
    request: FormatRequest
    plan: Plan | None
    refused: DoesNotFit | None


def search_formats(context: Context, run: Planner) -> tuple[Context, Plan | None]:
    """The context with one format a role, ``auto`` only where that is to be what the checkpoint has, and the plan with
    it, whose notes say which formats were chosen and why; None where there is nothing to choose and nothing was run.

    Roles with ``auto`` get the finest formats, from the checkpoint's on down (see _STEPS), with which the plan fits;
    where the user allowed several, all combinations that fit are simulated and the fastest is taken (of equally fast
    ones the finer). ``run`` runs the pipeline with a context, to its end.
    Raises DoesNotFit, of the smallest formats, if nothing fits, and whatever else ``run`` raises.
    """
    request = context.formats
    choices = [len(request.allowed(role)) for role in ROLES]
    automatic = [role for role in ROLES if request.allowed(role) == ("auto",)]
    if max(choices) == 1 and not automatic:
        return context, None
    refused: list[_Tried] = []
    for base in _ladder(request, automatic, context):
        tried = [_try(combination, context, run) for combination in _combinations(base)]
        fitting = [t for t in tried if t.plan is not None]
        refused += [t for t in tried if t.plan is None]
        if fitting:
            times = [mix_us(t.plan) for t in fitting if t.plan is not None]
            best = next(t for t, us in zip(fitting, times, strict=True) if us <= min(times) * TIE)
            assert best.plan is not None
            notes = (*best.plan.notes, *_notes(best.plan, fitting, times, refused))
            return replace(context, formats=best.request), replace(best.plan, notes=notes)
    last = refused[-1].refused
    assert last is not None
    raise last


def _ladder(request: FormatRequest, automatic: Sequence[Role], context: Context) -> list[FormatRequest]:
    """Requests with formats in place of ``auto``, finest first."""
    found = [request]
    by_role = dict(request.by_role)
    for roles, form in _STEPS:
        if roles == ("kv",) and context.use_gpus:
            form = "fp8"  # GPUs have no kernels for q8 caches
        changed = {role: form for role in roles if role in automatic}
        if changed and all(form in formats_of(role) for role in changed):
            by_role |= changed
            found.append(FormatRequest(dict(by_role), frozenset(automatic)))
    return found


def _combinations(base: FormatRequest) -> list[FormatRequest]:
    options = [base.allowed(role) for role in _SENSITIVE_FIRST]
    combinations = list(itertools.product(*options))
    if len(combinations) > MAX_COMBINATIONS:
        raise HetcompError(
            f"The formats allow {len(combinations)} combinations, each a plan of its own; allow at most "
            f"{MAX_COMBINATIONS}."
        )
    return [replace(base, by_role=dict(zip(_SENSITIVE_FIRST, forms, strict=True))) for forms in combinations]


def _try(request: FormatRequest, context: Context, run: Planner) -> _Tried:
    try:
        return _Tried(request, run(replace(context, formats=request)), None)
    except DoesNotFit as error:
        return _Tried(request, None, error)


def _notes(best: Plan, fitting: Sequence[_Tried], times: Sequence[float], refused: Sequence[_Tried]) -> tuple[str, ...]:
    notes = [f"formats: {_spell(best)}"]
    if len(fitting) > 1:
        spelled = (f"{_spell(t.plan)} {us / 1e6:.3g} s" for t, us in zip(fitting, times, strict=True) if t.plan)
        notes.append("formats allowed, by the simulated time of the mix: " + "; ".join(spelled))
    if refused and (error := refused[-1].refused) is not None:
        why = "" if error.needed > error.free else ", and no placement keeps every device within its own"
        notes.append(
            f"formats: finer ones do not fit: {_asked(refused[-1].request)} need {error.needed / 1e9:.1f} GB of the "
            f"{error.free / 1e9:.1f} GB that are free{why}"
        )
    return tuple(notes)


def _asked(request: FormatRequest) -> str:
    wanted = {role: request.of(role) for role in ROLES if role != "router"}
    named = [f"{role} {form}" for role, form in wanted.items() if form != "auto"]
    return ", ".join([*named, "the checkpoint's formats" + (" elsewhere" if named else "")])


def _spell(plan: Plan) -> str:
    """``experts q4, attention bf16, ..``: what the roles' weights got in the finished plan."""
    found: dict[str, set[str]] = {}
    values = plan.value_map()
    for call in plan.calls:
        template = plan.template(call.template)
        actual = dict(zip(template.params, call.args, strict=True))
        for op in template.ops:
            for value in (values[actual[name]] for name in op.inputs if actual.get(name) in values):
                if value.kind is ValueKind.WEIGHT and value.type.layout != "row_major" and value.format is not None:
                    found.setdefault(weight_role(op), set()).add(value.format)
                elif value.kind is ValueKind.STATE and value.type.is_cache:
                    found.setdefault("kv", set()).add(value.type.dtype.value)
    return ", ".join(f"{role} {' and '.join(sorted(found[role]))}" for role in ROLES if role in found)

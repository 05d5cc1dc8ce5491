"""The order of the passes. Nothing else knows it."""

from __future__ import annotations

import time
from pathlib import Path

from hetcomp.errors import HetcompError
from hetcomp.ir.plan import Plan
from hetcomp.ir.printer import print_plan
from hetcomp.ir.verifier import verify
from hetcomp.passes.annotate_cost import annotate_cost
from hetcomp.passes.attach_lora import attach_lora
from hetcomp.passes.bind_weights import bind_weights
from hetcomp.passes.cache_experts import cache_experts
from hetcomp.passes.choose_formats import choose_formats
from hetcomp.passes.context import Context
from hetcomp.passes.defer_experts import defer_experts
from hetcomp.passes.insert_transfers import insert_transfers
from hetcomp.passes.place import place
from hetcomp.passes.plan_memory import plan_memory
from hetcomp.passes.registry import PlanPass
from hetcomp.passes.schedule import schedule
from hetcomp.passes.simulate import simulate
from hetcomp.passes.slice_numa import slice_numa
from hetcomp.passes.stream_experts import stream_experts
from hetcomp.passes.stream_weights import stream_weights

PIPELINE: tuple[PlanPass, ...] = (
    bind_weights,  # first: a damaged checkpoint is refused before anything is decided
    attach_lora,  # needs the checkpoint's dtypes; refuses what cannot be merged before anything is decided
    choose_formats,  # needs the checkpoint's dtypes; every byte count below depends on it
    annotate_cost,  # needs formats; placement minimises these times
    place,  # needs costs; refuses what does not fit before a weight is read
    slice_numa,  # needs to know which ops a CPU node got
    stream_weights,  # needs to know what is where and whole; what experts' streams may take comes after
    stream_experts,  # needs to know where experts are and whether they are cut
    cache_experts,  # gets the GPU's memory that all before have left
    insert_transfers,  # needs final devices; adds ops, so order and memory come after
    schedule,  # needs all ops there; its barriers decide which values are alive together
    defer_experts,  # needs hand-overs and barriers: it simulates; what is deferred needs memory
    plan_memory,  # needs epochs
    simulate,  # last: predicts what all the decisions give
)


def _check_order() -> None:
    held: set[str] = set()
    for plan_pass in PIPELINE:
        missing = plan_pass.requires - held
        if missing:
            raise AssertionError(f"pass {plan_pass.name} stands before what establishes {sorted(missing)}")
        held |= plan_pass.establishes


_check_order()


def run_pipeline(
    plan: Plan,
    context: Context,
    *,
    stop_after: str | None = None,
    dump_dir: Path | None = None,
    seconds: dict[str, float] | None = None,
) -> Plan:
    """Runs the passes in order, verifying the plan before the first and after each.

    stop_after: name of the last pass to run. dump_dir: folder for numbered text dumps, one a pass. seconds: is told how
    long each pass took.
    Raises HetcompError if a pass refuses, or names a pass that breaks the plan (with the passes already run).
    """
    names = [p.name for p in PIPELINE]
    if stop_after is not None and stop_after not in ("lower", *names):
        raise HetcompError(f"There is no pass '{stop_after}'; the passes are lower, {', '.join(names)}.")
    _checked(plan, "lower", ())
    _dump(plan, dump_dir, 0, "lower")
    if stop_after == "lower":
        return plan
    for i, plan_pass in enumerate(PIPELINE):
        start = time.perf_counter()
        plan = plan_pass(plan, context)
        if seconds is not None:
            seconds[plan_pass.name] = time.perf_counter() - start
        _checked(plan, plan_pass.name, tuple(names[:i]))
        _dump(plan, dump_dir, i + 1, plan_pass.name)
        if plan_pass.name == stop_after:
            break
    return plan


def _checked(plan: Plan, name: str, before: tuple[str, ...]) -> None:
    try:
        verify(plan)
    except HetcompError as error:
        raise HetcompError(f"After {name} (run before it: {', '.join(before) or 'none'}): {error}") from error


def _dump(plan: Plan, folder: Path | None, number: int, name: str) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02d}-{name}.txt").write_text(print_plan(plan), encoding="utf-8")

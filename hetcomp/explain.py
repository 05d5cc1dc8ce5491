"""Why a model is as fast as it is: what share of the machine's ceilings each op class reached, and what holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hetcomp.backends.protocol import Isa
from hetcomp.backends.select_kernels import CpuTarget, default_backends
from hetcomp.bench import BenchRecord, CaseResult, RoleTime, case_steps
from hetcomp.errors import HetcompError
from hetcomp.hardware.profile import HardwareProfile
from hetcomp.ir import ops
from hetcomp.ir.deferral import whole_role
from hetcomp.ir.plan import Op, Plan
from hetcomp.ir.serialise import plan_hash
from hetcomp.passes.annotate_cost import Cached, cost_plan
from hetcomp.passes.context import Context
from hetcomp.passes.device_time import link_gb_per_s

# From this share of a ceiling on, that ceiling is what holds an op class.
NEAR = 0.6
# Below this share of both ceilings neither says anything.
FAR = 0.3
# Ops that take less than this are mostly their barriers and the drawing of tasks.
SMALL_US = 5.0

Holder = Literal["memory", "compute", "link", "latency", "cache", "mixed", "kernel", "disturbed"]


@dataclass(frozen=True)
class Explanation:
    """One op class in one case.

    ``measured_ms``: median of the rounds; ``share``: its part of the case's time. ``memory``: bytes moved in that
    time as a part of the DRAM read bandwidth (above 1: caches served it); ``compute``: FLOPs likewise of the rate of
    matrix kernels with all threads; ``link``: bytes of transfers likewise of the PCIe link, None without transfers.
    ``holder`` names what holds it, ``held_by`` says it in words, with a remedy where there is one.
    """

    case: str
    role: str
    share: float
    measured_ms: float
    memory: float
    compute: float
    link: float | None
    holder: Holder
    held_by: str


@dataclass
class _Work:
    """Of one role over all steps of a case. ``form``: format of its matrices."""

    weights: float = 0.0
    state: float = 0.0
    moved: float = 0.0
    flops: float = 0.0
    linked: float = 0.0
    ops: int = 0
    form: str = "f32"


@dataclass(frozen=True)
class _Shares:
    memory: float
    compute: float
    link: float | None
    each_us: float


def explain(plan: Plan, profile: HardwareProfile, record: BenchRecord) -> list[Explanation]:
    """What holds every op class of every case of the record, most time first.

    The DRAM ceiling is that of the run (:func:`dram_gb_per_s`), the FLOP ceiling the profile's. Raises HetcompError if
    the record is of another plan or the profile of another machine.
    """
    if record.plan_sha256 != plan_hash(plan):
        raise HetcompError(
            f"The bench record is of another compile of {record.model}; run hetcomp bench on this artifact again."
        )
    if record.cpu != profile.cpu:
        raise HetcompError(
            f"The bench record is of {record.cpu}, the profile of {profile.cpu}; give the profile of the machine that "
            "the record was taken on with --hw."
        )
    context = Context(profile, None, CpuTarget((Isa.AVX2,), default_backends()), isa=record.isa)
    found = []
    for case in record.cases:
        work = _work(plan, context, case)
        last = case_steps(plan, case.phase, case.tokens, case.position)[-1]
        cached = Cached.of(plan, last, context)
        for role in sorted(_whole(case.roles), key=lambda r: -r.typical_ms):
            if role.role in work and role.typical_ms > 0:
                still = cached.experts if role.kind == "moe_experts" else cached.every_step
                found.append(_explanation(case, role, work[role.role], profile, record, still))
    return found


def dram_gb_per_s(profile: HardwareProfile, record: BenchRecord) -> float:
    """The DRAM ceiling of the run in 10^9 bytes a second: the profile's bandwidth (what our kernels streamed counts for
    it), less as far as plain reads gave less during the run; never below what they gave. More than was ever read is not
    assumed: a profile whose plain reads were held up may have had undisturbed kernels."""
    return max(record.gb_per_s or 0.0, profile.bandwidth() * min(1.0, record.bandwidth_ratio))


def _whole(roles: Sequence[RoleTime]) -> list[RoleTime]:
    """The roles with the time of deferred experts in that of all."""
    found: dict[str, RoleTime] = {}
    for role in roles:
        name = whole_role(role.role)
        first = found.get(name)
        if first is None:
            found[name] = role.model_copy(update={"role": name})
            continue
        samples = tuple(a + b for a, b in zip(first.samples_ms, role.samples_ms, strict=True))
        measured, predicted = first.measured_ms + role.measured_ms, first.predicted_ms + role.predicted_ms
        sums = {"samples_ms": samples, "measured_ms": measured, "predicted_ms": predicted}
        found[name] = first.model_copy(update=sums)
    return list(found.values())


def _work(plan: Plan, context: Context, case: CaseResult) -> dict[str, _Work]:
    """What each role does over all steps of the case."""
    sums: dict[str, _Work] = {}
    for step in case_steps(plan, case.phase, case.tokens, case.position):
        costed = cost_plan(plan, (step,), context)
        for call in costed.calls:
            template = costed.template(call.template)
            for op in template.ops:
                formats = [f for name in op.inputs if (f := template.value(name).format)]
                _add(sums.setdefault(op.role or op.kind, _Work()), op, formats)
    return sums


def _add(work: _Work, op: Op, formats: list[str]) -> None:
    if op.cost is None:
        return
    cost = op.cost.phases[0]
    work.weights += cost.weight_bytes
    work.state += cost.state_bytes
    work.moved += cost.weight_bytes + cost.act_bytes + cost.state_bytes
    work.flops += cost.flops
    # A transfer's input and output are the same bytes, once over the link.
    work.linked += cost.act_bytes / 2 if isinstance(op.attrs, ops.Transfer) else 0.0
    work.ops += 1
    work.form = next((f for f in formats if f != "f32"), work.form)


def _explanation(
    case: CaseResult, role: RoleTime, work: _Work, profile: HardwareProfile, record: BenchRecord, cached: float
) -> Explanation:
    ms = role.typical_ms
    link = None
    if work.linked and profile.gpus:
        link = work.linked / (ms * 1e6) / link_gb_per_s(profile.gpus[0])
    shares = _Shares(
        memory=work.moved / (ms * 1e6) / dram_gb_per_s(profile, record),
        compute=work.flops / (ms * 1e6) / profile.gflops(work.form, isa=record.isa),
        link=link,
        each_us=ms * 1e3 / max(1, work.ops),
    )
    holder, words = _disturbance(role) or _holder(shares, work, cached)
    total = sum(r.typical_ms for r in case.roles)
    return Explanation(case.name, role.role, ms / total, ms, shares.memory, shares.compute, link, holder, words)


def _disturbance(role: RoleTime) -> tuple[Holder, str] | None:
    if not role.disturbed:
        return None
    low, high = min(role.samples_ms), max(role.samples_ms)
    return "disturbed", f"not known: took {low:.3g} to {high:.3g} ms; run hetcomp bench again on a quiet machine"


def _holder(shares: _Shares, work: _Work, cached: float) -> tuple[Holder, str]:
    """What holds an op class, and the sentence that says so. The largest share decides."""
    memory, compute = shares.memory, shares.compute
    if shares.link is not None and shares.link >= NEAR:
        return "link", f"copies at {shares.link:.0%} of the PCIe link: only fewer bytes over it or a faster link help"
    if memory > 1.0 and memory >= compute:
        remedy = "smaller formats or more cache help"
        return "cache", f"caches: it gets its {_what(work)} at {memory:.1f} times what DRAM gives; {remedy}"
    if memory >= NEAR and memory >= compute:
        return "memory", f"memory bandwidth: reads {_what(work)} at {memory:.0%} of DRAM; {_memory_remedy(work)}"
    if compute >= NEAR:
        caveat = " (above 100 %: the profile's rate is too low for it; run hetcomp profile)" if compute > 1.05 else ""
        return "compute", (
            f"compute: {compute:.0%} of the FLOP/s{caveat}; only a wider instruction set, more cores or a GPU help"
        )
    if shares.each_us < SMALL_US:
        return "latency", (
            f"latency: {work.ops} ops of {shares.each_us:.1f} us, mostly barriers and handing out tasks; fewer threads "
            "or more sequences at once help"
        )
    if max(memory, compute) >= FAR:
        nearer = f"memory ({memory:.0%} of DRAM)" if memory >= compute else f"compute ({compute:.0%} of FLOP/s)"
        shared = work.weights > work.moved / 2
        remedy = "; more tokens a step use each weight that is read more often" if shared else ""
        return "mixed", f"between the ceilings, nearest to {nearer}{remedy}"
    if cached > 0.5 and work.weights:
        return "kernel", "weights lie in the caches; the kernel's fixed costs show at this size"
    return "kernel", "neither ceiling is near: the kernel, or how evenly its work divides among threads, has room"


def _what(work: _Work) -> str:
    acts = work.moved - work.weights - work.state
    return max(("weights", work.weights), ("the KV cache", work.state), ("activations", acts), key=lambda e: e[1])[0]


def _memory_remedy(work: _Work) -> str:
    return {
        "weights": "only smaller formats, more memory channels or more sequences at once help",
        "the KV cache": "only a shorter context or more memory channels help",
        "activations": "only fewer tokens a step (so that they stay in the caches) or more memory channels help",
    }[_what(work)]

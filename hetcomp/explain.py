"""Why a model is as fast as it is: what share of the machine's ceilings each op class reached, and what holds it."""

from __future__ import annotations

from dataclasses import dataclass

from hetcomp.backends.protocol import Isa
from hetcomp.backends.select_kernels import CpuTarget, default_backends
from hetcomp.bench import BenchRecord, CaseResult
from hetcomp.errors import HetcompError
from hetcomp.hardware.profile import HardwareProfile
from hetcomp.ir.plan import Plan
from hetcomp.passes.annotate_cost import cost_plan, working_set
from hetcomp.passes.context import Context
from hetcomp.passes.device_time import cached_fraction
from hetcomp.passes.phases import Phase

# From this share of a ceiling on, that ceiling is what holds an op class.
NEAR = 0.6
# Ops that take less than this are mostly their barriers and the drawing of tasks.
SMALL_US = 5.0


@dataclass(frozen=True)
class Explanation:
    """One op class in one case. ``memory``: bytes moved in the measured time, as a part of the DRAM read bandwidth
    (above 1: caches served it); ``compute``: FLOPs likewise of the peak of matrix kernels; ``share``: part of the
    case's time."""

    case: str
    role: str
    share: float
    measured_ms: float
    memory: float
    compute: float
    held_by: str


def explain(plan: Plan, profile: HardwareProfile, record: BenchRecord) -> list[Explanation]:
    """What holds every op class of every case of the record, most time first.

    Raises HetcompError if the record is of another plan.
    """
    from hetcomp.ir.serialise import plan_hash

    if record.plan_sha256 != plan_hash(plan):
        raise HetcompError(
            f"The bench record is of another compile of {record.model}; run hetcomp bench on this artifact again."
        )
    found = []
    for case in record.cases:
        work = _work(plan, profile, case, record.isa)
        cached = cached_fraction(working_set(plan, _context(profile, record.isa)), profile)
        for role in case.roles:
            if role.role in work and role.measured_ms > 0:
                found.append(_explain(case, role.role, role.measured_ms, work[role.role], profile, record, cached))
    return found


@dataclass
class _RoleWork:
    bytes: float = 0.0
    flops: float = 0.0
    ops: int = 0
    form: str = "f32"


def _context(profile: HardwareProfile, isa: str) -> Context:
    return Context(profile, None, CpuTarget((Isa.AVX2,), default_backends()), isa=isa)


def _work(plan: Plan, profile: HardwareProfile, case: CaseResult, isa: str) -> dict[str, _RoleWork]:
    """Bytes, FLOPs and number of ops of each role over all steps of the case."""
    largest = plan.dim("T").max
    if case.phase == "decode":
        steps = [Phase("decode", 1, 1, case.position)]
    else:
        starts = range(0, case.tokens, largest)
        steps = [Phase("prefill", min(largest, case.tokens - s), 1, min(case.tokens, s + largest)) for s in starts]
    sums: dict[str, _RoleWork] = {}
    for step in steps:
        costed = cost_plan(plan, (step,), _context(profile, isa))
        for call in costed.calls:
            template = costed.template(call.template)
            values = template.value_map()
            for op in template.ops:
                if op.cost is None:
                    continue
                cost, entry = op.cost.phases[0], sums.setdefault(op.role or op.kind, _RoleWork())
                entry.bytes += cost.weight_bytes + cost.act_bytes + cost.state_bytes
                entry.flops += cost.flops
                entry.ops += 1
                formats = [f for n in op.inputs if (f := values[n].format) not in (None, "f32")]
                entry.form = str(formats[0]) if formats else entry.form
    return sums


def _explain(
    case: CaseResult,
    role: str,
    ms: float,
    work: _RoleWork,
    profile: HardwareProfile,
    record: BenchRecord,
    cached: float,
) -> Explanation:
    memory = work.bytes / (ms * 1e6) / profile.bandwidth()
    compute = work.flops / (ms * 1e6) / profile.gflops(work.form, isa=record.isa)
    each_us = ms * 1e3 / max(1, work.ops)
    return Explanation(
        case.name, role, ms / case.measured_ms, ms, memory, compute, _held_by(memory, compute, each_us, work, cached)
    )


def _held_by(memory: float, compute: float, each_us: float, work: _RoleWork, cached: float) -> str:
    if memory >= NEAR and memory >= compute:
        if memory > 1.0:
            return "memory: caches serve part of it, or the profile's bandwidth was measured on a busy machine"
        what = "weights of fewer bits (a smaller --formats)" if work.form != "f32" or work.flops else "fewer bytes"
        return f"DRAM bandwidth: only {what} or more memory channels help"
    if compute >= NEAR:
        return "arithmetic: only a wider instruction set, more cores or a GPU help"
    if each_us < SMALL_US:
        return f"latency: {work.ops} ops of {each_us:.1f} us each, mostly barriers and task hand-out"
    if memory >= 0.3 or compute >= 0.3:
        nearer = "DRAM bandwidth" if memory >= compute else "arithmetic"
        return f"between memory and arithmetic, nearer to {nearer}: few tokens share each weight"
    if cached > 0.5:
        return "caches hold it; the kernel's own fixed costs show at this size"
    return "neither ceiling: the kernel itself has room here"

"""Work and time of a single expert: what placement weighs and the simulation adds up."""

from __future__ import annotations

from dataclasses import replace

from hetcomp.hardware.figures import Gpu
from hetcomp.ir import ops
from hetcomp.ir.plan import Op
from hetcomp.passes.adapter_time import cpu_pair_us, gpu_pair_us
from hetcomp.passes.context import Context
from hetcomp.passes.device_time import cpu_time, gpu_time, launch_us
from hetcomp.passes.phases import Phase
from hetcomp.passes.work import Work, expert_borders


def expert_work(op: Op, work: Work, size: float, tokens: float, active: float = 1.0) -> Work:
    """The part of an expert op's ``work`` that one expert of ``size`` bytes does for ``tokens`` tokens in the mean, if
    it has anything to do with probability ``active``."""
    a = op.attrs
    assert isinstance(a, ops.MoeExperts)
    whole = 3.0 * a.hidden * a.intermediate
    return replace(
        work,
        flops=2.0 * whole * tokens,
        weight_bytes=size * active,
        act_bytes=work.act_bytes * tokens / max(1, work.rows * a.top_k),
        weights=whole * active,
        borders=whole * active * expert_borders(a.hidden, a.intermediate),
        group=max(1.0, tokens / active) if active > 0 else 1.0,
    )


def expert_cpu_us(op: Op, work: Work, step: Phase, context: Context) -> float:
    """CPU time of an expert's work, its weights in memory."""
    us = cpu_time(op, work, step, context.profile, context.isa, 0.0).us
    if context.adapted_rank:
        us += cpu_pair_us(op, work, context.adapted_rank, context.profile, context.isa)
    return us


def expert_gpu_us(op: Op, work: Work, step: Phase, gpu: Gpu, adapted_rank: int | None = None) -> float:
    """GPU time of an expert's work without the launch, which all experts share; with the pair of an adapter of that
    rank."""
    us = max(0.0, gpu_time(op, work, step, gpu).us - launch_us(gpu))
    return us + (gpu_pair_us(op, work, adapted_rank, step, gpu) if adapted_rank else 0.0)

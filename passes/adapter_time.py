"""How much longer ops take where all tokens of a step have one LoRA adapter: its pairs are read, and on GPUs there are
more launches."""

from __future__ import annotations

from hetcomp.backends.cpu_isa import WHOLE_NUMBERS
from hetcomp.hardware.figures import Gpu, Source
from hetcomp.hardware.profile import HardwareProfile
from hetcomp.ir import ops
from hetcomp.ir.plan import Op, Template
from hetcomp.passes.choose_formats import weight_role
from hetcomp.passes.device_time import GPU_READS, gpu_tflops, gpu_time, launch_us
from hetcomp.passes.gpu_kernel_time import GEMV_ROWS
from hetcomp.passes.phases import Phase
from hetcomp.passes.work import Work

# What adapters mostly change: neither routers nor the output layer.
_ADAPTED = ("attention", "dense", "experts")
_ADAPTABLE = (ops.Linear, ops.HeadLinear, ops.MoeExperts)
# The launch that makes h of a group and the one that adds b h each follow a row's slot to the table, from there to the
# pair: reads that wait for each other, 4 us together. Of Qwen3-30B-A3B wholly on an H100 a token took 17.8 us a layer
# more with an adapter on attention (two groups) and 25.9 with experts (four), of which five launches are 10
# (benchmarks/results/adapter_cost-20261126T143916, T144013); the pairs' bytes are half a microsecond.
PAIR_WAIT_US = 4.0
# Part of the rate of weights at which pairs are read: they are short streams, of a row of a and of half a KB of b for
# two panels. 410 us more for 3.9 MB of them where 36 MB of q4 experts take 1,400 (qwen3moe-1b, 8 rows on 4 adapters,
# CPU time of one thread of a Zen 4), 60 for 0.49 MB beside 7.1 in 250 (one row).
CPU_PAIR_READS = 0.35


def is_adapted(op: Op) -> bool:
    """Whether the op's weights are among those that the prediction takes for changed."""
    return isinstance(op.attrs, _ADAPTABLE) and weight_role(op) in _ADAPTED


def cpu_pair_us(op: Op, work: Work, rank: int, profile: HardwareProfile, isa: str | None) -> float:
    """On the fastest node's lane, behind the time of the op's own ``work`` (which may be that of one expert)."""
    flops, moved = _pair_work(op, work, rank, 1.0 if work.weight_format in WHOLE_NUMBERS else 2.0)
    form = "f32" if work.weight_format == "f32" else "bf16"
    reads = profile.bandwidth() * profile.rate(form, isa).bandwidth_fraction * CPU_PAIR_READS
    return max(moved / (reads * 1e3), flops / (profile.gflops(form, isa=isa) * 1e3))


def gpu_pair_us(op: Op, work: Work, rank: int, step: Phase, gpu: Gpu) -> float:
    """On a GPU, without launches."""
    assert gpu.gb_per_s is not None
    flops, moved = _pair_work(op, work, rank, 2.0)
    if not _is_gemv(step):  # h, and the result once more, are written and read
        moved += 8.0 * work.written
    reads = gpu.gb_per_s * (1.0 if gpu.source is Source.MEASURED else GPU_READS) * 1e3
    return max(moved / reads, flops / (gpu_tflops(gpu, work.weight_format) * 1e6))


def expert_launches_us(gpu: Gpu, rank: int | None) -> float:
    """Launches of the experts of a layer on a GPU; ``rank`` None: there is no adapter."""
    return launch_us(gpu) + (2 * (launch_us(gpu) + PAIR_WAIT_US) if rank else 0.0)


def gpu_op_us(template: Template, op: Op, work: Work, step: Phase, gpu: Gpu, rank: int | None) -> float:
    """Of an op that is wholly on a GPU, with an adapter of that rank (None: there is none). In decode linears of one
    input share a launch, which is counted for the first of them."""
    us = gpu_time(op, work, step, gpu).us
    if rank is None or not isinstance(op.attrs, _ADAPTABLE):
        return us
    us += gpu_pair_us(op, work, rank, step, gpu) if is_adapted(op) else 0.0
    if isinstance(op.attrs, ops.MoeExperts):
        return us + 2 * (launch_us(gpu) + PAIR_WAIT_US)
    # A router's launch is there whether an adapter changes it or not, and its own.
    same = (o for o in template.ops if isinstance(o.attrs, _ADAPTABLE[:2]) and o.inputs[0] == op.inputs[0])
    first = next(o for o in same if is_adapted(o) == is_adapted(op))
    launches = float(first.id == op.id) if _is_gemv(step) else 2.0
    return us + launches * (launch_us(gpu) + (PAIR_WAIT_US if is_adapted(op) else 0.0))


def _is_gemv(step: Phase) -> bool:
    return step.tokens == step.sequences and step.tokens <= GEMV_ROWS


def _pair_work(op: Op, work: Work, rank: int, coarse: float) -> tuple[float, float]:
    """FLOP, and bytes of the pairs that are read: of as many experts as the work reads. ``coarse``: bytes of a number
    where weights are not f32."""
    number = 4.0 if work.weight_format == "f32" else coarse
    a = op.attrs
    if isinstance(a, ops.MoeExperts):
        sizes = 2 * a.hidden + 3 * a.intermediate
        whole = 3.0 * a.hidden * a.intermediate
        return work.flops / whole * sizes * rank, work.weights / whole * sizes * rank * number
    assert isinstance(a, (ops.Linear, ops.HeadLinear))
    heads = a.heads if isinstance(a, ops.HeadLinear) else 1
    sizes = heads * (a.in_features + a.out_features)
    return 2.0 * work.rows * sizes * rank, float(sizes * rank) * number

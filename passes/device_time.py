"""How long a device takes for an op's work: measured curves of the kernels where there are any, else the roofline."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hetcomp.errors import HetcompError
from hetcomp.hardware.figures import Gpu, KernelCurve, KernelName, Source, interpolate
from hetcomp.hardware.profile import KIN, HardwareProfile
from hetcomp.ir import ops
from hetcomp.ir.plan import Op
from hetcomp.passes.gpu_kernel_time import compute_us, joining_us, matrix_rate, reads_latents
from hetcomp.passes.phases import Phase
from hetcomp.passes.work import Work, expert_borders

# Part of a GPU's data-sheet peak that is reached in practice, by reads and by matrix products (estimates: STREAM-like
# copies reach 0.85 to 0.93 on Ampere to Hopper, cuBLAS 0.7 to 0.8 of the dense tensor peak).
GPU_READS, GPU_FLOPS = 0.85, 0.7
# Where the profile does not say: one more node of a CUDA graph, and a round trip through flags in pinned memory
# (6 us: 285 to 300 us for 48 on an H200 machine, stream memory operations in a graph).
GPU_LAUNCH_US, GPU_HANDSHAKE_US = 2.0, 6.0
# What attention on an fp8 cache takes, of its time on a bf16 one (1.6 to 2.7 on an H200, docs/decisions/kv-pool.md).
FP8_ATTENTION = 2.2


@dataclass(frozen=True)
class DeviceTime:
    """Microseconds, what bounds them (``memory`` or ``compute``), and whether a curve of the kernel says so."""

    us: float
    bound: str
    measured: bool = False


def cpu_time(op: Op, work: Work, step: Phase, profile: HardwareProfile, isa: str | None, cached: float) -> DeviceTime:
    """Time on the fastest node's lane. ``cached``: part of the weights that the caches still hold from the last
    step."""
    term = term_of(op, step)
    roofline = _roofline(work, profile, isa, cached)
    found = _from_curve(op, work, step, profile, isa, cached)
    us = found if found is not None else roofline.us
    factor = profile.calibration(op.kind) * (profile.calibration(term) if term != op.kind else 1.0)
    return DeviceTime(us * factor, roofline.bound, found is not None)


def term_of(op: Op, step: Phase) -> KernelName:
    """The kernel family (a term of the cost model) that the op's time is taken from."""
    if isinstance(op.attrs, (ops.Linear, ops.HeadLinear)):
        return "linear"
    if isinstance(op.attrs, ops.MoeExperts):
        return "moe_experts"
    if isinstance(op.attrs, ops.Attention):
        return "attention_decode" if step.tokens == step.sequences else "attention_prefill"
    if isinstance(op.attrs, ops.GatedDelta):
        return "gated_delta"
    return "elementwise"


def cached_fraction(working_set: float, profile: HardwareProfile) -> float:
    """Part of a working set that is read from caches when it is passed over again and again: from the measured
    bandwidth at that size, between memory's and the last-level cache's."""
    points = profile.cached_reads
    if len(points) < 2:
        return 0.0
    sizes, rates = [float(p.bytes) for p in points], [p.gb_per_s for p in points]
    memory, here = rates[-1], interpolate(max(working_set, 1.0), sizes, rates)
    last_level = max((c.bytes * c.instances for c in profile.caches), default=0)
    cache = interpolate(last_level / 2, sizes, rates) if last_level else max(rates)
    if cache <= memory * 1.05:
        return 0.0
    return min(1.0, max(0.0, (1 / memory - 1 / here) / (1 / memory - 1 / cache)))


def gpu_time(op: Op, work: Work, step: Phase, gpu: Gpu) -> DeviceTime:
    """Time on a GPU, its kernel's launch included: by the measured curve of the kernel for these weights (or this KV
    cache) where the profile has one, else by what our kernels reach of its bandwidth and rates. Raises HetcompError if
    the profile lacks its bandwidth."""
    if gpu.gb_per_s is None:
        raise HetcompError(
            f"The hardware profile does not say how fast {gpu.name} reads its memory; run hetcomp profile on that "
            "machine, or give gpus.*.gb_per_s in the profile file."
        )
    bytes_per_us = gpu.gb_per_s * (1.0 if gpu.source is Source.MEASURED else GPU_READS) * 1e3
    memory = work.bytes / bytes_per_us
    kernels = compute_us(op, work, step, gpu)
    compute = work.flops / (gpu_tflops(gpu, work.weight_format) * 1e6) if kernels is None else kernels
    bound = "memory" if memory >= compute else "compute"
    curve = gpu_curve(gpu, op, work, step)
    if curve is None:
        around = joining_us(op, work, step, bytes_per_us)
        return DeviceTime(max(memory, compute) + around + launch_us(gpu), bound)
    us = _attention_us(curve, op.attrs, work, step) if isinstance(op.attrs, ops.Attention) else _pass_us(curve, work)
    if isinstance(op.attrs, ops.Attention) and curve.weight_format != work.state_format:
        us *= FP8_ATTENTION
    return DeviceTime(us + launch_us(gpu), bound, measured=True)


def gpu_curve(gpu: Gpu, op: Op, work: Work, step: Phase) -> KernelCurve | None:
    """The GPU's measured curve for the op's kernel and format, None where there is none."""
    kernel = term_of(op, step)
    form = work.state_format if kernel.startswith("attention") else work.weight_format
    curves = {c.weight_format: c for c in gpu.curves if (c.kernel, c.variant) == (kernel, "dram")}
    if kernel == "elementwise" or (kernel == "attention_prefill" and reads_latents(op)):
        return None  # the curve is of heads of 128
    # GPUs' curves of attention are of bf16 caches; see FP8_ATTENTION.
    return curves.get(form) or (curves.get("bf16") if form == "fp8" and kernel.startswith("attention") else None)


def gpu_tflops(gpu: Gpu, weight_format: str) -> float:
    """Rate of matrix products in 10^12 FLOP a second that is reached in practice. Raises HetcompError if none is
    known."""
    rate = matrix_rate(gpu, weight_format)
    return rate.tflops * (1.0 if rate.source is Source.MEASURED else GPU_FLOPS)


def launch_us(gpu: Gpu) -> float:
    """One more node of a CUDA graph."""
    return gpu.launch_us if gpu.launch_us is not None else GPU_LAUNCH_US


def handshake_us(gpu: Gpu) -> float:
    """A round trip GPU -> CPU lane -> GPU through flags in pinned memory."""
    return gpu.handshake_us if gpu.handshake_us is not None else GPU_HANDSHAKE_US


def link_gb_per_s(gpu: Gpu) -> float:
    """Host-to-device bandwidth of large copies. Raises HetcompError if it is not known."""
    if gpu.link_gb_per_s is None:
        raise HetcompError(
            f"The hardware profile does not say how fast {gpu.name} is linked to the host; run hetcomp profile on that "
            "machine, or give gpus.*.link_gb_per_s in the profile file."
        )
    return gpu.link_gb_per_s * (1.0 if gpu.source is Source.MEASURED else GPU_READS)


def copy_us(gpu: Gpu, moved: float) -> float:
    """Microseconds to move that many bytes between host and GPU, start included where copies were measured."""
    if gpu.copies:
        sizes = [float(p.bytes) for p in gpu.copies]
        rates = [min(p.to_device_gb_per_s, p.to_host_gb_per_s) for p in gpu.copies]
        if moved <= sizes[0]:
            return sizes[0] / rates[0] / 1e3
        return moved / interpolate(moved, sizes, rates) / 1e3
    return moved / link_gb_per_s(gpu) / 1e3


def joint_gb_per_s(profile: HardwareProfile) -> float:
    """What the memories of all nodes give to CPU cores and copies together."""
    measured = [gpu.joint_gb_per_s for gpu in profile.gpus if gpu.joint_gb_per_s is not None]
    return max([*measured, sum(profile.bandwidth(n.id) for n in profile.compute_nodes)])


def _roofline(work: Work, profile: HardwareProfile, isa: str | None, cached: float) -> DeviceTime:
    reached = profile.bandwidth() * profile.rate(work.weight_format, isa).bandwidth_fraction
    memory = (work.bytes - cached * work.weight_bytes) / (reached * 1e3)
    compute = work.flops / (profile.gflops(work.weight_format, isa=isa) * 1e3)
    return DeviceTime(max(memory, compute), "memory" if memory >= compute else "compute")


def _from_curve(
    op: Op, work: Work, step: Phase, profile: HardwareProfile, isa: str | None, cached: float
) -> float | None:
    """Microseconds by the measured curves, None where there is none for this op."""
    kernel = term_of(op, step)
    if kernel in ("linear", "moe_experts"):
        return _matrix_us(kernel, work, profile, isa, cached)
    if kernel == "elementwise":
        variants = op.kind, _ELEMENTWISE_KIN.get(op.kind, "add")
        curve = next((c for v in variants if (c := profile.curve(kernel, v, "f32", isa)) is not None), None)
        if curve is None:
            return None
        rows = work.written / curve.shape.get("width", 1024)
        return work.written / (curve.rate(max(rows, 1e-9)) * 1e3) if work.written else None
    if kernel == "gated_delta":
        return _gated_delta_us(op, work, step, profile, isa, cached)
    form = work.state_format
    if form == "fp8" and profile.curve(kernel, "dram", form, isa) is None:
        form = "q8"  # of an older profile: as many bytes, unpacked as cheaply
    curve = profile.curve(kernel, "dram", form, isa)
    if curve is None:
        return None
    assert isinstance(op.attrs, ops.Attention)
    us = _attention_us(curve, op.attrs, work, step)
    small = profile.curve(kernel, "small", form, isa)
    if small is None:
        return us
    # What is done once a position and head (softmax, loops) weighs the more the narrower a head is; two widths give
    # that line.
    at_large, at_small, here = (1 / d for d in (curve.shape["head_dim"], small.shape["head_dim"], op.attrs.head_dim))
    place = max(0.0, (here - at_large) / (at_small - at_large))
    narrow = _attention_us(small, op.attrs, work, step)
    us += max(0.0, narrow - us) * place
    warm = profile.curve(kernel, "cache", form, isa)
    # What caches save the small operands, they save the same part of all.
    saved = max(0.0, 1 - _attention_us(warm, op.attrs, work, step) / narrow) if warm is not None else 0.0
    return us * (1 - cached * saved)


def _attention_us(curve: KernelCurve, attrs: ops.Attention, work: Work, step: Phase) -> float:
    decode = curve.kernel == "attention_decode"
    size = step.position if decode else max(step.tokens, step.position)
    if decode and attrs.window:
        size = min(size, attrs.window)
    return work.flops / 2 / (curve.rate(size) * 1e3)


def _gated_delta_us(
    op: Op, work: Work, step: Phase, profile: HardwareProfile, isa: str | None, cached: float
) -> float | None:
    assert isinstance(op.attrs, ops.GatedDelta)
    cold, warm = (profile.curve("gated_delta", variant, "f32", isa) for variant in ("dram", "cache"))
    if cold is None:
        return None
    elements = work.rows * op.attrs.v_heads * op.attrs.k_dim * op.attrs.v_dim
    rows = step.tokens / step.sequences
    rate = cold.rate(rows)
    best = max(rate, warm.rate(rows)) if warm is not None else rate
    return elements / 1e3 * ((1 - cached) / rate + cached / best)


# Whose curve an op's time is taken from where its own kind has none.
_ELEMENTWISE_KIN = {"rope_table": "rope", "layer_norm": "rms_norm", "activation": "glu", "causal_conv": "glu"}


def _matrix_us(
    kernel: KernelName, work: Work, profile: HardwareProfile, isa: str | None, cached: float
) -> float | None:
    us = _by_curves(kernel, work, profile, isa, cached)
    if us is not None or work.weight_format not in KIN:
        return us
    kin, bits = KIN[work.weight_format]
    us = _by_curves(kernel, replace(work, weight_format=kin), profile, isa, cached)
    if us is None or work.group > MEMORY_BOUND_TOKENS:
        return us
    return us * 8 * work.weight_bytes / (work.weights * bits)


def _by_curves(
    kernel: KernelName, work: Work, profile: HardwareProfile, isa: str | None, cached: float
) -> float | None:
    large = profile.curve(kernel, "dram", work.weight_format, isa)
    if large is None:
        return None
    us = _pass_us(large, work)
    at_large = _borders(large)
    here = work.borders / work.weights if work.weights else at_large
    # A kernel's time a weight grows with what it has to do for the activations at the weights' borders, and small
    # matrices are short streams: lines between two shapes. What is wider than the wide one takes as long.
    wide = profile.curve(kernel, "wide", work.weight_format, isa)
    if wide is not None and here < at_large:
        us += (_pass_us(wide, work) - us) * (at_large - here) / (at_large - min(here, _borders(wide)))
    warm = profile.curve(kernel, "cache", work.weight_format, isa)
    if warm is None:
        return us
    place = max(0.0, (here - at_large) / (_borders(warm) - at_large))  # 1 is the small shape
    cold = profile.curve(kernel, "small", work.weight_format, isa)
    if cold is not None:
        from_memory = us + max(0.0, _pass_us(cold, work) - us) * place
        from_cache = us + (_pass_us(warm, work) - us) * min(1.0, place)
        return (1 - cached) * from_memory + cached * min(from_memory, from_cache)
    if work.group <= MEMORY_BOUND_TOKENS:
        return (1 - cached) * us + cached * min(us, _pass_us(warm, work))
    # Bound by compute, wherever the weights are.
    return us + max(0.0, _pass_us(warm, work) - us) * place


# Up to this many tokens a weight the kernels wait for memory (10 FLOP a byte of bf16 is below every CPU's ridge).
MEMORY_BOUND_TOKENS = 8


def _pass_us(curve: KernelCurve, work: Work) -> float:
    return work.weights / (curve.rate(work.group) * 1e3)


def _borders(curve: KernelCurve) -> float:
    """Borders a weight of the operands that the curve was measured on."""
    shape = curve.shape
    if curve.kernel == "moe_experts":
        return expert_borders(shape["hidden"], shape["intermediate"])
    return (shape["in_features"] + shape["out_features"]) / (shape["in_features"] * shape["out_features"])

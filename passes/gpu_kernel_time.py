"""How long the GPU backend's kernels take on a GPU that they were not measured on: parts of its peak, and fixed costs.

The figures are those of the kernels of hetcomp/backends/gpu on an H100, launch by launch (benchmarks/gpu_launches.py,
Qwen3-30B-A3B's shape in q4, 64, 512 and 4,096 rows; docs/decisions/triton-ahead-of-time.md), as parts of the data
sheet's dense bf16 peak of 989 TFLOP/s: all products are bf16's, whatever weights are stored as.
"""

from __future__ import annotations

from hetcomp.errors import HetcompError
from hetcomp.hardware.figures import Gpu, GpuRate, Source
from hetcomp.ir import ops
from hetcomp.ir.plan import Op
from hetcomp.passes.phases import Phase
from hetcomp.passes.work import Work

# Rows of a step up to which linears and experts are GEMVs, which wait for memory (hetcomp/backends/gpu/gemv.py).
GEMV_ROWS = 8
# q, k and o at 64, 512 and 4,096 rows: 10, 6, 11; 28, 10, 32; 126, 22, 116 us. A line through them: 620 TFLOP/s and 10
# us, 2 of which are the launch.
LINEAR_PEAK, LINEAR_US = 0.63, 8.0
# 319 us for 4,096 tokens (431 TFLOP/s), 1,969 behind 12,288 others (489), 14 for 512, 6 for 64.
ATTENTION_PEAK, ATTENTION_US = 0.47, 4.0
# Of latents (MLA: 128 heads, 576 and 512 wide), on an H200: 299 us for 512 tokens, 9,730 for 4,096. Loading queries,
# what is masked and writing sums cost a token as much as so many keys more (docs/decisions/mla-absorbed.md).
LATENT_PEAK, LATENT_KEYS, LATENT_DIM = 0.28, 328, 256
# Both products of 128 experts: 206, 264 and 1,039 us, of 128 tiles of 16, 128 of 64 and 320 of 128 rows. A line through
# the times of a tile: 644 TFLOP/s, and unpacking its q4 weights takes as long as 94 rows more.
EXPERTS_PEAK, UNPACK_ROWS = 0.65, 94

# Qwen3-Next's rule (32 heads, 128 x 128) in chunks on an H200: 41, 131 and 252 us for 512, 2,048 and 4,096 rows
# (benchmarks/gpu_linear_attention.py): 10.5 us, and 169 TFLOP/s of what the chunks multiply.
DELTA_PEAK, DELTA_US, DELTA_CHUNK = 0.17, 8.5, 64

# Three TF32 products, each at half of bf16's rate, for weights stored as f32: 2.1 GFLOP of a router in 46 us.
F32_PEAK = 0.28 / 6
# What cuBLAS reaches of the data sheet's peak where the profile's rate was measured with it (784 of 989 on an H200,
# benchmarks/results/gpu_profile-20261124T170849-9fd7c8f.json).
CUBLAS_PEAK = 0.79


def matrix_rate(gpu: Gpu, weight_format: str) -> GpuRate:
    """The profile's rate for weights of a format, bf16's for those without one (they are unpacked to bf16 in the
    kernel). Raises HetcompError if neither is known."""
    rates = {r.weight_format: r for r in gpu.rates}
    rate = rates.get(weight_format) or rates.get("bf16")
    if rate is None:
        raise HetcompError(
            f"The hardware profile has no rate of matrix products for {gpu.name}; run hetcomp profile on that machine, "
            "or give gpus.*.rates in the profile file."
        )
    return rate


def peak_tflops(gpu: Gpu) -> float:
    """The data sheet's rate of bf16 products, 10^12 FLOP a second. Raises HetcompError if no rate is known."""
    rate = matrix_rate(gpu, "bf16")
    return rate.tflops / (CUBLAS_PEAK if rate.source is Source.MEASURED else 1.0)


def compute_us(op: Op, work: Work, step: Phase, gpu: Gpu) -> float | None:
    """What the op's launches take where memory does not hold them up; None for an op that is bound by memory alone."""
    attrs = op.attrs
    if _is_gemv(step):
        return None
    flop_us = 1.0 / (peak_tflops(gpu) * 1e6)
    if isinstance(attrs, (ops.Linear, ops.HeadLinear)):
        return LINEAR_US + work.flops * flop_us / (F32_PEAK if work.weight_format == "f32" else LINEAR_PEAK)
    if isinstance(attrs, ops.MoeExperts):
        return _experts_flop(attrs, work, step) * flop_us
    if step.tokens == step.sequences:
        return None
    if isinstance(attrs, ops.GatedDelta):
        return DELTA_US + _chunks_flop(attrs, step.tokens) * flop_us / DELTA_PEAK
    if isinstance(attrs, ops.Attention):
        if reads_latents(op):
            more = 2.0 * step.tokens * attrs.heads * (attrs.head_dim + attrs.v_head_dim) * LATENT_KEYS
            return (work.flops + more) * flop_us / LATENT_PEAK
        return ATTENTION_US + work.flops * flop_us / ATTENTION_PEAK
    return None


def reads_latents(op: Op) -> bool:
    """Whether it is attention whose keys are too wide for the tiles of usual heads: that of MLA."""
    return isinstance(op.attrs, ops.Attention) and op.attrs.head_dim > LATENT_DIM


def joining_us(op: Op, work: Work, step: Phase, bytes_per_us: float) -> float:
    """What a step of many rows takes behind the experts' products: their results, bf16, are read and added up."""
    attrs = op.attrs
    if not isinstance(attrs, ops.MoeExperts) or _is_gemv(step):
        return 0.0
    entries = work.flops / (6.0 * attrs.hidden * attrs.intermediate)
    return 2.0 * entries * attrs.hidden / bytes_per_us


def _is_gemv(step: Phase) -> bool:
    return step.tokens == step.sequences and step.tokens <= GEMV_ROWS


def _experts_flop(a: ops.MoeExperts, work: Work, step: Phase) -> float:
    """FLOP at the peak that take as long as the experts' tiles, padding and unpacking included. ``work`` may be that
    of one expert."""
    whole = 3.0 * a.hidden * a.intermediate
    height = _tile_rows(step.tokens * a.top_k / a.experts, work.weight_format)
    # The last tile of an expert is half empty in the mean.
    tiles = work.weights / whole * max(1.0, work.group / height + 0.5)
    narrow = work.weight_format != "f32"
    rows = height + (UNPACK_ROWS if narrow else 0)
    return tiles * rows * 2.0 * whole / (EXPERTS_PEAK if narrow else F32_PEAK)


def _chunks_flop(a: ops.GatedDelta, rows: int) -> float:
    """What the tensor cores multiply for rows of one sequence (codegen_templates/gpu/gated_delta.py)."""
    c, k, v = DELTA_CHUNK, a.k_dim, a.v_dim
    # q . k and k . k; w and u of T in two parts; T's twelve products; w S, q S and the update; scores times v'.
    products = 2 * c * c * k + 2 * c * c * (k + v) + 12 * c * c * c + 3 * c * k * v + c * c * v
    return 2.0 * -(-rows // c) * a.v_heads * products


def _tile_rows(share: float, weight_format: str) -> int:
    """Rows of an expert's tile, by entries an expert (hetcomp/backends/gpu/experts.py)."""
    if share <= 16:
        return 16
    return 64 if share <= 64 or weight_format == "f32" else 128

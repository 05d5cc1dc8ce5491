"""What the CPU templates know of an instruction set: its vector vocabulary and its register tiles."""

from __future__ import annotations

from dataclasses import dataclass

from hetcomp.backends.protocol import Isa


@dataclass(frozen=True)
class CpuIsa:
    """Numbers that the templates are rendered with.

    ``vocabulary``: file ``codegen_templates/cpu/isa_<vocabulary>.h.j2``. ``tile_rows`` x ``tile_panels``:
    tokens x panels of 16 rows whose sums a GEMM tile keeps in registers. ``gemv_rows``: token rows up to
    which the weights are streamed against unpacked activations. ``attention_rows``: heights of attention's tiles,
    falling, the last one 1. ``direct_rows``: rows up to which attention reads the KV cache without f32 copies;
    ``direct_heights`` (falling, the last one 1) x ``direct_panels``: its tiles then. ``prefetch_bytes``: distance of
    software prefetch, a multiple of 64.
    """

    vocabulary: str
    tile_rows: int
    tile_panels: int
    gemv_rows: int
    attention_rows: tuple[int, ...]
    direct_rows: int
    direct_heights: tuple[int, ...]
    direct_panels: int
    prefetch_bytes: int


_ISAS = {
    # 16 registers of 8 floats: 6 x 16 sums take 12, two hold weights.
    Isa.AVX2: CpuIsa("avx2", 6, 1, 2, (6, 3, 1), 8, (2, 1), 2, 4096),
    # 32 registers of 16 floats: 12 x 32 sums take 24, four hold the weights of two k.
    Isa.AVX512: CpuIsa("avx512", 12, 2, 4, (12, 4, 1), 8, (4, 2, 1), 4, 4096),
}


def cpu_isa(isa: Isa) -> CpuIsa:
    """The facts about ``isa``."""
    return _ISAS[isa]

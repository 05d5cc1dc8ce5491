"""What the CPU templates know of an instruction set: its vocabulary, its register tiles, how it multiplies a format."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from hetcomp.backends.protocol import Isa
from hetcomp.hardware.tuning import Tuning
from hetcomp.quantised_numbers import GROUPS

# Formats whose products are those of whole numbers: int8 activations with a scale for 32 columns.
WHOLE_NUMBERS = ("q8", "q6k", "q5k", "q4z", "q4k", "q4", "mxfp4")
# Formats that are exact in bf16, their scales apart.
_BF16 = ("bf16", "fp8")

Gemm = Literal["float", "int8", "bf16", "amx_bf16"]


@dataclass(frozen=True)
class CpuIsa:
    """Facts that the templates are rendered with. Methods take the weight format.

    ``vocabulary``: file ``codegen_templates/cpu/isa_<vocabulary>.h.j2`` and its companion ``bytes_..``. ``vnni``: byte
    products are one instruction. ``bf16``: so are products of bf16 pairs. ``amx``: matrix tiles of bf16.
    ``attention_rows``: heights of attention's tiles, falling, the last one 1. ``direct_rows``: rows up to which
    attention reads the KV cache without f32 copies; ``direct_heights`` (falling, the last one 1) x ``direct_panels``:
    its tiles then. ``chained_rows``: rows up to which whole-number sums are split in two to hide latency.
    ``many_rows``: tokens a weight from which on the second of two GEMM families is faster. ``chains``: sums that the
    product of a panel and a single row of floats is split into. ``pass_rows``: single rows that share a pass over a
    panel with their sums in registers; more on AVX-512 gain nothing measurable and cost compile time. ``few_tokens``:
    tokens up to which experts stream their weights against single rows; from 12 on it depends on shape and format.
    ``amx_slice``: columns of a slice of k that tiles multiply before their sums are put aside; ``amx_cache_bytes``:
    of the second-level cache, for the blocks of a task; ``amx_task_columns``: columns of weights of a task at most.
    """

    vocabulary: Literal["avx2", "avx512"]
    vnni: bool = False
    bf16: bool = False
    amx: bool = False
    attention_rows: tuple[int, ...] = (12, 4, 1)
    direct_rows: int = 8
    direct_heights: tuple[int, ...] = (4, 2, 1)
    direct_panels: int = 4
    chained_rows: int = 4
    many_rows: int = 64
    chains: int = 4
    pass_rows: int = 4
    few_tokens: int = 8
    # CPUs with AMX have 2 MB of second-level cache a core, which two hyperthreads share. 1024: tile instructions cost
    # more than where their operands lie, so that sums are put aside seldom; 64 KB of weights. 256 columns: 16 products
    # for each tile of tokens from the last-level cache.
    amx_slice: int = 1024
    amx_cache_bytes: int = 768 << 10
    amx_task_columns: int = 256

    def whole_numbers(self, weight_format: str) -> bool:
        """Whether weights of the format are multiplied as whole numbers (by single rows, that is)."""
        return weight_format in WHOLE_NUMBERS

    def gemms(self, weight_format: str) -> tuple[Gemm, ...]:
        """The families of tiles (``gemm_<family>.h.j2``): for few tokens a weight and, if another, for ``many_rows``.

        AMX multiplies quantised weights as bf16, which takes a conversion that pays with many tokens only.
        """
        if weight_format in WHOLE_NUMBERS:
            return ("int8", "amx_bf16") if self.amx else ("int8",)
        if weight_format in _BF16 and (self.amx or self.bf16):
            return ("amx_bf16",) if self.amx else ("bf16",)
        return ("float",)

    def gemm(self, weight_format: str, rows: float) -> Gemm:
        """The family for ``rows`` tokens a weight."""
        return self.gemms(weight_format)[-1 if rows >= self.many_rows else 0]

    def family(self, weight_format: str) -> tuple[bool, tuple[Gemm, ...]]:
        """Formats of equal families share their loops over weights: what is tuned on one of them serves the others."""
        return self.whole_numbers(weight_format), self.gemms(weight_format)

    def tuning(self, weight_format: str) -> Tuning:
        """The constants where no profile holds better ones.

        prefetch_bytes: more than one core's share of bandwidth x latency (16 GB/s x 100 ns), because the hardware
        prefetcher starts anew in every 4 KB page. 8192 is by way of L2: on 15 cores of a Xeon with AMX that was 1.05 as
        fast, on a Zen 4 not. task_blocks: enough tokens to pay for fetching the panels, few
        enough that there are many tasks.
        """
        many = 8 if self.whole_numbers(weight_format) else 4
        return Tuning(
            prefetch_bytes=8192 if self.amx else 4096,
            draw_bytes=256 << 10,
            task_blocks=8,
            gemv_rows=2 if self.vocabulary == "avx2" else many,
        )

    def tile_rows(self, family: Gemm) -> int:
        """Tokens of a register tile.

        AVX-512 has 32 registers: 12 rows x 2 panels of sums take 24, four hold the weights of two k; with scales along
        k 12 rows of one panel have two sums each. AVX2 has 16 of half the width: 6 rows of floats take 12; of whole
        numbers 4, whose f32 sums wait in memory. AMX: two tiles of 16.
        """
        if family == "amx_bf16":
            return 32
        return 12 if self.vocabulary == "avx512" else {"int8": 4}.get(family, 6)

    def tile_panels(self, family: Gemm, weight_format: str) -> int:
        """Panels of 16 rows of a register tile of floats; fp8 has two sums each."""
        return 2 if self.vocabulary == "avx512" and weight_format != "fp8" else 1

    def block_bytes(self, rows: int, columns: int, weight_format: str) -> int:
        """Bytes of ``rows`` rows of activations in blocks, as ``gemm_<family>.h.j2`` lays them out, of the family that
        takes most. Blocks of equal height waste less than one row a block; tiles of bf16 are as high as they can be and
        reach up to 15 rows of 64 bytes beyond the last block."""
        sizes = []
        for family in self.gemms(weight_format):
            padded = columns if weight_format == "f32" else -(-columns // 2) * 2
            each = {
                "amx_bf16": -(-columns // 32) * 64,
                "int8": -(-columns // 32) * _unit_bytes(weight_format),
                "bf16": padded * 2,
                "float": padded * 4,
            }[family]
            tiles = family == "amx_bf16"
            sizes.append(rows * each + 1024 if tiles else (rows + -(-rows // self.tile_rows(family))) * each)
        return max(sizes)

    def row_bytes(self, columns: int, weight_format: str) -> int:
        """Bytes of a row of activations for single rows, as ``activations_<family>.h.j2`` lays it out."""
        if weight_format in WHOLE_NUMBERS:
            return -(-(-(-columns // 32) * _unit_bytes(weight_format)) // 64) * 64
        return -(-columns // 16) * 64

    def entry_rows(self, entries: int, weight_format: str) -> int:
        """Rows of the blocks of ``entries`` rows in all, whatever family packs them."""
        return max(entries + -(-entries // self.tile_rows(f)) for f in self.gemms(weight_format))


def _unit_bytes(weight_format: str) -> int:
    """Bytes of 32 columns of a row of int8 activations: numbers, a scale, 4 bytes for each group of weights."""
    return 32 + 4 + 4 * (32 // GROUPS.get(weight_format, 32))


_AVX2 = CpuIsa(
    "avx2",
    attention_rows=(6, 3, 1),
    direct_heights=(2, 1),
    direct_panels=2,
    chained_rows=1,
    chains=2,
    pass_rows=3,
)
_ISAS = {
    Isa.AVX2: _AVX2,
    Isa.AVX_VNNI: replace(_AVX2, vnni=True),
    Isa.AVX512: CpuIsa("avx512"),
    Isa.AVX512_VNNI: CpuIsa("avx512", vnni=True),
    Isa.AVX512_BF16: CpuIsa("avx512", vnni=True, bf16=True),
    Isa.AMX_BF16: CpuIsa("avx512", vnni=True, bf16=True, amx=True),
}


def cpu_isa(isa: Isa) -> CpuIsa:
    """The facts about ``isa``."""
    return _ISAS[isa]

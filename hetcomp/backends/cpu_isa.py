"""What the CPU templates know of an instruction set: its vocabulary, its register tiles, how it multiplies a format."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from hetcomp.backends.protocol import Isa
from hetcomp.hardware.tuning import Tuning

# Formats whose products are those of whole numbers: int8 activations with a scale for 32 columns.
WHOLE_NUMBERS = ("q8", "q4", "mxfp4")
# Formats that are exact in bf16, their scales apart.
_BF16 = ("bf16", "fp8")

Gemm = Literal["float", "int8", "bf16", "amx"]


@dataclass(frozen=True)
class CpuIsa:
    """Facts that the templates are rendered with. Methods take the weight format.

    ``vocabulary``: file ``codegen_templates/cpu/isa_<vocabulary>.h.j2`` and its companion ``bytes_..``. ``vnni``: byte
    products are one instruction. ``bf16``: so are products of bf16 pairs. ``amx``: matrix tiles of bf16.
    ``attention_rows``: heights of attention's tiles, falling, the last one 1. ``direct_rows``: rows up to which
    attention reads the KV cache without f32 copies; ``direct_heights`` (falling, the last one 1) x ``direct_panels``:
    its tiles then. ``chained_rows``: rows up to which whole-number sums are split in two to hide latency.
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

    def whole_numbers(self, weight_format: str) -> bool:
        """Whether weights of the format are multiplied as whole numbers (by single rows, that is)."""
        return weight_format in WHOLE_NUMBERS

    def gemm(self, weight_format: str) -> Gemm:
        """The family of tiles for many tokens: file ``gemm_<family>.h.j2``."""
        if self.amx and weight_format != "f32":
            return "amx"
        if weight_format in WHOLE_NUMBERS:
            return "int8"
        return "bf16" if self.bf16 and weight_format in _BF16 else "float"

    def family(self, weight_format: str) -> tuple[bool, Gemm]:
        """Formats of equal families share their loops over weights: what is tuned on one of them serves the others."""
        return self.whole_numbers(weight_format), self.gemm(weight_format)

    def tuning(self, weight_format: str) -> Tuning:
        """The constants where no profile holds better ones.

        prefetch_bytes: more than one core's share of bandwidth x latency (16 GB/s x 100 ns), because the hardware
        prefetcher starts anew in every 4 KB page. task_blocks: enough tokens to pay for fetching (AMX: for converting)
        the panels, few enough that there are many tasks.
        """
        many = 8 if self.whole_numbers(weight_format) else 4
        return Tuning(
            prefetch_bytes=4096,
            draw_bytes=256 << 10,
            task_blocks=16 if self.gemm(weight_format) == "amx" else 8,
            gemv_rows=2 if self.vocabulary == "avx2" else many,
        )

    def tile_rows(self, weight_format: str) -> int:
        """Tokens of a register tile.

        AVX-512 has 32 registers: 12 rows x 2 panels of sums take 24, four hold the weights of two k; with scales along
        k 12 rows of one panel have two sums each. AVX2 has 16 of half the width: 6 rows take 12, and with scales 3; of
        whole numbers 4, whose f32 sums wait in memory. AMX: two tiles of 16.
        """
        if self.gemm(weight_format) == "amx":
            return 32
        if self.vocabulary == "avx512":
            return 12
        return {"fp8": 3}.get(weight_format, 4 if weight_format in WHOLE_NUMBERS else 6)

    def tile_panels(self, weight_format: str) -> int:
        """Panels of 16 rows of a register tile of floats."""
        return 2 if self.vocabulary == "avx512" and weight_format != "fp8" else 1

    def block_row_bytes(self, columns: int, weight_format: str) -> int:
        """Bytes of one row of activations in a block, as ``gemm_<family>.h.j2`` lays them out."""
        family = self.gemm(weight_format)
        if family == "amx":
            return -(-columns // 32) * 64
        if family == "int8":
            return -(-columns // 32) * 40
        padded = columns if weight_format == "f32" else -(-columns // 2) * 2
        return padded * (2 if family == "bf16" else 4)

    def row_bytes(self, columns: int, weight_format: str) -> int:
        """Bytes of a row of activations for single rows, as ``activations_<family>.h.j2`` lays it out."""
        if weight_format in WHOLE_NUMBERS:
            return -(-(-(-columns // 32) * 40) // 64) * 64
        return -(-columns // 16) * 64

    def padded_rows(self, rows: int, weight_format: str) -> int:
        """Rows of all blocks together: blocks of equal height waste less than one row a block."""
        return rows + -(-rows // self.tile_rows(weight_format))


_AVX2 = CpuIsa("avx2", attention_rows=(6, 3, 1), direct_heights=(2, 1), direct_panels=2, chained_rows=1)
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

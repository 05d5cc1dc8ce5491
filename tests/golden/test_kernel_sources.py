"""The source of one linear kernel of every family of tiles; `pytest tests/golden --update-golden` makes the files.

What a change of a template does to the others shows here, also for instruction sets that no test machine has.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hetcomp.backends import packing
from hetcomp.backends.cpu import CpuBackend
from hetcomp.backends.cpu_isa import cpu_isa
from hetcomp.backends.protocol import Isa, KernelRequest
from hetcomp.ir.ops import Linear
from hetcomp.ir.plan import Op
from tests.reference.kernel_harness import activation, weight

KERNELS = Path(__file__).with_name("kernels")
# Odd: neither whole panels nor whole groups.
OUT, IN = 37, 75


@pytest.mark.parametrize(
    ("family", "isa", "weight_format"),
    [
        ("float", Isa.AVX2, "bf16"),
        ("int8", Isa.AVX512_VNNI, "q4"),
        ("int8", Isa.AVX2, "q4k"),
        ("int8", Isa.AVX512_VNNI, "q6k"),
        ("bf16", Isa.AVX512_BF16, "bf16"),
        ("amx_bf16", Isa.AMX_BF16, "q4"),
    ],
)
def test_linear(golden, family, isa, weight_format):
    assert cpu_isa(isa).gemms(weight_format)[-1] == family
    inputs = (activation("x", "T", IN), weight("w", (OUT, IN), weight_format, packing.PANELS))
    op = Op("op", Linear(IN, OUT), (), ())
    kernel = CpuBackend().emit(KernelRequest(op, inputs, (activation("y", "T", OUT),), isa, {"T": 64}))
    # The name ends in a hash of the source.
    stem = kernel.name.rpartition("_")[0]
    golden(KERNELS / f"{stem}.cpp", kernel.source.replace(kernel.name, stem))

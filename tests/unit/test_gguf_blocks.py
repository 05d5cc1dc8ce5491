"""Numbers of GGUF's block types: those of gguf-py's quants, but that ggml's e2m1 has no negative zero."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from hetcomp.frontend.gguf.block_types import BLOCK_TYPES
from hetcomp.frontend.gguf.blocks import QUANTISED, decode
from hetcomp.quantised_numbers import QuantisedNumbers

# Where blocks have f16 numbers; random bytes there would be NaN now and then.
_F16 = {"Q8_0": (0,), "Q4_0": (0,), "Q5_0": (0,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2)}
_F16 |= {"Q6_K": (208,), "MXFP4": ()}


def random_rows(kind: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Blocks of all codes and scales of all signs and sizes, as u8 [*shape, bytes of a row of 512]."""
    random = np.random.default_rng(seed)
    size, each = gguf.GGML_QUANT_SIZES[Type[kind]]
    count = int(np.prod(shape)) * 512 // size
    blocks = random.integers(0, 256, (count, each), np.uint8)
    for at in _F16[kind]:
        numbers = (random.normal(size=count) * 10.0 ** random.integers(-6, 3, count)).astype(np.float16)
        blocks[:, at : at + 2] = numbers[:, None].view(np.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = random.integers(0, 250, count)  # no NaN, nor infinite numbers
    return blocks.reshape(*shape, -1)


def test_sizes_are_those_of_gguf_py():
    assert {number: (kind.name, kind.size, kind.bytes) for number, kind in BLOCK_TYPES.items()} == {
        int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()
    }


@pytest.mark.parametrize("kind", QUANTISED)
def test_numbers_are_those_of_gguf_py(kind):
    rows = random_rows(kind, (3, 40))
    got = decode(kind, rows)
    exact = QUANTISED[kind].inexact == ""
    assert isinstance(got, QuantisedNumbers) == exact
    if isinstance(got, QuantisedNumbers):
        assert got.format == QUANTISED[kind].format
        got = got.to_f32()
    want = gguf.quants.dequantize(rows, Type[kind])
    assert got.shape == (3, 40, 512)
    np.testing.assert_array_equal(got, want)


def test_pieces_of_large_tensors_join(monkeypatch):
    monkeypatch.setattr("hetcomp.frontend.gguf.blocks._PIECE", 1024)
    rows = random_rows("Q5_1", (7, 3))
    np.testing.assert_array_equal(decode("Q5_1", rows), gguf.quants.dequantize(rows, Type.Q5_1))

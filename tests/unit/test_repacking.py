"""Codes and scales in panels, cut and turned, against the numbers that they stand for."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetcomp.backends import packing
from hetcomp.backends.cut_weights import CutReader
from hetcomp.backends.pack_weights import WeightPacker
from hetcomp.backends.repacking import repack
from hetcomp.errors import HetcompError
from hetcomp.frontend.gguf.blocks import decode
from hetcomp.ir.layouts import ORDERED_FORMATS, with_act_order
from hetcomp.ir.node_parts import Cut, cut_value
from hetcomp.ir.plan import Value, ValueKind
from hetcomp.ir.types import DType, TensorType
from hetcomp.quantised_numbers import BLOCK, GROUPS, K_SCALES, ZERO_POINTS, QuantisedNumbers, joined
from tests.unit.test_gguf_blocks import random_rows

FORMATS = ("q4", "q4z", "q8", "mxfp4", "fp8", "q4k", "q5k", "q6k")


def drawn(form: str, shape: tuple[int, ...], seed: int, rows_alike: int = 1) -> QuantisedNumbers:
    """Codes of all kinds but NaN. rows_alike: so many rows in turn have their scales in common."""
    rng = np.random.default_rng(seed)
    most = {"q8": 256, "fp8": 256, "q6k": 64, "q5k": 32}.get(form, 16)
    codes = rng.integers(0, most, shape).astype(np.uint8)
    if form == "fp8":
        codes[(codes & 127) == 127] = 0x80
    grid = (*shape[:-2], -(-shape[-2] // rows_alike), -(-shape[-1] // GROUPS[form]))
    if form in K_SCALES:
        scales = np.zeros(grid, K_SCALES[form])
        each = BLOCK // GROUPS[form]
        for field in K_SCALES[form].names or ():
            if field.startswith("d"):
                of_blocks = rng.standard_normal((*grid[:-1], -(-grid[-1] // each)))
                scales[field] = np.repeat(of_blocks, each, axis=-1)[..., : grid[-1]]
            else:
                scales[field] = rng.integers(0, 64, grid) if form != "q6k" else rng.integers(-128, 128, grid)
    elif form == "q4z":
        scales = np.zeros(grid, ZERO_POINTS)
        scales["scale"], scales["zero"] = rng.standard_normal(grid).astype(np.float16), rng.integers(0, 17, grid)
    elif form == "mxfp4":
        scales = rng.integers(90, 160, grid).astype(np.uint8)
    else:
        scales = rng.standard_normal(grid).astype(np.float16).astype(np.float32)
    return QuantisedNumbers(form, codes, np.repeat(scales, rows_alike, axis=-2)[..., : shape[-2], :])


def weight(form: str, shape: tuple[int, ...], layout: str) -> Value:
    return Value("w", TensorType(DType.F32, shape, layout), ValueKind.WEIGHT, fqn="m.w", format=form)


@settings(max_examples=80, deadline=None)
@given(
    form=st.sampled_from(FORMATS),
    layout=st.sampled_from([packing.PANELS, packing.PANELS_GLU]),
    experts=st.integers(1, 3),
    half=st.integers(1, 40),
    columns=st.integers(1, 300),
    seed=st.integers(0, 99),
)
def test_panels_hold_the_codes_and_scales(form, layout, experts, half, columns, seed):
    shape = (experts, 2 * half, columns)
    alike = 1 if form != "fp8" else half if layout == packing.PANELS_GLU else 16
    numbers, value = drawn(form, shape, seed, alike), weight(form, shape, layout)
    done = repack(numbers, value)
    assert done is not None
    assert done.finite
    assert done.exact
    np.testing.assert_array_equal(packing.unpack(done.data, value), numbers.to_f32())
    # The same bytes as the quantiser's padding: what lies beyond the matrix stands for zeros, but for minima and
    # zero points.
    panels = packing.unpack_panels(done.data, columns, form).reshape(
        experts, -1, 16, packing.padded_columns(columns, form)
    )
    assert form in ("q4z", "q4k", "q5k") or not panels[..., columns:].any()
    beyond = panels.reshape(experts, -1, packing.padded_columns(columns, form))
    if layout == packing.PANELS:
        assert not beyond[:, 2 * half :].any()


@settings(max_examples=40, deadline=None)
@given(
    form=st.sampled_from(ORDERED_FORMATS),
    layout=st.sampled_from([packing.PANELS, packing.PANELS_GLU]),
    half=st.integers(1, 20),
    groups=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_an_order_of_columns_lies_behind_each_matrix(form, layout, half, groups, seed):
    """Also of parts: rows and experts keep it, columns are numbers, for they are no runs of groups."""
    shape = (3, 2 * half, 32 * groups)
    rng, plain = np.random.default_rng(seed), drawn(form, shape, seed)
    order = np.stack([rng.permutation(shape[2]) for _ in range(3)]).astype(np.int32)
    numbers, value = replace(plain, order=order), weight(form, shape, with_act_order(layout))
    want = np.empty(shape, np.float32)
    np.put_along_axis(want, order[:, None].repeat(shape[1], 1), plain.to_f32(), axis=-1)
    np.testing.assert_array_equal(numbers.to_f32(), want)
    done = repack(numbers, value)
    assert done is not None
    np.testing.assert_array_equal(packing.unpack(done.data, value), want)
    assert repack(plain, value) is None
    assert repack(numbers, weight(form, shape, layout)) is None
    last = ((shape[2] - 32, shape[2]),)
    for axis, runs in ((0, ((0, 1), (2, 3))), (-2, ((half, 2 * half), (0, half))), (-1, last)):
        part = numbers.cut(axis, runs)
        assert isinstance(part, QuantisedNumbers) == (axis != -1)
        kept = np.concatenate([np.arange(shape[axis])[start:stop] for start, stop in runs])
        np.testing.assert_array_equal(_numbers(part), np.take(want, kept, axis=axis))
    for index in (0, 1):  # halves of one matrix; of two, whose orders differ
        both = joined([numbers[0].rows(np.arange(half)), numbers[index].rows(np.arange(half))])
        np.testing.assert_array_equal(_numbers(both), np.concatenate([want[0, :half], want[index, :half]]))


def _numbers(part: QuantisedNumbers | np.ndarray) -> np.ndarray:
    return part.to_f32() if isinstance(part, QuantisedNumbers) else part


def test_rows_of_a_panel_in_fp8_share_their_scales():
    numbers = drawn("fp8", (32, 200), 0, rows_alike=8)
    assert repack(numbers, weight("fp8", (32, 200), packing.PANELS)) is None
    # Halves of 24 rows: the second begins within the second panel of the whole.
    halves = drawn("fp8", (48, 200), 0, rows_alike=24)
    assert repack(halves, weight("fp8", (48, 200), packing.PANELS)) is None
    assert repack(halves, weight("fp8", (48, 200), packing.PANELS_GLU)) is not None


@pytest.mark.parametrize("form", K_SCALES)
def test_groups_of_a_block_share_their_numbers(form):
    value, numbers = weight(form, (16, 512), packing.PANELS), drawn(form, (16, 512), 0)
    for field in K_SCALES[form].names or ():
        scales = numbers.scales.copy()
        scales[field][3, 256 // GROUPS[form] + 1] += 1
        changed = repack(QuantisedNumbers(form, numbers.codes, scales), value)
        assert (changed is None) == field.startswith("d")
    scales = numbers.scales.copy()
    scales["d"] = np.inf
    done = repack(QuantisedNumbers(form, numbers.codes, scales), value)
    assert done is not None
    assert not done.finite
    with pytest.raises(HetcompError, match=f"Numbers cannot be packed as {form}: weight m.w"):
        packing.pack(numbers.to_f32(), value)


@pytest.mark.parametrize(("form", "kind"), [("q4k", "Q4_K"), ("q5k", "Q5_K"), ("q6k", "Q6_K")])
def test_panels_of_blocks_hold_what_the_file_holds(form, kind):
    rows = random_rows(kind, (3, 40))
    numbers, value = decode(kind, rows), weight(form, (3, 40, 512), packing.PANELS)
    assert isinstance(numbers, QuantisedNumbers)
    done = repack(numbers, value)
    assert done is not None
    want = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(packing.unpack(done.data, value), want)
    assert packing.packed_bytes(value) == 3 * 48 * 512 * {"q4k": 4.625, "q5k": 5.625, "q6k": 6.5625}[form] / 8


@pytest.mark.parametrize("form", ["q4", "q4z"])
def test_scales_that_fp16_rounds_or_cannot_hold_are_told(form):
    numbers, value = drawn(form, (16, 64), 0), weight(form, (16, 64), packing.PANELS)
    for scale, finite, exact in ((0.1, True, False), (2.0**-26, True, False), (7e4, False, False), (0.5, True, True)):
        scales = numbers.scales.copy()
        (scales["scale"] if form == "q4z" else scales)[3, 1] = scale
        done = repack(QuantisedNumbers(form, numbers.codes, scales), value)
        assert done is not None
        assert (done.finite, done.exact) == (finite, exact)


def test_codes_of_another_shape_or_format_are_refused():
    with pytest.raises(HetcompError, match=r"m\.w is q8 \[16, 64\], but its codes are q4 \[16, 64\]"):
        repack(drawn("q4", (16, 64), 0), weight("q8", (16, 64), packing.PANELS))
    with pytest.raises(HetcompError, match=r"\[16, 96\]"):
        repack(drawn("q4", (16, 64), 0), weight("q4", (16, 96), packing.PANELS))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("axis", "runs"),
    [(0, ((1, 2), (3, 4))), (-2, ((16, 32), (80, 96))), (-1, ((128, 300),)), (-1, ((64, 256),)), (-1, ((256, 300),))],
)
def test_cuts_are_those_of_the_numbers(form, axis, runs):
    numbers = drawn(form, (4, 96, 300), 1)
    cut = numbers.cut(axis, runs)
    want = np.concatenate([np.take(numbers.to_f32(), range(*run), axis) for run in runs], axis)
    np.testing.assert_array_equal(cut.to_f32() if isinstance(cut, QuantisedNumbers) else cut, want)
    whole = 128 if form == "fp8" else 256 if form in K_SCALES else 32
    assert isinstance(cut, QuantisedNumbers) == (axis != -1 or runs[0][0] % whole == 0)


def test_parts_of_experts_are_read_as_codes():
    whole, numbers = weight("q4", (4, 96, 128), packing.PANELS_GLU), drawn("q4", (4, 96, 128), 2)

    class Reader:
        def read(self, value: Value) -> QuantisedNumbers:
            return numbers

        def read_expert(self, value: Value, expert: int) -> QuantisedNumbers:
            return numbers[expert]

    cut = Cut(-2, ((16, 32), (64, 80)), experts=((1, 3),))
    part = cut_value(whole, cut, 1)
    reader = CutReader(Reader(), {part.id: (whole, cut)})
    want = numbers.to_f32()[1:3][:, [*range(16, 32), *range(64, 80)]]
    read = reader.read(part)
    assert isinstance(read, QuantisedNumbers)
    np.testing.assert_array_equal(read.to_f32(), want)
    expert = reader.read_expert(part, 1)
    assert isinstance(expert, QuantisedNumbers)
    np.testing.assert_array_equal(expert.to_f32(), want[1])


@pytest.mark.parametrize("form", K_SCALES)
def test_a_nodes_columns_of_blocks_are_taken_over(form):
    whole, numbers = weight(form, (2, 48, 768), packing.PANELS), drawn(form, (2, 48, 768), 7)

    class Reader:
        def read_expert(self, value: Value, expert: int) -> QuantisedNumbers:
            return numbers[expert]

    cut = Cut(-1, ((512, 768),))
    part = cut_value(whole, cut, 1)
    packer = WeightPacker(CutReader(Reader(), {part.id: (whole, cut)}))
    data = np.concatenate([chunk for _, chunk in packer.chunks([part])])
    np.testing.assert_array_equal(packing.unpack(data, part), numbers.to_f32()[:, :, 512:])


@pytest.mark.parametrize("form", FORMATS)
def test_transposes_keep_codes_only_where_blocks_stay_blocks(form):
    for alike, blocks in ((128, True), (1, False)):
        numbers = drawn(form, (2, 256, 130), 3, rows_alike=alike)
        turned = numbers.transposed()
        assert isinstance(turned, QuantisedNumbers) == (blocks and form not in K_SCALES)
        got = turned.to_f32() if isinstance(turned, QuantisedNumbers) else turned
        np.testing.assert_array_equal(got, np.swapaxes(numbers.to_f32(), -1, -2))


def test_four_bits_are_q8_exactly_and_nothing_else_is_anything_else():
    for form in ("q4", "q4z"):
        numbers = drawn(form, (2, 16, 64), 4)
        wider = numbers.in_format("q8")
        assert wider is not None
        np.testing.assert_array_equal(wider.to_f32(), numbers.to_f32())
        assert numbers.in_format("mxfp4") is None
        assert numbers.in_format("q4" if form == "q4z" else "q4z") is None
    assert drawn("q8", (16, 64), 4).in_format("q4") is None


def test_joined_codes_of_two_formats_are_numbers():
    first, second = drawn("q4", (16, 64), 5), drawn("q8", (16, 64), 6)
    both = joined([first, second])
    assert isinstance(both, np.ndarray)
    np.testing.assert_array_equal(both, np.concatenate([first.to_f32(), second.to_f32()]))

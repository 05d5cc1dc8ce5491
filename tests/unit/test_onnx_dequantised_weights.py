"""Weights behind DequantizeLinear: as onnxruntime's tool writes 4 bits, and in all other ways that ONNX has; the Plan,
interpreted, against onnxruntime."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from hetcomp import frontend
from hetcomp.errors import HetcompError
from hetcomp.frontend.onnx.dequantised_weights import Dequantised
from hetcomp.ir.plan import ValueKind
from hetcomp.quantised_numbers import QuantisedNumbers
from tests.reference import onnx_models, tiny_models

BOUNDS = {"context_length": 32, "max_batch": 1, "max_tokens": 32, "max_logit_rows": 32}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """An export with an opset that has types of 4 bits."""
    model = tiny_models.build("llama", **SIZES)
    return onnx_models.export(tmp_path_factory.mktemp("plain") / "m.onnx", model, opset=21)


def check(path: Path, label: str, form: str, exact: bool) -> None:
    got = frontend.load(path, **BOUNDS)
    found = set()
    for value in (v for v in got.plan.values if v.kind is ValueKind.WEIGHT):
        stored = got.checkpoint.source(value).tensors[0].quantised
        if stored is None:
            continue
        found.add((stored.label, stored.format, not stored.inexact or "f32" in stored.inexact))
    assert found == {(label, form, exact)}
    ids = [int(i) for i in range(3, 15)]
    want = onnx_models.reference_logits(path, ids, 5, as_written=True)
    assert onnx_models.relative_error(onnx_models.interpreted_logits(got, ids, 5), want) < 1e-5


@pytest.mark.parametrize(
    ("block", "symmetric", "label", "form", "exact"),
    [
        (32, True, "ONNX int4 (QDQ), blocks of 32", "q4", True),
        (32, False, "ONNX uint4 (QDQ), blocks of 32", "q8", True),
        (16, True, "ONNX int4 (QDQ), blocks of 16", "q8", False),
    ],
)
def test_what_onnxruntimes_tool_writes(block, symmetric, label, form, exact, plain, tmp_path):
    logging.getLogger("onnxruntime.quantization").setLevel(logging.ERROR)
    quantiser = MatMulNBitsQuantizer(
        onnx.load(plain), block_size=block, is_symmetric=symmetric, quant_format=QuantFormat.QDQ
    )
    quantiser.process()
    quantiser.model.save_model_to_file(str(tmp_path / "m.onnx"))
    check(tmp_path / "m.onnx", label, form, exact)


def dequantised(plain: Path, path: Path, kind: str, axis: int | None, block: int, zero: str) -> Path:
    """Every product's weight [K, N] in codes; zero: no zero points, the middle one for all, or others."""
    model = onnx.load(plain)
    graph = model.graph
    stored = {t.name: t for t in graph.initializer}
    bits, signed = int(kind.lstrip("uint")), not kind.startswith("u")
    low, middle = (-(1 << (bits - 1)), 0) if signed else (0, 1 << (bits - 1))
    dtype = getattr(TensorProto, kind.upper())
    for node in [n for n in graph.node if n.op_type == "MatMul" and n.input[1] in stored]:
        weight = numpy_helper.to_array(stored[node.input[1]])
        shape = [1, 1] if axis is None else [weight.shape[i] if block or i == axis else 1 for i in (0, 1)]
        if block:
            shape[axis] //= block
        spread = [-(-weight.shape[i] // shape[i]) for i in (0, 1)]
        rng = np.random.default_rng(3)
        scales = rng.uniform(0.01, 0.02, shape).astype(np.float16).astype(np.float32)
        points = np.full(shape, middle) if zero != "others" else rng.integers(middle - 3, middle + 4, shape)
        each, at = (np.kron(a, np.ones(spread)) for a in (scales, points))
        codes = np.clip(np.round(weight / each) + at, low, low + (1 << bits) - 1).astype(np.int64)
        flat = [] if axis is None else list(shape) if block else [shape[axis]]
        name = node.input[1]
        tensors = [
            helper.make_tensor(f"{name}.codes", dtype, codes.shape, codes.ravel()),
            helper.make_tensor(f"{name}.scales", TensorProto.FLOAT, flat, scales.ravel()),
            helper.make_tensor(f"{name}.points", dtype, flat, points.ravel()),
        ]
        tensors = tensors if zero != "none" else tensors[:2]
        graph.initializer.remove(stored[name])
        graph.initializer.extend(tensors)
        attributes = {"axis": axis or 0} | ({"block_size": block} if block else {})
        made = helper.make_node("DequantizeLinear", [t.name for t in tensors], [name], f"{name}/DQ", **attributes)
        graph.node.insert(0, made)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("kind", "axis", "block", "zero", "label", "form", "exact"),
    [
        ("int8", None, 0, "middle", "ONNX int8 (QDQ), a scale in all", "q8", True),
        ("uint8", 1, 0, "middle", "ONNX uint8 (QDQ), a scale a row", "q8", True),
        ("uint8", 1, 0, "others", "ONNX uint8 (QDQ), a scale a row", "q8", False),
        ("int8", 0, 0, "none", "ONNX int8 (QDQ), a scale a column", "q8", False),
        ("int8", 0, 32, "none", "ONNX int8 (QDQ), blocks of 32", "q8", True),
        ("int8", 1, 32, "none", "ONNX int8 (QDQ), blocks of 32 rows", "q8", False),
        ("uint4", 1, 0, "middle", "ONNX uint4 (QDQ), a scale a row", "q4", True),
        ("int4", 0, 32, "others", "ONNX int4 (QDQ), blocks of 32", "q8", True),
        ("int4", None, 0, "others", "ONNX int4 (QDQ), a scale in all", "q8", True),
    ],
)
def test_every_way_that_scales_lie(kind, axis, block, zero, label, form, exact, plain, tmp_path):
    check(dequantised(plain, tmp_path / "m.onnx", kind, axis, block, zero), label, form, exact)


def test_quantised_activations_are_refused(plain, tmp_path):
    logging.getLogger().setLevel(logging.ERROR)
    quantize_dynamic(str(plain), str(tmp_path / "m.onnx"), op_types_to_quantize=["MatMul"])
    with pytest.raises(HetcompError, match=r"\(DynamicQuantizeLinear\) computes with quantised activations"):
        frontend.load(tmp_path / "m.onnx", **BOUNDS)


def test_scales_of_another_shape_are_named(plain, tmp_path):
    path = dequantised(plain, tmp_path / "m.onnx", "int8", 1, 0, "none")
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name.endswith(".scales"))
    tensor.CopyFrom(numpy_helper.from_array(np.ones(5, np.float32), tensor.name))
    onnx.save(model, path)
    with pytest.raises(
        HetcompError, match=r"scales of type F32 and shape \[5\]; expected F32 or F16 or BF16 of shape \["
    ):
        frontend.load(path, **BOUNDS)


@pytest.mark.parametrize("dtype", ["U4", "I4", "U8", "I8"])
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize(("axis", "block"), [(-1, 0), (0, 0), (1, 0), (0, 32), (1, 32)])
@pytest.mark.parametrize("zero", [None, 0])
def test_rows_are_those_of_the_whole(dtype, turned, axis, block, zero):
    """zero: None: those of the file."""
    bytes_of, rng = (2 if dtype[1] == "4" else 1), np.random.default_rng(0)
    stored = (96, 320) if turned else (320, 96)
    matrix = Dequantised(stored, "c", "s", "z", axis, block, zero, turned)
    count = matrix._count()
    raw = rng.integers(0, 256, (2, stored[0] * stored[1] // bytes_of), np.uint8)
    parts = {"codes": raw[0], "scales": rng.normal(size=count).astype(np.float32)}
    parts |= {"zeros": raw[1][: -(-int(np.prod(count)) // bytes_of)]} if zero is None else {}
    assert matrix.has_rows(dtype, [0, 128, 256])
    pieces = [matrix.decode(parts, dtype, run) for run in ((0, 128), (128, 256), (256, 320))]
    for got, want in zip(pieces, np.split(numbers(matrix.decode(parts, dtype)), [128, 256]), strict=True):
        np.testing.assert_array_equal(numbers(got), want)
        assert type(got) is type(pieces[0])


def numbers(made: QuantisedNumbers | np.ndarray) -> np.ndarray:
    return made.to_f32() if isinstance(made, QuantisedNumbers) else made

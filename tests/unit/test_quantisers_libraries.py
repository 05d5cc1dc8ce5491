"""The numbers that tests/reference/quantised_checkpoints.py writes beside codes and scales are those that the
quantisers' own libraries take them for: our reader is compared with these numbers, bit for bit, in
test_quantised_checkpoints.py. FP8 and MXFP4 of transformers are taken from there by the writer itself."""

from __future__ import annotations

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.reference import quantised_checkpoints as made

PACKED, WHOLE, FLOAT = "pack-quantized", "int-quantized", "float-quantized"


def matrix(rows: int = 96, columns: int = 256) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


def decompressed(stored: made.Tensors, form: str, **weights: object) -> Tensor:
    """By compressed-tensors, which rounds products to the type of the scales: given in f32 there."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**({"symmetric": True} | weights))
    )
    compressor = compressors.BaseCompressor.get_value_from_registry(form)
    if stored["weight_scale"].is_floating_point():
        stored = stored | {"weight_scale": stored["weight_scale"].float()}
    return compressor.decompress(stored, scheme)["weight"].float()


def grouped(group: int) -> dict[str, object]:
    return {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 0])
def test_packed_whole_numbers_of_compressed_tensors(bits, symmetric, group):
    stored, numbers = made.packed_quantized(bits, group, symmetric)(matrix())
    how = {"num_bits": bits, "type": "int", "symmetric": symmetric, **grouped(group)}
    assert torch.equal(decompressed(stored, PACKED, **how), numbers)


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_int8_of_compressed_tensors(strategy):
    stored, numbers = made.int8(whole=strategy == "tensor")(matrix())
    assert torch.equal(decompressed(stored, WHOLE, num_bits=8, type="int", strategy=strategy), numbers)


@pytest.mark.parametrize(
    ("block", "how"),
    [
        (None, {"strategy": "tensor"}),
        ((1, 10**6), {"strategy": "channel"}),
        ((128, 128), {"strategy": "block", "block_structure": [128, 128]}),
    ],
    ids=["tensor", "channel", "blocks"],
)
def test_fp8_of_compressed_tensors(block, how):
    stored, numbers = made.fp8(block, torch.bfloat16, "weight_scale", flat=block is None)(matrix(300, 200))
    assert torch.equal(decompressed(stored, FLOAT, num_bits=8, type="float", **how), numbers)


def test_mxfp4_of_compressed_tensors():
    stored, numbers = made.mxfp4_packed(matrix())
    how = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    assert torch.equal(decompressed(stored, "mxfp4-pack-quantized", **how), numbers)


@pytest.mark.parametrize("group", [32, 128])
def test_awq_by_the_converter_of_compressed_tensors(group):
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters")
    stored, numbers = made.awq(group)(matrix())
    converter = converters.AutoAWQConverter(group_size=group)
    unpacked = converter.process({f"model.q_proj.{end}": part for end, part in stored.items()})
    by_end = {name.removeprefix("model.q_proj."): part for name, part in unpacked.items()}
    how = {"num_bits": 4, "type": "int", "symmetric": False, **grouped(group)}
    assert torch.equal(decompressed(by_end, PACKED, **how), numbers)


@pytest.fixture(scope="module")
def auto_gptq() -> ModuleType:
    """AutoGPTQ's layer, from its file: the package's other modules need a transformers of its time."""
    package = find_spec("auto_gptq")
    if package is None or package.origin is None:
        pytest.skip("auto-gptq is not installed (make test-packages)")
    file = Path(package.origin).parent / "nn_modules" / "qlinear" / "qlinear_cuda.py"
    spec = spec_from_file_location("auto_gptq_layer", file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group", [32, 0])
def test_gptq_by_the_layer_of_auto_gptq(auto_gptq, bits, symmetric, act_order, group):
    """What it computes of unit vectors: each sum has one product that is not zero."""
    weight = matrix()
    stored, numbers = made.gptq(bits, group, symmetric, act_order)(weight)
    layer = auto_gptq.QuantLinear(bits, group or -1, weight.shape[1], weight.shape[0], False)
    layer.load_state_dict(stored | {"scales": stored["scales"].float()}, assign=True)
    assert torch.equal(layer(torch.eye(weight.shape[1])).T, numbers)

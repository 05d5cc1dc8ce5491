"""Reads .onnx files: checked by onnx.checker, with weights known by where they lie."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx.inliner
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from hetcomp.errors import HetcompError
from hetcomp.frontend.checkpoint import read_tensor
from hetcomp.frontend.onnx.decimals import decimal
from hetcomp.frontend.onnx.external_data import locate
from hetcomp.frontend.onnx.graph import Attributes, Branch, Graph, Input, Node, scope_of
from hetcomp.frontend.onnx.inline_data import Place, without_data
from hetcomp.ir.plan import CheckpointTensor

# Element types by ONNX's number: the name in CheckpointTensor, numpy's. bf16 is read as its bits.
_TYPES = {
    onnx.TensorProto.FLOAT: ("F32", "<f4"),
    onnx.TensorProto.FLOAT16: ("F16", "<f2"),
    onnx.TensorProto.BFLOAT16: ("BF16", "<u2"),
    onnx.TensorProto.DOUBLE: ("F64", "<f8"),
    onnx.TensorProto.UINT8: ("U8", "u1"),
    onnx.TensorProto.INT8: ("I8", "i1"),
    onnx.TensorProto.INT32: ("I32", "<i4"),
    onnx.TensorProto.INT64: ("I64", "<i8"),
    onnx.TensorProto.BOOL: ("BOOL", "?"),
    # Two in a byte, which is how they are read.
    onnx.TensorProto.UINT4: ("U4", "u1"),
    onnx.TensorProto.INT4: ("I4", "u1"),
}
_HALF_BYTES = ("U4", "I4")
DTYPES = {name: np.dtype(code) for name, code in _TYPES.values()}
_MICROSOFT = "com.microsoft"
INLINE = ""  # of CheckpointTensor.file: the numbers are in memory


@dataclass(frozen=True)
class OnnxFile:
    """``path``: the file that was given. ``inline``: the bytes of small tensors. ``metadata``: of the
    model, as its exporter wrote it."""

    path: Path
    graph: Graph
    inline: Mapping[str, bytes]
    metadata: Mapping[str, str]

    @property
    def name(self) -> str:
        """The file's, or the folder's where exporters call every file the same."""
        return self.path.resolve().parent.name if self.path.stem in ("model", "decoder_model") else self.path.stem

    def numbers(self, tensor: CheckpointTensor, row: int | None = None) -> npt.NDArray[np.generic]:
        """The tensor, or its part ``row`` along the first axis, in its own type; one of 4 bits as its bytes. Raises
        HetcompError if it cannot be read."""
        dtype = DTYPES[tensor.dtype]
        if tensor.dtype in _HALF_BYTES:
            assert row is None
            tensor = replace(tensor, shape=(tensor.bytes,))
        shape = tensor.shape if row is None else tensor.shape[1:]
        count = math.prod(shape)
        start = (row or 0) * count * dtype.itemsize
        if tensor.file == INLINE:
            data = np.frombuffer(self.inline[tensor.name], dtype, count, tensor.offset + start)
        else:
            data = read_tensor(self.path.parent / tensor.file, tensor.name, tensor.offset + start, dtype, count)
        return data.reshape(shape)


def open_model(path: Path) -> OnnxFile:
    """The graph of a file; no external data is read. Raises HetcompError naming what is damaged, missing or of a kind
    that hetcomp does not read."""
    try:
        stripped, places = without_data(path)
        model = onnx.load_from_string(stripped)
    except (OSError, DecodeError, ValueError) as error:
        raise HetcompError(f"{path} is no ONNX file that can be read: {_line(error)}") from error
    inline: dict[str, bytes] = {}
    tensors = {t.name: _described(t, path, places, inline) for t in model.graph.initializer}
    try:
        model = _checked(model)
    except Exception as error:  # the checker's own, which have no common class
        raise HetcompError(f"{path} is no valid ONNX model: {_line(error)}") from error
    if model.graph.sparse_initializer:
        raise HetcompError(f"{path} has sparse tensors, which hetcomp does not read")
    nodes = tuple(_node(n) for n in model.graph.node)
    inputs = {i.name: _input(i) for i in model.graph.input if i.name not in tensors}
    # The logits come first in every exporter's files, but nothing says that they must.
    outputs = sorted((o.name for o in model.graph.output), key=lambda name: name != "logits")
    graph = Graph(nodes, inputs, tuple(outputs), tensors)
    return OnnxFile(path, graph, inline, {p.key: p.value for p in model.metadata_props})


def _checked(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model after onnx.checker, its local functions inlined. Its tensors are known already; they become empty ones,
    which neither the checker nor the inliner copies. onnxruntime's norm stands in ONNX's own domain in its files, where
    the checker does not know it. Raises what the checker raises."""
    for tensor in model.graph.initializer:
        kind, name = tensor.data_type, tensor.name
        tensor.Clear()
        tensor.data_type, tensor.name, tensor.raw_data = kind, name, b""
        tensor.dims.append(0)
    for node in model.graph.node:
        if node.op_type == "SimplifiedLayerNormalization" and node.domain == "":
            node.domain = _MICROSOFT
    if all(opset.domain != _MICROSOFT for opset in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(_MICROSOFT, 1))
    onnx.checker.check_model(model)
    return onnx.inliner.inline_local_functions(model) if model.functions else model


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _described(
    tensor: onnx.TensorProto, path: Path, places: Mapping[str, Place], inline: dict[str, bytes]
) -> CheckpointTensor:
    """What is known of a tensor; its bytes go to ``inline`` if they are in neither a place of the file nor another
    one."""
    found = _TYPES.get(tensor.data_type)
    if found is None:
        kinds = onnx.TensorProto.DataType
        name = kinds.Name(tensor.data_type) if tensor.data_type in kinds.values() else str(tensor.data_type)
        raise HetcompError(f"{path}: tensor {tensor.name} has the type {name}; expected {', '.join(DTYPES)}")
    dtype, shape = found[0], tuple(tensor.dims)
    if any(d < 0 for d in shape):
        raise HetcompError(f"{path}: tensor {tensor.name} has the shape {list(shape)}")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if dtype in _HALF_BYTES:
        size = -(-size // 2)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        file, offset = locate(tensor, path, size)
        return CheckpointTensor(file, tensor.name, dtype, shape, offset, size)
    place = places.get(tensor.name)
    data = b""
    if place is None:
        data = tensor.raw_data if tensor.HasField("raw_data") else _numbers(tensor, path)
    found_size = len(data) if place is None else place.size
    if found_size != size:
        raise HetcompError(
            f"{path}: tensor {tensor.name} has {found_size} bytes; expected {size} by its type and the shape "
            f"{list(shape)}"
        )
    if place is not None:
        return CheckpointTensor(path.name, tensor.name, dtype, shape, place.offset, size)
    inline[tensor.name] = data
    return CheckpointTensor(INLINE, tensor.name, dtype, shape, 0, size)


def _numbers(tensor: onnx.TensorProto, path: Path) -> bytes:
    try:
        if tensor.data_type in (onnx.TensorProto.UINT4, onnx.TensorProto.INT4):
            return bytes(np.array(tensor.int32_data, np.uint8).tobytes())  # a byte of two each
        return bytes(numpy_helper.to_array(tensor).tobytes())
    except Exception as error:  # numpy's of many kinds
        raise HetcompError(f"{path}: tensor {tensor.name} cannot be read: {_line(error)}") from error


def _node(node: onnx.NodeProto) -> Node:
    metadata = {_text(p.key): _text(p.value) for p in node.metadata_props}
    own = node.domain in ("", "ai.onnx")
    return Node(
        _text(node.name),
        _text(node.op_type if own else f"{node.domain}.{node.op_type}"),
        tuple(map(_text, node.input)),
        tuple(map(_text, node.output)),
        Attributes({a.name: _attribute(a) for a in node.attribute}),
        scope_of(_text(node.name), metadata),
    )


def _text(value: str | bytes) -> str:
    """Texts that are not UTF-8 come as bytes."""
    return value if isinstance(value, str) else value.decode("utf-8", errors="replace")


def _attribute(attribute: onnx.AttributeProto) -> object:
    """Its value. A float is the decimal that it was written as."""
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, onnx.GraphProto):
        return _branch(value)
    if isinstance(value, onnx.TensorProto):
        array = numpy_helper.to_array(value)
        # A number with more digits than an attribute's float32 holds, as hetcomp exports it.
        return float(array) if array.ndim == 0 and array.dtype == np.float64 else array
    return decimal(value) if isinstance(value, float) else value


def _branch(graph: onnx.GraphProto) -> Branch:
    """Tensors of a branch become constants; exporters leave large ones to the graph around it."""
    constants = [
        Node(t.name, "Constant", (), (t.name,), Attributes(value=numpy_helper.to_array(t))) for t in graph.initializer
    ]
    return Branch((*constants, *map(_node, graph.node)), tuple(o.name for o in graph.output))


def _input(value: onnx.ValueInfoProto) -> Input:
    of_tensor = value.type.tensor_type
    dtype = _TYPES.get(of_tensor.elem_type, ("other", ""))[0]
    dims = (d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in of_tensor.shape.dim)
    return Input(value.name, dtype, tuple(dims))

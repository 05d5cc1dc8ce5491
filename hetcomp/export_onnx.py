"""Writes a traced model as an ONNX file, which hetcomp compiles to the same plan without transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO

import numpy as np
import onnx
from torch import nn

from hetcomp import frontend
from hetcomp.artifact.staged_file import write_whole
from hetcomp.backends.packing import to_f32
from hetcomp.errors import HetcompError
from hetcomp.frontend.checkpoint import BaseCheckpoint
from hetcomp.frontend.folder_checkpoint import FolderCheckpoint
from hetcomp.frontend.onnx.export_graph import GraphExport, model_of
from hetcomp.frontend.onnx.model_facts import CONFIG_KEY, MODEL_KEY
from hetcomp.ir.plan import Value, ValueKind
from hetcomp.ir.types import DType, TensorType
from hetcomp.progress import ProgressSink, QuietProgress
from hetcomp.quantised_numbers import QuantisedNumbers

_TYPES = {"F32": onnx.TensorProto.FLOAT, "F16": onnx.TensorProto.FLOAT16, "BF16": onnx.TensorProto.BFLOAT16}
_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
# What a tokenizer and a chat template are made of.
_WORDS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
          "chat_template.json", "generation_config.json")  # fmt: skip
_ALIGNMENT = 4096  # of external data, for those that map it


def export_onnx(model: str | Path | nn.Module, out: str | Path, *, progress: ProgressSink | None = None) -> Path:
    """Writes ``model`` (a folder with unquantised safetensors, or a transformers module) to ``out``, an .onnx file:
    attention, KV cache, norms, rotary embeddings, routers and experts as ops of the domain ``hetcomp``, all else as
    ONNX's own. Weights go to ``out`` + ``.data`` beside it, but in the folder of the checkpoint itself those that are
    stored as they are used are referred to. The files of the tokenizer are copied beside it. Returns ``out``.

    Raises HetcompError, with nothing left, if the model has no weights or quantised ones, if something in it is not
    exported, or if a file is there already or cannot be written."""
    progress = progress or QuietProgress()
    target = Path(out)
    if target.suffix != ".onnx":
        raise HetcompError(f"{target} is to be an ONNX file; give a name that ends in .onnx")
    data = target.with_name(f"{target.name}.data")
    for path in (target, data):
        if path.exists():
            raise HetcompError(f"{path} is there already; remove it, or give another name")
    progress.stage("trace")
    given = frontend.find(model)
    if given.gguf is not None or given.onnx is not None:
        raise HetcompError(f"{model} is a GGUF or ONNX file; give the folder of the checkpoint that it was made from")
    traced, checkpoint = given.trace(given.info.max_positions)
    if checkpoint is None or checkpoint.quantised:
        what = "no weights" if checkpoint is None else "quantised weights"
        raise HetcompError(f"{given.info.name} has {what}; give the folder of an unquantised checkpoint")
    export = GraphExport(traced, given.config)
    graph = export.build()
    metadata = {MODEL_KEY: json.dumps(asdict(given.info)), CONFIG_KEY: json.dumps(given.raw, default=str)}
    values = [Value(n, TensorType(DType.F32, s), ValueKind.WEIGHT, fqn=n) for n, s in export.weights.items()]
    progress.stage("weights", total=len(values))
    with _data_file(data) as file:
        for value in values:
            graph.initializer.append(_initialiser(value, checkpoint, target, data, file))
            progress.advance(1, value.id)
        # Last, so that a graph is there with all its data or not at all.
        write_whole(target, model_of(graph, metadata).SerializeToString())
    _copy_words(given.folder, target.parent)
    return target


@contextmanager
def _data_file(path: Path) -> Iterator[IO[bytes]]:
    """The file, open for writing; removed again if that fails, or if nothing was written. Raises HetcompError naming
    it."""
    kept = False
    try:
        with path.open("xb") as file:
            yield file
            kept = file.tell() > 0
    except OSError as error:
        kept = False
        raise HetcompError(f"{path} cannot be written: {error.strerror or error}.") from None
    finally:
        if not kept:
            path.unlink(missing_ok=True)


def _initialiser(
    value: Value, checkpoint: BaseCheckpoint, target: Path, data: Path, file: IO[bytes]
) -> onnx.TensorProto:
    """The tensor of a weight: where the checkpoint has it, or appended to ``file``, a matrix of experts at a time."""
    source = checkpoint.source(value)
    shape = [int(d) for d in value.type.shape]
    kinds = {t.dtype for t in source.tensors}
    kind = kinds.pop() if len(kinds) == 1 else "F32"
    kind = kind if kind in _TYPES else "F32"
    size = int(np.prod(shape)) * _SIZES[kind]
    first = source.tensors[0]
    here = isinstance(checkpoint, FolderCheckpoint) and Path(checkpoint.origin).resolve() == target.parent.resolve()
    if here and source.recipe == "plain" and first.dtype == kind:
        return _external(value.id, kind, shape, {"location": first.file, "offset": first.offset, "length": size})
    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
    start = file.tell()
    stacked = source.recipe in ("stack", "stack_pair")
    for part in range(shape[0]) if stacked else (None,):
        numbers = checkpoint.read(value) if part is None else checkpoint.read_expert(value, part)
        assert not isinstance(numbers, QuantisedNumbers)
        if kind == "F32":
            numbers = to_f32(numbers)
        file.write(np.ascontiguousarray(numbers).data)
    return _external(value.id, kind, shape, {"location": data.name, "offset": start, "length": size})


def _external(name: str, kind: str, shape: list[int], facts: Mapping[str, object]) -> onnx.TensorProto:
    made = onnx.TensorProto(name=name, data_type=_TYPES[kind], dims=shape)
    made.data_location = onnx.TensorProto.EXTERNAL
    for key, fact in facts.items():
        entry = made.external_data.add()
        entry.key, entry.value = key, str(fact)
    return made


def _copy_words(folder: Path | None, target: Path) -> None:
    """The files of the tokenizer, where ``target`` has none of that name."""
    if folder is None or folder.resolve() == target.resolve():
        return
    for name in _WORDS:
        if (folder / name).is_file() and not (target / name).exists():
            shutil.copyfile(folder / name, target / name)

"""A hybrid artifact written by hand: Triton kernels on a GPU, one hand-over, three lines of C++ on the CPU.

logits of a token = rms_norm(embed[id] + 3 * embed[id]) . head, the 3 by the CPU (tripled_program.cpp).
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

import hetcomp.backends.gpu.compile_kernels as compiler
from hetcomp import installed_runtime
from hetcomp.backends import packing
from hetcomp.backends.gpu.kernels import GpuKernel, GpuRequest, Operand
from hetcomp.backends.gpu.triton_backend import TritonBackend
from hetcomp.backends.gpu.write_kernels import write_kernels
from hetcomp.ir import ops
from hetcomp.ir.plan import Op, Value, ValueKind
from hetcomp.ir.types import DType, TensorType
from tests.reference.kernel_harness import activation, weight

VOCAB, WIDTH, CONTEXT, MAX_TOKENS, LOGIT_ROWS = 40, 24, 32, 6, 4
_EPS = 1e-5
_FLOATS = 4
_PLAN = "{}"
_SHAPES = {"embed": (VOCAB, WIDTH), "norm": (WIDTH,), "head": (VOCAB, WIDTH)}


class HybridModel:
    """The numpy side of the artifact."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in _SHAPES.items()}

    def logits(self, ids: Sequence[int]) -> NDArray[np.float64]:
        """Float64 [T, vocab]."""
        x = 4 * self.weights["embed"][list(ids)].astype(np.float64)
        y = x / np.sqrt((x * x).mean(1, keepdims=True) + _EPS) * self.weights["norm"]
        return y @ self.weights["head"].astype(np.float64).T


def _values() -> dict[str, Value]:
    values = [
        Value("ids", TensorType(DType.I32, ("T",)), ValueKind.INPUT),
        *(activation(name, "T", WIDTH) for name in ("x", "y", "sum", "normed")),
        activation("last", "R", WIDTH),
        activation("logits", "R", VOCAB),
        activation("norm", WIDTH),
        *(weight(name, (VOCAB, WIDTH), "f32", packing.PANELS) for name in ("embed", "head")),
    ]
    return {value.id: value for value in values}


def _nodes(rows: int | None, kernels: list[GpuKernel]) -> list[dict[str, Any]]:
    """A step's graph; its kernels are added to ``kernels``."""
    values = _values()
    nodes: list[dict[str, Any]] = []

    def append(node: dict[str, Any]) -> None:
        nodes.append({**node, "after": [len(nodes) - 1] if nodes else []})

    def add(attrs: ops.Attrs, inputs: Sequence[str], output: str) -> None:
        op = Op(output, attrs, tuple(inputs), (output,))
        dims = {"T": MAX_TOKENS, "R": LOGIT_ROWS}
        request = GpuRequest(op, tuple(values[v] for v in inputs), (values[output],), dims, rows)
        code = TritonBackend().emit(request)
        assert code.workspace_bytes == 0

        def argument(operand: Operand) -> dict[str, Any]:
            names = {"input": inputs, "output": [output], "step": [operand.name]}
            return {"buffer": names[operand.source][operand.index], "offset": operand.offset}

        for launch in code.launches:
            kernels.append(launch.kernel)
            grid = [axis.programs(rows or request.max_rows()) for axis in launch.grid]
            arguments = [argument(operand) for operand in launch.operands]
            append({"kernel": launch.kernel.name, "grid": grid, "arguments": arguments})

    add(ops.Embed(VOCAB, WIDTH), ["ids", "embed"], "x")
    append({"hand_over": {"flag": 0, "from": "gpu:0", "to": "cpu"}})
    append({"hand_over": {"flag": 0, "from": "cpu", "to": "gpu:0"}})
    add(ops.Add(), ["x", "y"], "sum")
    add(ops.RmsNorm(WIDTH, _EPS), ["sum", "norm"], "normed")
    add(ops.SelectRows(), ["normed"], "last")
    add(ops.Linear(WIDTH, VOCAB), ["last", "head"], "logits")
    return nodes


def _buffers(folder: Path, model: HybridModel) -> list[dict[str, Any]]:
    """The buffers of program.json; writes the file of their weights."""
    rows, kinds = MAX_TOKENS * WIDTH * _FLOATS, {"x": "pinned_out", "y": "pinned_in"}
    buffers = [{"name": n, "bytes": rows, "kind": kinds.get(n, "arena")} for n in ("x", "y", "sum", "normed", "last")]
    buffers.append({"name": "logits", "bytes": LOGIT_ROWS * VOCAB * _FLOATS, "kind": "result"})
    counts = {"ids": MAX_TOKENS, "logit_rows": LOGIT_ROWS, "rows": 1, "logit_row_count": 1}
    buffers += [{"name": name, "bytes": 4 * count, "kind": "step"} for name, count in counts.items()]
    file, data = "gpu-weights-00001.safetensors", b""
    for name, array in model.weights.items():
        packed = packing.pack(array, _values()[name])[0].tobytes()
        hash_value = xxhash.xxh3_64_hexdigest(packed)
        piece = {"file": file, "offset": len(data), "bytes": len(packed), "to": 0, "xxh3_64": hash_value}
        buffers.append({"name": name, "bytes": len(packed), "kind": "weight", "sources": [piece]})
        data += packed
    (folder / file).write_bytes(data)
    return buffers


def _build_cpu_program(target: Path) -> None:
    source = Path(__file__).with_name("tripled_program.cpp")
    digest = hashlib.sha256(_PLAN.encode()).hexdigest()
    sizes = {"WIDTH": WIDTH, "TOKENS": MAX_TOKENS, "LOGIT_ROWS": LOGIT_ROWS, "VOCAB": VOCAB}
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{installed_runtime.include()}"]
    command += [f"-DFAKE_{name}={size}" for name, size in sizes.items()]
    command.append(f'-DFAKE_PLAN_HASH="{digest}"')
    subprocess.run([*command, str(source), "-o", str(target)], check=True)


def write_hybrid_artifact(folder: Path, model: HybridModel, batches: Sequence[int]) -> None:
    """Writes the artifact with exact graphs of these batch sizes, and one for any number of rows."""
    for name in ("kernels", "gpu"):
        (folder / name).mkdir(parents=True)
    _build_cpu_program(folder / "kernels" / "lib.so")
    kernels: list[GpuKernel] = []
    graphs = [{"batch": rows, "exact": True, "nodes": _nodes(rows, kernels)} for rows in batches]
    graphs.append({"batch": MAX_TOKENS, "exact": False, "nodes": _nodes(None, kernels)})
    buffers = _buffers(folder, model)
    head = {"schema": [5, 0], "device": "gpu:0", "device_bytes": 1 << 20, "flags": 1}
    program = {**head, "buffers": buffers, "graphs": graphs}
    (folder / "gpu" / "program.json").write_text(json.dumps(program))
    write_kernels(compiler.compile_kernels(kernels, (90,), threads=1), folder / "gpu")
    (folder / "plan.json").write_text(_PLAN)
    _write_manifest(folder)


def _write_manifest(folder: Path) -> None:
    names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]

    def facts(name: str) -> dict[str, Any]:
        data = (folder / name).read_bytes()
        hashed = {} if name.endswith(".safetensors") else {"sha256": hashlib.sha256(data).hexdigest()}
        return {"bytes": len(data), **hashed}

    manifest = {
        "schema": [1, 0],
        "model": {
            "name": "hybrid",
            "architecture": "Fake",
            "vocab": VOCAB,
            "context": CONTEXT,
            "max_batch": 4,
            "max_tokens": MAX_TOKENS,
            "max_logit_rows": LOGIT_ROWS,
            "eos_token_ids": [2],
            "bos_token_id": None,
        },
        "files": {name: facts(name) for name in names},
        "programs": [{"isa": "avx2", "file": "kernels/lib.so"}],
        "weights": [],
        "states": [],
        "timers": [],
        "tokenizer": None,
        "chat_template": None,
        "gpus": [{"device": "gpu:0", "program": "gpu/program.json", "weight_files": ["gpu-weights-00001.safetensors"]}],
        "pinned": ["x", "y"],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))

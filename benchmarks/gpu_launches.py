"""Times the GPU backend's launches, one by one, for a layer of Qwen3-30B-A3B's shape: of prefill, or with --exact of
steps of so many rows.

    python -m benchmarks.gpu_launches FOLDER [--rows 64 512 4096] [--exact] [--kv fp8] [--only WORD ..]
        [--formats q4 q4k+q6k q4:order]
    python3 FOLDER/gpu_launches.py FOLDER

The first writes a folder, on any machine: launches in cases.json, and their kernels compiled for compute capability 90.
The second needs an H100 or H200, the driver, PyTorch and nothing of hetcomp. It prints the microseconds of each group
of ops and of its launches (a CUDA graph of 20; weights in copies that the cache does not hold), registers of a thread,
TFLOP/s, GB/s of weights, and how far its results are from those of the first variant of the case (Describer.add).
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import shutil
import sys
import zlib
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hetcomp.backends.gpu.groups import GpuGroup
    from hetcomp.backends.gpu.kernels import GpuCode, Operand
    from hetcomp.ir.ops import Attrs
    from hetcomp.ir.plan import Value
    from hetcomp.ir.types import TensorType

_REPEATS = 20  # launches of a graph
_COLD_BYTES = 150 << 20  # of copies of a weight: three times the L2 cache of an H100
_CC = 90
_EXPERTS = 128
_LAYERS = 48  # whose rows share the KV cache's blocks
_Json = dict[str, Any]
_Tensor = Any  # of PyTorch, which is not installed here


# The second machine's half: no hetcomp.


class Device:
    """Buffers with valid contents, kernels and times on the first GPU."""

    def __init__(self) -> None:
        self.torch = import_module("torch")
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.torch.zeros(1, device="cuda")
        self._scratch: _Tensor = None

    def call(self, name: str, *arguments: object) -> None:
        code = getattr(self.cuda, name)(*arguments)
        if code != 0:
            text = ctypes.c_char_p()
            self.cuda.cuGetErrorName(code, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'?').decode()}")

    def load(self, made: _Json) -> tuple[ctypes.c_void_p, str]:
        """The function, and its registers and bytes of local memory."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), made["cubin"])
        self.call("cuModuleGetFunction", ctypes.byref(function), module, made["entry"].encode())
        if made["shared"] > 48 * 1024:
            self.call("cuFuncSetAttribute", function, 8, made["shared"])  # MAX_DYNAMIC_SHARED_SIZE_BYTES
        facts = []
        for attribute in (4, 3):  # NUM_REGS, LOCAL_SIZE_BYTES
            number = ctypes.c_int()
            self.call("cuFuncGetAttribute", ctypes.byref(number), attribute, function)
            facts.append(number.value)
        return function, f"{facts[0]}r" + (f" {facts[1]} spilled" if facts[1] else "")

    def fill(self, name: str, spec: list[Any]) -> _Tensor:
        """A buffer, the same for the same name and spec."""
        torch, (kind, count, *more) = self.torch, spec
        stem = name.removesuffix(" bf16")
        random = torch.Generator("cuda").manual_seed(zlib.crc32(stem.encode()))
        if kind in ("f32", "bf16"):
            numbers = torch.randn(count, device="cuda", generator=random)
            return numbers.bfloat16() if kind == "bf16" else numbers
        if kind == "bytes":
            return torch.full((max(count, 1),), 255, dtype=torch.uint8, device="cuda")
        if kind == "groups":  # groups of bytes, each with fp16 scales behind its codes
            size = more[0]
            data = torch.randint(0, 256, (count // size, size), device="cuda", generator=random, dtype=torch.uint8)
            scales = (torch.rand(count // size, 16, device="cuda", generator=random) * 0.01 + 0.005).half()
            data[:, size - 32 :] = scales.view(torch.uint8)
            return data
        if kind == "ordered":  # groups, and behind the panels of each matrix an order of its columns
            size, matrices, columns = more
            panels = self.fill(name, ["groups", count - 4 * matrices * columns, size]).view(matrices, -1)
            orders = torch.rand(matrices, columns, device="cuda", generator=random).argsort(dim=1).int()
            return torch.cat([panels, orders.view(torch.uint8)], dim=1)
        if kind == "codes":  # bytes of which none is NaN as e4m3 or fp16
            return torch.randint(0, 120, (count,), device="cuda", generator=random, dtype=torch.uint8)
        if kind == "ids":
            rows, (choices, experts) = count, more
            scores = torch.rand(rows, experts, device="cuda", generator=random)
            return scores.topk(choices, dim=1).indices.int().contiguous()
        if kind == "range":
            return torch.arange(more[0], more[0] + count, device="cuda", dtype=torch.int32)
        assert kind == "constant", kind
        return torch.full((count,), more[0], dtype=torch.int32, device="cuda")

    def scratch(self, size: int) -> int:
        """The address of ``size`` bytes that every kernel may use."""
        if self._scratch is None or self._scratch.nbytes < size:
            assert not self.torch.cuda.is_current_stream_capturing(), "a launch outside of a graph comes first"
            self._scratch = self.torch.empty(size, dtype=self.torch.uint8, device="cuda")
        return int(self._scratch.data_ptr())

    def microseconds(
        self, functions: list[Any], launches: list[_Json], copies: list[dict[str, Any]], repeats: int = _REPEATS
    ) -> float:
        """Of the launches one after the other, on one copy of the buffers after the other."""
        torch, graph = self.torch, self.torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(repeats):
                for function, launch in zip(functions, launches, strict=True):
                    self.launch(function, launch, copies[i % len(copies)])
        graph.replay()
        times = []
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / repeats)
        return float(sorted(times)[2])

    def launch(self, function: ctypes.c_void_p, launch: _Json, buffers: dict[str, Any]) -> None:
        values: list[Any] = [
            ctypes.c_int32(a["i32"]) if "i32" in a else ctypes.c_uint64(buffers[a["buffer"]].data_ptr() + a["offset"])
            for a in launch["arguments"]
        ]
        # Scratch memory of all programs (tensor copies' descriptors), and none for profiling.
        scratch = self.scratch(launch["made"]["scratch"] * math.prod(launch["grid"]))
        values += [ctypes.c_uint64(scratch), ctypes.c_uint64(0)]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        stream = ctypes.c_void_p(self.torch.cuda.current_stream().cuda_stream)
        made = launch["made"]
        self.call(
            "cuLaunchKernel", function, *launch["grid"], made["threads"], 1, 1, made["shared"], stream, pointers, None
        )

    def run(self, case: _Json, first: dict[str, Any]) -> None:
        """Prints a case's figures; ``first``: results of each case's first variant, by case."""
        torch = self.torch
        buffers = {name: self.fill(name, spec) for name, spec in case["buffers"].items()}
        loaded = [self.load(launch["made"]) for launch in case["launches"]]
        functions = [function for function, _ in loaded]
        for function, launch in zip(functions, case["launches"], strict=True):
            self.launch(function, launch, buffers)
        torch.cuda.synchronize()
        wanted = first.setdefault(case["name"], {})
        errors = []
        for name, kind in case["outputs"].items():
            got = buffers[name].view(getattr(torch, kind)).float().clone()
            want = wanted.setdefault(name, got)
            errors.append(((got - want).norm() / want.norm()).item())
        weights = [n for n in buffers if n.endswith(".w") or n in ("gate_up", "down")]
        size = sum(buffers[n].nbytes for n in weights)
        copies = [buffers]
        for _ in range(min(_REPEATS, -(-_COLD_BYTES // size)) - 1 if size else 0):
            copies.append({**buffers, **{n: buffers[n].clone() for n in weights}})
        whole = self.microseconds(functions, case["launches"], copies)
        rates = f"{case['flop'] / whole / 1e6:4.0f} T" if case["flop"] else ""
        rates += f" {case['bytes'] / whole / 1e3:5.0f} GB/s" if case["bytes"] else ""
        label = f"{case['name']} {case['variant']}"
        parts = []
        for (function, facts), launch in zip(loaded, case["launches"], strict=True):
            alone = self.microseconds([function], [launch], copies) if len(loaded) > 1 else whole
            parts.append(f"{launch['function']} {alone:.1f} ({facts})")
        print(f"{label:34} {whole:8.1f} us {rates} off {max(errors, default=0):.0e}: {', '.join(parts)}")


def measure(folder: Path) -> None:
    """The second machine's half."""
    cases = json.loads((folder / "cases.json").read_text())
    device = Device()
    first: dict[str, dict[str, Any]] = {}
    for case in cases:
        for launch in case["launches"]:
            launch["made"]["cubin"] = (folder / launch["made"]["cubin"]).read_bytes()
        device.run(case, first)
        sys.stdout.flush()


# The first machine's half.


class Describer:
    """Collects cases."""

    def __init__(self, context: int = 16384) -> None:
        self.context = context
        self.cases: list[_Json] = []

    def add(
        self,
        name: str,
        variant: str,
        code: GpuCode,
        inputs: Sequence[Value],
        outputs: Sequence[Value],
        rows: int,
        flop: float = 0,
        first_position: int = 0,
        weight_bytes: int = 0,
    ) -> None:
        """A code with its values in order; FLOP of all its launches and bytes of the weights that they read; position
        of the first row. Codes of one name are variants that should write the same."""
        dims = {"T": rows, "R": rows}
        from hetcomp.ir.kv_pool import BLOCK_POSITIONS

        buffers: dict[str, list[Any]] = {v.id: self._spec(v, rows) for v in inputs}
        buffers |= {v.id: ["bytes", v.type.bytes(dims)] for v in outputs}
        buffers |= {"workspace": ["bytes", code.workspace_bytes]}
        buffers |= {"positions": ["range", rows, first_position], "slots": ["constant", rows, 0]}
        buffers |= {"rows": ["constant", 1, rows], "logit_row_count": ["constant", 1, rows]}
        names = {"input": [v.id for v in inputs], "output": [v.id for v in outputs]}

        def argument(operand: Operand) -> _Json:
            if operand.source == "slot_blocks":
                return {"i32": -(-self.context // BLOCK_POSITIONS)}
            its = names[operand.source][operand.index] if operand.source in names else operand.name or "workspace"
            return {"buffer": its, "offset": operand.offset}

        launches = [
            {
                "kernel": launch.kernel,
                "function": launch.kernel.function,
                "grid": [axis.programs(rows) for axis in launch.grid],
                "arguments": [argument(operand) for operand in launch.operands],
            }
            for launch in code.launches
        ]
        results = {v.id: {"f32": "float32", "i32": "int32", "bf16": "bfloat16"}[str(v.type.dtype)] for v in outputs}
        case = {"name": f"{name} {rows}", "variant": variant, "launches": launches, "buffers": buffers}
        self.cases.append({**case, "outputs": results, "flop": flop, "bytes": weight_bytes})

    def _spec(self, value: Value, rows: int) -> list[Any]:
        """What Device.fill makes of it."""
        from hetcomp.backends import packing
        from hetcomp.ir.kv_pool import BLOCK_POSITIONS
        from hetcomp.ir.layouts import has_act_order
        from hetcomp.ir.plan import ValueKind

        dims = {"T": rows, "R": rows}
        if value.kind is ValueKind.WEIGHT:
            columns = value.type.shape[-1]
            size = packing.packed_bytes(value)
            if value.format in ("f32", "bf16"):
                return [value.format, size // (4 if value.format == "f32" else 2)]
            if value.format != "q4":
                return ["codes", size]
            assert isinstance(columns, int) and columns % 64 == 0, "panels without padding"
            if has_act_order(value.type.layout):
                return ["ordered", size, 288, packing.matrices(value), columns]
            return ["groups", size, 288]
        if value.kind is ValueKind.STATE:
            size = -(-self.context // BLOCK_POSITIONS) * cache_block(value.type)
            return ["codes", size] if str(value.type.dtype) == "fp8" else ["bf16", size // 2]
        if str(value.type.dtype) == "i32":
            return ["ids", rows, value.type.shape[-1], _EXPERTS]
        return [str(value.type.dtype), value.type.bytes(dims) // (2 if str(value.type.dtype) == "bf16" else 4)]

    def write(self, folder: Path) -> None:
        """cases.json, cubins, and this file."""
        from hetcomp.backends.gpu.compile_kernels import compile_kernels

        folder.mkdir(parents=True, exist_ok=True)
        launches = [launch for case in self.cases for launch in case["launches"]]
        kernels = {launch["kernel"].name: launch["kernel"] for launch in launches}
        made = {m.kernel.name: m for m in compile_kernels(kernels.values(), (_CC,), threads=2)}
        for launch in launches:
            its = made[launch.pop("kernel").name]
            shutil.copyfile(its.cubin, folder / its.cubin.name)
            facts = {"entry": its.entry, "threads": 32 * its.num_warps, "shared": its.shared_bytes}
            facts["scratch"] = its.global_scratch_bytes
            launch["made"] = {**facts, "cubin": its.cubin.name}
        (folder / "cases.json").write_text(json.dumps(self.cases))
        shutil.copyfile(__file__, folder / "gpu_launches.py")


def cache_block(state: TensorType) -> int:
    """Bytes of a block of the KV cache with states of that type."""
    from hetcomp.ir.kv_pool import block_bytes

    return 2 * _LAYERS * block_bytes(state)


def layer(rows: int, exact: bool, kv: str, forms: str = "q4") -> tuple[Sequence[GpuGroup], dict[str, Value]]:
    """A layer in a format, or one and, behind a +, that of the experts' down projections (with :order behind both, of
    columns in an order of their own); its router in f32; from its first norm to the second addition, as groups; the
    values."""
    from hetcomp.backends import packing
    from hetcomp.backends.gpu.groups import group_ops
    from hetcomp.ir import ops
    from hetcomp.ir.layouts import with_act_order
    from hetcomp.ir.plan import Op, Value, ValueKind
    from hetcomp.ir.types import DType, TensorType

    values: dict[str, Value] = {}
    graph: list[Op] = []
    forms, _, ordered = forms.partition(":")
    most, _, of_down = forms.partition("+")

    def value(name: str, *shape: int | str, dtype: DType = DType.F32, kind: ValueKind = ValueKind.ACT) -> None:
        values[name] = Value(name, TensorType(dtype, shape), kind, fqn=name)

    def weight(name: str, shape: tuple[int, ...], form: str, layout: str = packing.PANELS) -> None:
        layout = with_act_order(layout) if ordered and form != "f32" else layout
        values[name] = Value(name, TensorType(DType.BF16, shape, layout), ValueKind.WEIGHT, format=form, fqn=name)

    def op(name: str, attrs: Attrs, inputs: Sequence[str], *shape: int) -> None:
        value(name, "T", *shape)
        graph.append(Op(name, attrs, tuple(inputs), (name,)))

    def linear(name: str, x: str, n: int, k: int, form: str = most) -> None:
        weight(f"{name}.w", (n, k), form)
        op(name, ops.Linear(k, n), (x, f"{name}.w"), n)

    for name, width in (("x", 2048), ("cos", 64), ("sin", 64)):
        value(name, "T", width)
    for name, width in (("norm.w", 2048), ("norm2.w", 2048), ("q_norm.w", 128), ("k_norm.w", 128)):
        value(name, width)
    op("norm", ops.RmsNorm(2048, 1e-6), ("x", "norm.w"), 2048)
    for name, n in (("q", 4096), ("k", 512), ("v", 512)):
        linear(name, "norm", n, 2048)
    for name, heads in (("q", 32), ("k", 4)):
        op(f"{name}_norm", ops.RmsNorm(128, 1e-6, heads), (name, f"{name}_norm.w"), heads, 128)
        op(f"{name}_rope", ops.Rope(heads, 128, 128), (f"{name}_norm", "cos", "sin"), heads, 128)
    for name, x in (("k", "k_rope"), ("v", "v")):
        value(f"{name}_cache", "slots", 4, "context", 128, dtype=DType(kv), kind=ValueKind.STATE)
        graph.append(Op(f"{name}_append", ops.KvAppend(4, 128), (x, f"{name}_cache"), ()))
    attention = ops.Attention(heads=32, kv_heads=4, head_dim=128, v_head_dim=128, scale=0.0883883)
    op("attention", attention, ("q_rope", "k_cache", "v_cache"), 32, 128)
    linear("o", "attention", 2048, 4096)
    op("sum", ops.Add(), ("x", "o"), 2048)
    op("norm2", ops.RmsNorm(2048, 1e-6), ("sum", "norm2.w"), 2048)
    linear("router", "norm2", _EXPERTS, 2048, "f32")
    value("ids", "T", 8, dtype=DType.I32)
    value("weights", "T", 8)
    graph.append(Op("route", ops.Route(_EXPERTS, 8, "softmax", True), ("router",), ("ids", "weights")))
    weight("gate_up", (_EXPERTS, 1536, 2048), most, packing.PANELS_GLU)
    weight("down", (_EXPERTS, 2048, 768), of_down or most)
    experts = ops.MoeExperts(experts=_EXPERTS, top_k=8, hidden=2048, intermediate=768)
    op("experts", experts, ("norm2", "ids", "weights", "gate_up", "down"), 2048)
    op("y", ops.Add(), ("sum", "experts"), 2048)
    dims = {"T": rows, "R": rows, "slots": 1, "context": 16384, "cache_block": cache_block(values["k_cache"].type)}
    groups = group_ops(graph, values, ("y",), dims, rows if exact else None)
    return groups, values | {v.id: v for group in groups for v in group.own}


def flop(group: GpuGroup, rows: int, first_position: int = 0) -> float:
    """Of its linears, experts and attention, where each token attends to those up to itself."""
    from hetcomp.ir import ops

    total = 0.0
    for op in group.ops:
        a = op.attrs
        if isinstance(a, ops.Linear):
            total += 2.0 * rows * a.in_features * a.out_features
        elif isinstance(a, ops.MoeExperts):
            total += 6.0 * rows * a.top_k * a.hidden * a.intermediate
        elif isinstance(a, ops.Attention):
            total += 2.0 * rows * a.heads * (a.head_dim + a.v_head_dim) * (first_position + (rows + 1) / 2)
    return total


def weight_bytes(group: GpuGroup, rows: int, values: dict[str, Value]) -> int:
    """Of its linears, and of its experts if the rows choose different ones."""
    from hetcomp.backends import packing
    from hetcomp.ir.plan import ValueKind

    total = 0
    for value in (values[name] for name in group.inputs if values[name].kind is ValueKind.WEIGHT):
        size = packing.packed_bytes(value)
        total += size * min(8 * rows, _EXPERTS) // _EXPERTS if len(value.type.shape) == 3 else size
    return total


def main() -> None:
    """Command line of the first half."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, nargs="*", default=[64, 512, 4096])
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--formats", nargs="*", default=["q4"])
    parser.add_argument("--kv", choices=["bf16", "fp8"], default="bf16")
    parser.add_argument("--only", nargs="*", help="names of ops")
    options = parser.parse_args()
    described = Describer()
    for rows, forms in itertools.product(options.rows, options.formats):
        groups, values = layer(rows, options.exact, options.kv, forms)
        for group in groups:
            names = [op.id for op in group.ops]
            if options.only and not set(names) & set(options.only):
                continue
            inputs, outputs = ([values[v] for v in ids] for ids in (group.inputs, group.outputs))
            name = names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}"
            size = weight_bytes(group, rows, values)
            described.add(f"{name} {forms}", "", group.code, inputs, outputs, rows, flop(group, rows), 0, size)
            if names == ["attention"]:
                first = described.context - rows
                name = f"attention at {first}"
                described.add(name, "", group.code, inputs, outputs, rows, flop(group, rows, first), first)
    described.write(options.folder)


if __name__ == "__main__":
    if (Path(__file__).parent / "cases.json").exists():
        measure(Path(sys.argv[1]).resolve())
    else:
        main()

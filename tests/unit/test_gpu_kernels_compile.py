"""Every family of GPU kernels compiles ahead of time for every architecture, without a GPU."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pytest

from hetcomp.backends import packing
from hetcomp.backends.gpu.architectures import shared_limit
from hetcomp.backends.gpu.argmax import argmax
from hetcomp.backends.gpu.candidates import candidates
from hetcomp.backends.gpu.compile_kernels import CompiledKernel, compile_kernels
from hetcomp.backends.gpu.groups import GpuGroup, group_ops
from hetcomp.backends.gpu.kernels import GpuCode, GpuKernel, GpuRequest
from hetcomp.backends.gpu.low_rank import PairTables
from hetcomp.backends.gpu.write_kernels import write_kernels
from hetcomp.errors import HetcompError
from hetcomp.ir import ops
from hetcomp.ir.plan import Op
from hetcomp.ir.types import DType
from tests.reference.experts_case import expert_weights
from tests.reference.kernel_harness import activation, cache, state, weight
from tests.reference.triton_harness import emit, request

CCS = (80, 86, 89, 90, 120)
FEW_CCS = (86, 90)  # for the other formats of a family: mma and wgmma, 99 and 227 KB of shared memory
DIMS = {"T": 512, "R": 512, "slots": 4, "context": 4096, "cache_block": 1 << 20}
GQA = ops.Attention(heads=32, kv_heads=4, head_dim=128, v_head_dim=128, scale=0.09)
GPT_OSS = ops.Attention(heads=64, kv_heads=8, head_dim=64, v_head_dim=64, scale=0.125, window=128, sinks=True)
MLA = ops.Attention(heads=128, kv_heads=1, head_dim=576, v_head_dim=512, scale=0.07, shared_kv=True)
WIDE = ops.Attention(heads=16, kv_heads=16, head_dim=256, v_head_dim=192, scale=0.06, softcap=30.0)
DEEPSEEK = ops.Route(256, 8, "sigmoid", True, 1e-20, 8, 4, "top2", "never", 2.5, bias=True)


def _linear(weight_format: str, rows: int | None) -> GpuRequest:
    value = weight("w", (4096, 2048), weight_format, packing.PANELS)
    return request(
        ops.Linear(2048, 4096), [activation("x", "T", 2048), value], [activation("y", "T", 4096)], DIMS, rows
    )


def _experts(weight_format: str, rows: int | None, tokens: int = 512) -> GpuRequest:
    a = ops.MoeExperts(experts=128, top_k=8, hidden=2048, intermediate=768)
    operands = [activation("x", "T", 2048), activation("i", "T", 8), activation("r", "T", 8)]
    operands += expert_weights(a, weight_format)
    operands.append(activation("resident", 128))
    return request(a, operands, [activation("y", "T", 2048)], {**DIMS, "T": tokens}, rows, resident=True)


def _attention(a: ops.Attention, rows: int | None, dtype: DType = DType.BF16) -> GpuRequest:
    operands = [activation("q", "T", a.heads, a.head_dim), cache("k", dtype, a.kv_heads, a.head_dim)]
    operands += [] if a.shared_kv else [cache("v", dtype, a.kv_heads, a.v_head_dim)]
    operands += [activation("s", a.heads)] * a.sinks
    return request(a, operands, [activation("y", "T", a.heads, a.v_head_dim)], DIMS, rows)


def _linear_attention() -> list[GpuRequest]:
    """Qwen3-Next's convolution and recurrence, whose keys are the widest that a GPU takes."""
    conv, width = ops.CausalConv(8192, 4), 8192
    operands = [activation("x", "T", width), activation("w", width, 1, 4), state("s", 3, width)]
    asked = [request(conv, operands, [activation("y", "T", width)], DIMS, rows) for rows in (1, 16, None)]
    a = ops.GatedDelta(16, 32, 128, 128, 0.09, 1e-6)
    for rows in (1, None):
        columns = 2 * a.k_heads * a.k_dim + a.v_heads * a.v_dim
        operands = [activation("qkv", "T", columns), activation("a", "T", a.v_heads), activation("b", "T", a.v_heads)]
        operands += [activation("a_log", a.v_heads), activation("dt_bias", a.v_heads)]
        operands.append(state("s", a.v_heads, a.k_dim, a.v_dim))
        asked.append(request(a, operands, [activation("y", "T", a.v_heads * a.v_dim)], DIMS, rows))
    return asked


def _small(rows: int | None) -> list[GpuRequest]:
    """Norms, rotary embedding, routing, elementwise ops, reading and writing of rows."""
    x, y = activation("x", "T", 2048), activation("y", "T", 2048)
    half, heads, r = activation("c", "T", 64), activation("q", "T", 32, 128), activation("r", "R", 2048)
    few = activation("i", "T", 8)
    table = weight("w", (1024, 2048), "q4", packing.PANELS)
    asked = [
        (ops.RmsNorm(2048, 1e-6), [x, activation("w", 2048)], [y]),
        (ops.RmsNorm(128, 1e-6, 32), [heads, activation("w", 128)], [heads]),
        (ops.LayerNorm(2048, 1e-5), [x, activation("w", 2048), activation("b", 2048)], [y]),
        (ops.RopeTable(128), [activation("p", "T"), activation("f", 64)], [half, half]),
        (ops.Rope(32, 128, 128), [heads, half, half], [heads]),
        (DEEPSEEK, [activation("l", "T", 256), activation("b", 256)], [few, few]),
        (ops.Route(128, 8, "softmax", True), [activation("l", "T", 128)], [few, few]),
        (
            ops.Route(16, 2, "sparse_mixer", False, jitter=0.01),
            [activation("l", "T", 16)],
            [activation("i", "T", 2), activation("j", "T", 2)],
        ),
        (ops.Embed(1024, 2048), [activation("ids", "T"), table], [y]),
        (ops.Glu(2048), [x, x], [y]),
        (ops.Activation("gelu"), [x], [y]),
        (ops.Add(), [x, x], [y]),
        (ops.Mul(), [x, activation("g", "T", 1)], [y]),
        (ops.Scale(2.0), [x], [y]),
        (ops.Slice(64, 128), [heads], [activation("y", "T", 32, 64)]),
        (ops.SelectRows(), [x], [r]),
        (ops.KvAppend(4, 128), [activation("k", "T", 4, 128), cache("k", DType.BF16, 4, 128)], []),
    ]
    return [request(attrs, operands, outputs, DIMS, rows) for attrs, operands, outputs in asked]


def _pairs(rank: int, numbers: str, *weights: str) -> PairTables:
    """Of weights that adapters may change."""
    return PairTables(dict.fromkeys(weights, 64), dict.fromkeys(weights, numbers), 0, rank, 4)


def _with_pairs(asked: GpuRequest, rank: int = 16, numbers: str = "bf16") -> GpuRequest:
    """With adapters' pairs of all of the op's weights."""
    weights = asked.inputs[3:5] if isinstance(asked.op.attrs, ops.MoeExperts) else asked.inputs[1:2]
    ids = [value.id for value in weights]
    return dataclasses.replace(asked, pairs=_pairs(rank, numbers, *ids).of("T", *ids))


def _grouped(weight_format: str, rows: int, pairs: PairTables | None = None) -> list[GpuGroup]:
    """Norm, three linears, and what is added; norm, gate, up and glu; a router; experts between a norm and two
    additions."""
    a = ops.MoeExperts(experts=128, top_k=8, hidden=2048, intermediate=768)
    acts = {"x": (2048,), "n": (2048,), "q": (4096,), "k": (512,), "v": (512,), "o": (2048,), "m": (2048,)}
    acts |= {"gate": (768,), "up": (768,), "act": (768,), "i": (8,), "r": (8,), "e": (2048,), "f": (2048,)}
    values = {name: activation(name, "T", *shape) for name, shape in acts.items()}
    values |= {name: activation(name, 2048) for name in ("w", "w2")}
    values |= {v.id: v for v in expert_weights(a, weight_format)}
    values |= {"l": activation("l", "T", 128), "l.w": weight("l.w", (128, 2048), "bf16", packing.PANELS)}
    graph = []
    for name, x, out, k in (
        *(("q", "n", 4096, 2048), ("k", "n", 512, 2048), ("v", "n", 512, 2048), ("o", "q", 2048, 4096)),
        *(("gate", "n", 768, 2048), ("up", "n", 768, 2048)),
    ):
        values[f"{name}.w"] = weight(f"{name}.w", (out, k), weight_format, packing.PANELS)
        graph.append(Op(name, ops.Linear(k, out), (x, f"{name}.w"), (name,)))
    norm = Op("n", ops.RmsNorm(2048, 1e-6), ("x", "w"), ("n",))
    graph = [
        norm,
        *graph,
        Op("m", ops.Add(), ("x", "o"), ("m",)),
        Op("act", ops.Glu(768), ("gate", "up"), ("act",)),
        Op("l", ops.Linear(2048, 128), ("n", "l.w"), ("l",)),
        Op("route", ops.Route(128, 8, "softmax", True), ("l",), ("i", "r")),
        Op("e", a, ("n", "i", "r", "gate_up", "down"), ("e",)),
        Op("f", ops.Add(), ("e", "m"), ("f",)),
        Op("x2", ops.Add(), ("f", "o2"), ("x2",)),
    ]
    values |= {name: activation(name, "T", 2048) for name in ("o2", "x2")}
    return list(group_ops(graph, values, ("q", "k", "v", "n"), DIMS, rows, pairs=pairs))


def _grouped_heads(a: ops.Attention, q: ops.Rope, norms: int | None, rows: int | None) -> list[GpuGroup]:
    """Norms of whole rows (1), of heads or none (None), rotations and caches."""
    k = dataclasses.replace(q, heads=a.kv_heads)
    heads = {"q": a.heads, "k": a.kv_heads, "v": a.kv_heads, "qr": a.heads, "kr": a.kv_heads, "y": a.heads}
    values = {name: activation(name, "T", count, a.head_dim) for name, count in heads.items()}
    values |= {name: activation(name, "T", q.rotary_dim // 2) for name in ("cos", "sin")}
    values |= {name: cache(name, DType.BF16, a.kv_heads, a.head_dim) for name in ("kc", "vc")}
    values["sinks"] = activation("sinks", a.heads)
    graph, x = [], {"q": "q", "k": "k"}
    if norms is not None:
        for name, count in (("q", a.heads), ("k", a.kv_heads)):
            groups = 1 if norms == 1 else count
            width = count * a.head_dim // groups
            values |= {f"{name}w": activation(f"{name}w", width), f"{name}n": values[name]}
            graph.append(Op(f"{name}n", ops.RmsNorm(width, 1e-6, groups), (name, f"{name}w"), (f"{name}n",)))
            x[name] = f"{name}n"
    append = ops.KvAppend(a.kv_heads, a.head_dim)
    graph += [
        Op("qr", q, (x["q"], "cos", "sin"), ("qr",)),
        Op("kr", k, (x["k"], "cos", "sin"), ("kr",)),
        Op("ka", append, ("kr", "kc"), ()),
        Op("va", append, ("v", "vc"), ()),
        Op("y", a, ("qr", "kc", "vc", *["sinks"] * a.sinks), ("y",)),
    ]
    first, *_ = group_ops(graph, values, ("y",), DIMS, rows)
    assert len(first.ops) == len(graph) - 1
    return [first]


def _grouped_latents(rows: int) -> list[GpuGroup]:
    """DeepSeek-V3's heads."""
    heads, nope, rank, turned = 128, 128, 512, 64
    shapes: dict[str, tuple[int, ...]] = {"q": (heads, nope + turned), "kv": (rank + turned,), "qr": (heads, turned)}
    shapes |= {"kr": (turned,), "c": (rank,), "a": (heads, rank), "row": (heads, rank + turned), "kvrow": shapes["kv"]}
    shapes |= {"q0": (heads, nope), "q1": (heads, turned), "c0": (rank,), "c1": (turned,), "y": (heads, rank)}
    shapes |= {name: (turned // 2,) for name in ("cos", "sin")}
    values = {name: activation(name, "T", *shape) for name, shape in shapes.items()} | {"w": activation("w", rank)}
    values["m"] = weight("m", (heads, rank, nope), "q8", packing.PANELS)
    values["cache"] = cache("cache", DType.BF16, 1, rank + turned)
    rope = ops.Rope(heads, turned, turned, style="interleaved_to_half")
    graph = [
        Op("q0", ops.Slice(0, nope), ("q",), ("q0",)),
        Op("q1", ops.Slice(nope, nope + turned), ("q",), ("q1",)),
        Op("c0", ops.Slice(0, rank), ("kv",), ("c0",)),
        Op("c1", ops.Slice(rank, rank + turned), ("kv",), ("c1",)),
        Op("c", ops.RmsNorm(rank, 1e-6), ("c0", "w"), ("c",)),
        Op("qr", rope, ("q1", "cos", "sin"), ("qr",)),
        Op("kr", dataclasses.replace(rope, heads=1), ("c1", "cos", "sin"), ("kr",)),
        Op("kvrow", ops.Concat(), ("c", "kr"), ("kvrow",)),
        Op("append", ops.KvAppend(1, rank + turned), ("kvrow", "cache"), ()),
        Op("a", ops.HeadLinear(heads, nope, rank), ("q0", "m"), ("a",)),
        Op("row", ops.Concat(), ("a", "qr"), ("row",)),
        Op("y", MLA, ("row", "cache"), ("y",)),
    ]
    first, *_ = group_ops(graph, values, ("y",), DIMS, rows)
    assert len(first.ops) == len(graph) - 1 and len(first.code.launches) == 2
    return [first]


def _grouped_sum() -> list[GpuGroup]:
    """An addition and a norm."""
    values = {name: activation(name, "T", 2880) for name in "abcd"} | {"w": activation("w", 2880)}
    add, norm = Op("c", ops.Add(), ("a", "b"), ("c",)), Op("d", ops.RmsNorm(2880, 1e-6), ("c", "w"), ("d",))
    return list(group_ops([add, norm], values, ("c", "d"), DIMS, None))


_GROUPED_WEIGHTS = (*(f"{name}.w" for name in ("q", "k", "v", "o", "gate", "up", "l")), "gate_up", "down")
FAMILIES: dict[str, Sequence[GpuRequest | GpuGroup | GpuCode]] = {
    **{f"linear-{form}": [_linear(form, rows) for rows in (8, None)] for form in (*packing.FORMATS, "q5k")},
    "linear-q4z": [_linear("q4z", 8)],
    **{f"experts-{form}": [_experts(form, rows) for rows in (1, None)] for form in ("bf16", "q4", "q4k+q6k")},
    **{f"experts-{form}-many": [_experts(form, None, 4096)] for form in ("bf16", "q8")},
    **{
        f"attention-{name}": [_attention(a, rows) for rows in (1, None)]
        for name, a in (("gqa", GQA), ("gpt-oss", GPT_OSS), ("mla", MLA))
    },
    "attention-f32": [_attention(GQA, rows, DType.F32) for rows in (1, None)],
    "attention-wide": [_attention(WIDE, rows) for rows in (1, 4, None)],
    "adapters": [
        *(_with_pairs(_linear(form, rows)) for form in ("q4", "fp8") for rows in (8, None)),
        *(_with_pairs(_linear("f32", rows), 64, "fp32") for rows in (8, None)),
        *(_with_pairs(_experts("q4", rows), rank) for rows in (1, None) for rank in (16, 128)),
        *(group for rows in (1, 8) for group in _grouped("q4", rows, _pairs(32, "bf16", *_GROUPED_WEIGHTS))),
    ],
    "linear-attention": _linear_attention(),
    "small": _small(None),
    "sampling": [argmax(151936, 64, False), candidates(151936, 1), candidates(8192, 4)],
    **{f"groups-{form}-{rows}": _grouped(form, rows) for form in ("q4", "fp8") for rows in (1, 8)},
    "groups-heads": [
        *_grouped_heads(GQA, ops.Rope(32, 128, 128), 1, 1),
        *_grouped_heads(GQA, ops.Rope(32, 128, 64, style="interleaved"), 32, None),
        *_grouped_heads(GPT_OSS, ops.Rope(64, 64, 64), None, 8),
        *_grouped_latents(8),
        *_grouped_sum(),
    ],
}
ALL_CCS = {
    *("linear-q4", "experts-q4", "attention-gqa", "attention-gpt-oss", "attention-mla", "small", "sampling"),
    "linear-attention",
    *("groups-q4-1", "groups-heads"),
}


def _kernels(family: str) -> list[GpuKernel]:
    def code(asked: GpuRequest | GpuGroup | GpuCode) -> GpuCode:
        if isinstance(asked, GpuRequest):
            return emit(asked)
        return asked.code if isinstance(asked, GpuGroup) else asked

    return [launch.kernel for asked in FAMILIES[family] for launch in code(asked).launches]


def _resources(cubin: Path) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL .. of the kernel, by the cuobjdump that comes with Triton."""
    tool = (
        Path(str(metadata.distribution("triton").locate_file("triton"))) / "backends" / "nvidia" / "bin" / "cuobjdump"
    )
    done = subprocess.run([str(tool), "-res-usage", str(cubin)], capture_output=True, text=True, check=True)
    return {name: int(number) for name, number in re.findall(r"([A-Z]+):(\d+)", done.stdout)}


# What make test compiles: of each kind of kernel one family.
FIRST_FAMILIES = ("linear-q4", "experts-q4", "attention-gqa", "attention-mla", "small", "groups-q4-1", "sampling")
# Bytes of local memory that were measured to cost less than a smaller tile: of latents' prompts 768, where the tile
# without takes 2.5 times as long (docs/decisions/mla-absorbed.md).
SPILLED = {"attention-mla": 1024}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "cc"),
    [
        pytest.param(f, cc, marks=() if f in FIRST_FAMILIES else pytest.mark.exhaustive)
        for f in FAMILIES
        for cc in (CCS if f in ALL_CCS else FEW_CCS)
    ],
)
def test_compiles_ahead_of_time(family, cc):
    kernels = {k.name for k in _kernels(family)}
    made = compile_kernels(_kernels(family), (cc,), threads=1)
    assert {(m.kernel.name, m.cc) for m in made} == {(name, cc) for name in kernels}
    for m in made:
        assert m.cubin.read_bytes()[:4] == b"\x7fELF", m
        assert m.shared_bytes <= shared_limit(m.cc)
        copied = dict(m.kernel.constants).get("DESCRIPTORS", False) and m.cc >= 90
        assert m.global_scratch_bytes == (256 if copied else 0)  # a tensor map of 128 bytes for keys, one for values
        resources = _resources(m.cubin)
        # A few registers that do not fit cost little; arrays in local memory would.
        assert resources["STACK"] + resources["LOCAL"] <= SPILLED.get(family, 192), (m.kernel.name, m.cc, resources)


def test_the_folder_holds_what_its_table_says(tmp_path: Path):
    made = compile_kernels(_kernels("linear-q4")[:1], (90,), threads=1)
    names = write_kernels(made, tmp_path)
    assert sorted(names) == sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file())
    table = json.loads((tmp_path / "kernels.json").read_text())
    assert table["schema"] == [1, 0]
    (entry,) = table["kernels"]
    assert entry["name"].startswith("linear_q4_n4096_k2048_rows8_")
    assert entry["entry"] == "linear_gemv"
    assert entry["cc"] == 90
    assert entry["arguments"] == [{"name": n, "type": "ptr"} for n in ("x", "w", "y")]
    assert entry["sha256"] == hashlib.sha256((tmp_path / entry["file"]).read_bytes()).hexdigest()
    assert (entry["num_warps"], entry["global_scratch_bytes"]) == (8, 0)


def test_compiles_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HETCOMP_CACHE", str(tmp_path))
    kernels, seen = _kernels("small")[:1], []

    def compiled() -> list[CompiledKernel]:
        return compile_kernels([*kernels, *kernels], (80,), threads=2, progress=seen.append)

    (first,), stamp = compiled(), None
    stamp = first.cubin.stat().st_mtime_ns
    (again,) = compiled()
    assert again == first
    assert again.cubin.stat().st_mtime_ns == stamp
    assert seen == [f"{kernels[0].name} sm_80"] * 2


def test_refusals_name_what_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (kernel,) = {k.name: k for k in _kernels("small")[:1]}.values()
    with pytest.raises(HetcompError, match="for compute capability 75; expected one of 80, 86"):
        compile_kernels([kernel], (75,), threads=1)
    monkeypatch.setenv("HETCOMP_CACHE", str(tmp_path))
    broken = dataclasses.replace(kernel, function="no_such_kernel")
    with pytest.raises(HetcompError, match=rf"could not compile the kernel {broken.name} for sm_80: .*no_such_kernel"):
        compile_kernels([broken], (80,), threads=1)
    assert not list(tmp_path.rglob("*.cubin"))


def test_equal_requests_give_equal_kernels_and_other_ones_other_names():
    assert emit(_linear("q4", 1)) == emit(_linear("q4", 1))
    kernels = {kernel for family in FAMILIES for kernel in _kernels(family)}
    assert len({kernel.name for kernel in kernels}) == len(kernels)

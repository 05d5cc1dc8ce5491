"""Speed of single CPU kernels, beside the read bandwidth of the same run.

python -m benchmarks.cpu_kernels [--shape NAME] [--threads N] [--isa avx512] [--formats q4,q8] [--only WORD]

Weights take turns over a buffer far larger than the last-level cache, so decode reads them from memory.
Behind a format :order is of columns in an order of their own (act-order).
GB/s counts weight (or KV cache) bytes, once a call for each matrix that is touched, and of a recurrence's state what is
read and what is written.
"""

from __future__ import annotations

import argparse
import itertools
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import read_bandwidth
from benchmarks.record import Record
from hetcomp.backends import packing
from hetcomp.backends.protocol import Isa
from hetcomp.ir.layouts import has_act_order, has_gate_up, with_act_order
from hetcomp.ir.ops import Attention, CausalConv, GatedDelta, Linear, MoeExperts
from hetcomp.ir.plan import Value, ValueKind
from hetcomp.ir.types import DType, TensorType
from tests.reference.kernel_harness import CompiledKernel, Step, activation, aligned, build, cache, isas_here, weight

STREAM_BYTES = 512 << 20  # 16 times the L3 cache of the development machine
ROWS = 512
# Linear attention of Qwen3-Next.
DELTA = GatedDelta(k_heads=16, v_heads=32, k_dim=128, v_dim=128, scale=128**-0.5, l2_eps=1e-6)

Arrays = list[npt.NDArray[Any]]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model's layers."""

    hidden: int
    experts: int
    top_k: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


SHAPES = {
    "qwen3moe-1b": Shape(1024, 64, 8, 512, 16, 4, 128, 32000),
    "qwen3-30b-a3b": Shape(2048, 128, 8, 768, 32, 4, 128, 151936),
}


@dataclass(frozen=True)
class Case:
    """One kernel at one size: ``sets`` are inputs that take turns; ``bytes``, ``flops`` count one call."""

    name: str
    kernel: CompiledKernel
    sets: list[Arrays]
    output: npt.NDArray[np.float32]
    rows: int
    bytes: float
    flops: float
    step: Step


def huge(size: int) -> npt.NDArray[np.uint8]:
    """``size`` bytes of zeros in huge pages, if the system gives them."""
    memory = mmap.mmap(-1, size + (4 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared: 4 KB pages
    memory.madvise(mmap.MADV_HUGEPAGE)
    raw = np.frombuffer(memory, np.uint8)
    start = -raw.ctypes.data % (2 << 20)
    return raw[start : start + size]


def copies(value: Value, data: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.uint8]]:
    """The packed bytes of a weight of random numbers, as often as ``data`` has room for them."""
    layout = packing.PANELS_GLU if has_gate_up(value.type.layout) else packing.PANELS
    one = replace(value, type=replace(value.type, shape=value.type.shape[-2:], layout=layout))
    random = np.random.default_rng(0)
    numbers = random.standard_normal(one.type.shape, np.float32) * np.float32(0.02)
    if value.format in packing.TAKEN_OVER:  # nothing quantises to these; bytes whose fp16 numbers are finite
        matrix = random.integers(1, 60, packing.packed_bytes(one)).astype(np.uint8)
    else:
        matrix = packing.pack(numbers, one)[0]
    if has_act_order(value.type.layout):
        matrix = np.concatenate([matrix, random.permutation(numbers.shape[-1]).astype(np.int32).view(np.uint8)])
    size = packing.packed_bytes(value)
    found = [data[i * size : (i + 1) * size] for i in range(max(1, data.size // size))]
    for copy in found:
        copy.reshape(-1, matrix.size)[:] = matrix
    return found


def stored(name: str, shape: tuple[int, ...], weight_format: str, layout: str) -> Value:
    """A weight in a format, with an order of its columns where ``:order`` is behind it."""
    form, _, ordered = weight_format.partition(":")
    return weight(name, shape, form, with_act_order(layout) if ordered else layout)


def activations(*shape: int) -> npt.NDArray[np.float32]:
    """Random activations at a multiple of 64 bytes."""
    array = aligned(4 * int(np.prod(shape))).view(np.float32).reshape(shape)
    array[...] = np.random.default_rng(1).standard_normal(shape)
    return array


def integers(array: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """The numbers as aligned i32."""
    copy = aligned(4 * array.size).view(np.int32).reshape(array.shape)
    copy[...] = array
    return copy


def linear(n: int, k: int, isa: Isa, weight_format: str, data: npt.NDArray[np.uint8]) -> Iterator[Case]:
    """A dense projection at 1, 8, 64 and ROWS tokens."""
    w = stored("w", (n, k), weight_format, packing.PANELS)
    size = packing.packed_bytes(w)
    kernel = build(Linear(k, n), [activation("x", "T", k), w], [activation("y", "T", n)], isa, {"T": ROWS})
    sets = copies(w, data)
    for rows in (1, 8, 64, ROWS):
        x = activations(rows, k)
        yield Case(
            f"linear {n}x{k} T={rows}",
            kernel,
            [[x, s] for s in sets],
            activations(rows, n),
            rows,
            size,
            2.0 * n * k * rows,
            Step(),
        )


def moe(
    shape: Shape,
    isa: Isa,
    weight_format: str,
    data: npt.NDArray[np.uint8],
    tokens: Sequence[int] = (1, 8, 64, ROWS, 2048),
) -> Iterator[Case]:
    """The expert layer with uniform random routing, and with one expert that every token chooses."""
    gate_up = stored(
        "gate_up", (shape.experts, 2 * shape.intermediate, shape.hidden), weight_format, packing.PANELS_GLU
    )
    down = stored("down", (shape.experts, shape.hidden, shape.intermediate), weight_format, packing.PANELS)
    sizes = packing.packed_bytes(gate_up), packing.packed_bytes(down)
    part = data.size // sum(sizes) * sizes[0]
    pairs = list(zip(copies(gate_up, data[:part]), copies(down, data[part:]), strict=False))
    routed = (activation("ids", "T", shape.top_k), activation("weights", "T", shape.top_k))
    kernel = build(
        MoeExperts(shape.experts, shape.top_k, shape.hidden, shape.intermediate),
        [activation("x", "T", shape.hidden), *routed, gate_up, down],
        [activation("y", "T", shape.hidden)],
        isa,
        {"T": 2048},
    )
    rng = np.random.default_rng(2)
    for rows, hot in (*((rows, False) for rows in tokens), (ROWS, True)):
        sets: list[Arrays] = []
        touched: list[int] = []
        for i in range(len(pairs) * max(1, 16 // rows)):
            ids = np.stack([rng.permutation(shape.experts)[: shape.top_k] for _ in range(rows)])
            if hot:
                ids = np.stack([[0, *(1 + rng.permutation(shape.experts - 1)[: shape.top_k - 1])] for _ in range(rows)])
            touched.append(len(np.unique(ids)))
            w = activations(rows, shape.top_k)
            sets.append([activations(rows, shape.hidden), integers(ids), w, *pairs[i % len(pairs)]])
        yield Case(
            f"moe_experts T={rows}{' hot' if hot else ''}",
            kernel,
            sets,
            activations(rows, shape.hidden),
            rows,
            float(np.mean(touched)) * sum(sizes) / shape.experts,
            6.0 * shape.hidden * shape.intermediate * shape.top_k * rows,
            Step(),
        )


def attention(shape: Shape, isa: Isa, data: npt.NDArray[np.uint8], dtype: DType) -> Iterator[Case]:
    """Decode at several lengths of the cache, prefill of ROWS tokens."""
    context = 16384
    caches = [cache(name, dtype, shape.kv_heads, shape.head_dim) for name in ("k", "v")]
    kernel = build(
        Attention(shape.heads, shape.kv_heads, shape.head_dim, shape.head_dim, shape.head_dim**-0.5),
        [activation("q", "T", shape.heads, shape.head_dim), *caches],
        [activation("y", "T", shape.heads, shape.head_dim)],
        isa,
        {"T": ROWS, "slots": 1, "context": context},
    )
    half = shape.kv_heads * context * shape.head_dim * dtype.bytes
    sets = [
        (data[start : start + half], data[start + half : start + 2 * half])
        for start in range(0, STREAM_BYTES - 2 * half + 1, 2 * half)
    ]
    row_bytes = 2.0 * shape.kv_heads * shape.head_dim * dtype.bytes
    for rows, past in ((1, 127), (1, 1023), (1, 16383), (ROWS, 0), (ROWS, 4096)):
        positions = np.arange(past, past + rows, dtype=np.int32)
        keys = float((positions + 1).sum())
        yield Case(
            f"attention {dtype} T={rows} past={past}",
            kernel,
            [[activations(rows, shape.heads, shape.head_dim), *s] for s in sets],
            activations(rows, shape.heads, shape.head_dim),
            rows,
            (past + rows) * row_bytes,
            4.0 * shape.heads * shape.head_dim * keys,
            Step(positions, np.zeros(rows, np.int32), context=context),
        )


def linear_attention(isa: Isa, data: npt.NDArray[np.uint8]) -> Iterator[Case]:
    """The recurrence and the convolution in front of it, at one and at ROWS rows of a sequence; states take turns."""
    channels, heads = 2 * DELTA.k_heads * DELTA.k_dim + DELTA.v_heads * DELTA.v_dim, DELTA.v_heads
    shape = heads, DELTA.k_dim, DELTA.v_dim
    state = Value("s", TensorType(DType.F32, ("slots", *shape)), ValueKind.STATE)
    delta = build(
        DELTA,
        [
            activation("x", "T", channels),
            *(activation(n, "T", heads) for n in "ab"),
            *(activation(n, heads) for n in "ld"),
            state,
        ],
        [activation("y", "T", heads, DELTA.v_dim)],
        isa,
        {"T": ROWS, "slots": 1},
    )
    conv = CausalConv(channels, 4)
    history = Value("s", TensorType(DType.F32, ("slots", conv.width - 1, channels)), ValueKind.STATE)
    taps = activation("w", channels, 1, conv.width)
    convolve = build(
        conv, [activation("x", "T", channels), taps, history], [activation("y", "T", channels)], isa, {"T": ROWS}
    )
    elements = int(np.prod(shape))
    states = data[: data.size // (4 * elements) * 4 * elements].view(np.float32).reshape(-1, *shape)
    states[:] = activations(*shape)
    numbers, last = activations(channels, 1, conv.width), activations(1, conv.width - 1, channels)
    for rows in (1, ROWS):
        x, gates, per_head = activations(rows, channels), activations(rows, heads), activations(heads)
        step = Step(np.arange(1, rows + 1, dtype=np.int32), np.zeros(rows, np.int32))
        yield Case(
            f"gated_delta T={rows}",
            delta,
            [[x, gates, gates, per_head, per_head, s] for s in states],
            activations(rows, heads, DELTA.v_dim),
            rows,
            8.0 * elements,
            7.0 * elements * rows,
            step,
        )
        yield Case(
            f"causal_conv T={rows}",
            convolve,
            [[x, numbers, last]],
            activations(rows, channels),
            rows,
            8.0 * rows * channels,
            2.0 * rows * channels * conv.width,
            step,
        )


def measure(case: Case, threads: int, budget: float) -> float:
    """Seconds a call: the best of several batches of calls within about ``budget`` seconds."""

    def batch(calls: int) -> float:
        seconds = case.kernel.seconds(
            case.sets, case.output, rows=case.rows, threads=threads, calls=calls, step=case.step
        )
        return seconds / calls

    once = batch(max(1, min(4, len(case.sets))))
    calls = max(1, min(int(budget / 8 / once), 4 * len(case.sets)))
    return min(batch(calls) for _ in range(max(3, int(budget / (calls * once)))))


def groups(shape: Shape, isa: Isa, weight_format: str, data: npt.NDArray[np.uint8]) -> Iterator[Iterator[Case]]:
    """The expert layer and the dense projections."""
    yield moe(shape, isa, weight_format, data)
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for n, k in ((q, shape.hidden), (kv, shape.hidden), (shape.hidden, q), (shape.vocab, shape.hidden)):
        yield linear(n, k, isa, weight_format, data)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    here = isas_here()
    parser.add_argument("--shape", default="qwen3moe-1b", choices=SHAPES)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--isa", type=Isa, default=here[-1], choices=here)
    parser.add_argument("--formats", default="bf16,q8,q4")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each case")
    parser.add_argument("--repeats", type=int, default=1, help="times that each case is measured")
    o = parser.parse_args()
    shape = SHAPES[o.shape]

    def bandwidth() -> float:
        best: float = max(read_bandwidth.measure(o.threads, 3)[o.threads - 1])
        return best

    record = Record("cpu_kernels", {"shape": o.shape, "threads": o.threads, "isa": o.isa.value, "only": o.only})
    data = huge(STREAM_BYTES)
    for weight_format in o.formats.split(","):
        cases = (case for group in groups(shape, o.isa, weight_format, data) for case in group)
        if weight_format in ("f32", "bf16"):
            cases = itertools.chain(cases, attention(shape, o.isa, data, DType(weight_format)))
        if weight_format == "f32":
            cases = itertools.chain(cases, linear_attention(o.isa, data))
        for case in (c for c in cases if o.only in c.name):
            name = f"{weight_format} {case.name}"
            for _ in range(o.repeats):
                before = bandwidth()
                seconds = measure(case, o.threads, o.seconds)
                bound = max(before, bandwidth())
                record.add(f"{name} time", "us", seconds * 1e6, higher_is_better=False)
                record.add(f"{name} streams", "GB/s", case.bytes / seconds / 1e9)
                record.add(f"{name} computes", "GFLOP/s", case.flops / seconds / 1e9)
                record.add(f"{name} read bandwidth beside it", "GB/s", bound)
                record.add(f"{name} part of the bandwidth", "1", case.bytes / seconds / 1e9 / bound)
            us, rate, flops, _, share = (s.median for s in record.series[-5:])
            print(f"{name:40s} {us:10.1f} us {rate:7.2f} GB/s = {100 * share:5.1f} % {flops:8.1f} GFLOP/s", flush=True)
    print(record.write())


if __name__ == "__main__":
    main()

"""Speed of single CPU kernels at qwen3moe-1b's shapes, beside the read bandwidth of the same run.

python -m benchmarks.kernel_bench [--threads N] [--isa avx512] [--format bf16] [--only WORD] [--seconds S]

Weights take turns over a buffer far larger than the last-level cache, so decode reads them from memory.
GB/s counts weight (or KV cache) bytes, once a call for each matrix that is touched.
"""

from __future__ import annotations

import argparse
import functools
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import read_bandwidth
from hetcomp.backends import packing
from hetcomp.backends.protocol import Isa
from hetcomp.ir.ops import Attention, Linear, MoeExperts
from hetcomp.ir.types import CACHE_DTYPES, DType
from tests.reference.kernel_harness import CompiledKernel, Step, activation, aligned, build, cache, weight

HIDDEN, EXPERTS, TOP_K, INTER, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 1024, 64, 8, 512, 16, 4, 128, 32000
STREAM_BYTES = 512 << 20  # 16 times the L3 cache of the development machine
ROWS = 512

Arrays = list[npt.NDArray[Any]]


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
    memory = mmap.mmap(-1, size + (4 << 20))
    memory.madvise(mmap.MADV_HUGEPAGE)
    raw = np.frombuffer(memory, np.uint8)
    start = -raw.ctypes.data % (2 << 20)
    return raw[start : start + size]


def weights(size: int, weight_format: str) -> npt.NDArray[np.uint8]:
    """Bytes of finite random numbers of the format."""
    numbers = np.random.default_rng(0).standard_normal(1 << 18).astype(np.float32) * 0.02
    pattern = (numbers if weight_format == "f32" else packing.to_bf16_bits(numbers)).view(np.uint8)
    data = huge(size)
    for start in range(0, size, pattern.size):
        part = data[start : start + pattern.size]
        part[:] = pattern[: part.size]
    return data


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
    """A dense projection at 1, 2, 4, 8, 16 and ROWS tokens."""
    w = weight("w", (n, k), weight_format, packing.PANELS)
    size = packing.packed_bytes(w)
    kernel = build(Linear(k, n), [activation("x", "T", k), w], [activation("y", "T", n)], isa, {"T": ROWS})
    sets = [data[i * size : (i + 1) * size] for i in range(max(1, STREAM_BYTES // size))]
    for rows in (1, 2, 4, 8, 16, ROWS):
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


def moe(isa: Isa, weight_format: str, data: npt.NDArray[np.uint8]) -> Iterator[Case]:
    """The expert layer with uniform random routing, and with one expert that every token chooses."""
    gate_up = weight("gate_up", (EXPERTS, 2 * INTER, HIDDEN), weight_format, packing.PANELS_GLU)
    down = weight("down", (EXPERTS, HIDDEN, INTER), weight_format, packing.PANELS)
    sizes = packing.packed_bytes(gate_up), packing.packed_bytes(down)
    routed = (activation("ids", "T", TOP_K), activation("weights", "T", TOP_K))
    kernel = build(
        MoeExperts(EXPERTS, TOP_K, HIDDEN, INTER),
        [activation("x", "T", HIDDEN), *routed, gate_up, down],
        [activation("y", "T", HIDDEN)],
        isa,
        {"T": ROWS},
    )
    rng = np.random.default_rng(2)
    pairs = []
    for start in range(0, data.size - sum(sizes) + 1, sum(sizes)):
        middle = start + sizes[0]
        pairs.append((data[start:middle], data[middle : middle + sizes[1]]))
    for rows, hot in ((1, False), (2, False), (8, False), (32, False), (ROWS, False), (ROWS, True)):
        sets: list[Arrays] = []
        touched: list[int] = []
        for i in range(len(pairs) * max(1, 16 // rows)):
            ids = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(rows)])
            if hot:
                ids = np.stack([[0, *(1 + rng.permutation(EXPERTS - 1)[: TOP_K - 1])] for _ in range(rows)])
            touched.append(len(np.unique(ids)))
            w = activations(rows, TOP_K)
            sets.append([activations(rows, HIDDEN), integers(ids), w, *pairs[i % len(pairs)]])
        yield Case(
            f"moe_experts T={rows}{' hot' if hot else ''}",
            kernel,
            sets,
            activations(rows, HIDDEN),
            rows,
            float(np.mean(touched)) * sum(sizes) / EXPERTS,
            6.0 * HIDDEN * INTER * TOP_K * rows,
            Step(),
        )


def attention(isa: Isa, dtype: DType) -> Iterator[Case]:
    """Decode at several lengths of the cache, prefill of ROWS tokens."""
    # bf16's bytes do for q8: as int8 codes and as fp16 scales they are finite.
    data = weights(STREAM_BYTES, "f32" if dtype is DType.F32 else "bf16")
    context = 16384
    caches = [cache(name, dtype, KV_HEADS, HEAD_DIM) for name in ("k", "v")]
    kernel = build(
        Attention(HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM, HEAD_DIM**-0.5),
        [activation("q", "T", HEADS, HEAD_DIM), *caches],
        [activation("y", "T", HEADS, HEAD_DIM)],
        isa,
        {"T": ROWS, "slots": 1, "context": context},
    )
    half = caches[0].type.bytes({"slots": 1, "context": context})
    sets = [
        (data[start : start + half], data[start + half : start + 2 * half])
        for start in range(0, STREAM_BYTES - 2 * half + 1, 2 * half)
    ]
    row_bytes = 2.0 * half / context
    for rows, past in ((1, 127), (1, 1023), (1, 16383), (ROWS, 0), (ROWS, 4096)):
        positions = np.arange(past, past + rows, dtype=np.int32)
        keys = float((positions + 1).sum())
        yield Case(
            f"attention {dtype} T={rows} past={past}",
            kernel,
            [[activations(rows, HEADS, HEAD_DIM), *s] for s in sets],
            activations(rows, HEADS, HEAD_DIM),
            rows,
            (past + rows) * row_bytes,
            4.0 * HEADS * HEAD_DIM * keys,
            Step(positions, np.zeros(rows, np.int32), context=context),
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


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--isa", type=Isa, default=Isa.AVX512)
    parser.add_argument("--format", default="bf16", choices=("f32", "bf16"))
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each case")
    options = parser.parse_args()
    isa, weight_format = options.isa, options.format

    def bandwidth() -> float:
        best: float = max(read_bandwidth.measure(options.threads, 3)[options.threads - 1])
        return best

    def cases(group: Callable[[], Iterator[Case]]) -> Iterator[Case]:
        return (case for case in group() if options.only in case.name)

    bound = bandwidth()
    print(f"{isa} {weight_format}, {options.threads} threads; read bandwidth {bound:.1f} GB/s")
    data = weights(STREAM_BYTES, weight_format)
    groups: list[Callable[[], Iterator[Case]]] = [
        lambda: moe(isa, weight_format, data),
        lambda: linear(2048, HIDDEN, isa, weight_format, data),
        lambda: linear(512, HIDDEN, isa, weight_format, data),
        lambda: linear(HIDDEN, 2048, isa, weight_format, data),
        lambda: linear(EXPERTS, HIDDEN, isa, weight_format, data),
        lambda: linear(VOCAB, HIDDEN, isa, weight_format, data),
        *(functools.partial(attention, isa, dtype) for dtype in CACHE_DTYPES),
    ]
    for group in groups:
        for case in cases(group):
            seconds = measure(case, options.threads, options.seconds)
            rate = case.bytes / seconds / 1e9
            print(
                f"{case.name:34s} {seconds * 1e6:10.1f} us  {rate:7.2f} GB/s = {100 * rate / bound:5.1f} %"
                f"  {case.flops / seconds / 1e9:8.1f} GFLOP/s",
                flush=True,
            )
    print(f"read bandwidth at the end {bandwidth():.1f} GB/s")


if __name__ == "__main__":
    main()

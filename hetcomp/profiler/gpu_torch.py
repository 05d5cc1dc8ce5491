"""Curves of torch's GPU kernels (cuBLAS, flash attention), where a torch with CUDA happens to be installed.

Run as a program of its own (``python gpu_torch.py DEVICE [quick]``): it needs torch alone, prints one JSON document,
and takes its CUDA context with it when it ends. All work is replayed from CUDA graphs, so that the CPU's launches
are not what is measured. Times are microseconds, rates 10^9 a second as in figures.KernelCurve.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

FEATURES = 4096
TOKENS = (1, 16, 64, 256, 1024, 4096)
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
POSITIONS = (256, 1024, 4096, 16384, 65536)
PROMPTS = (16, 64, 256, 1024, 4096)
# Operands of one pass over all copies: more than any L2 cache holds.
_PASS_BYTES = 512 << 20


def main(device: int, repeats: int) -> dict[str, Any]:
    """The document: versions and the points of each curve."""
    import torch

    torch.cuda.set_device(device)
    torch.manual_seed(0)
    with torch.inference_mode():
        return {
            "torch": torch.__version__,
            "name": torch.cuda.get_device_name(device),
            "linear": [_linear(tokens, repeats) for tokens in TOKENS],
            "attention_decode": [_decode(positions, repeats) for positions in POSITIONS],
            "attention_prefill": [_prefill(tokens, repeats) for tokens in PROMPTS],
        }


def _linear(tokens: int, repeats: int) -> dict[str, Any]:
    """torch.matmul of tokens x 4096 with 4096 x 4096 in bf16; the weights come from device memory."""
    import torch

    copies = _PASS_BYTES // (2 * FEATURES * FEATURES)
    weights = [_random(FEATURES, FEATURES) for _ in range(copies)]
    x = _random(tokens, FEATURES)
    out = _random(tokens, FEATURES)
    times = _times([partial(torch.matmul, x, w.t(), out=out) for w in weights], repeats)
    return _point(tokens, FEATURES * FEATURES, times)


def _decode(positions: int, repeats: int) -> dict[str, Any]:
    """One token's attention over a KV cache of ``positions`` in bf16 that comes from device memory."""
    copies = max(1, min(64, _PASS_BYTES // (4 * KV_HEADS * HEAD_DIM * positions)))
    caches = [
        (_random(1, KV_HEADS, positions, HEAD_DIM), _random(1, KV_HEADS, positions, HEAD_DIM)) for _ in range(copies)
    ]
    q = _random(1, HEADS, 1, HEAD_DIM)
    times = _times([partial(_attention, q, k, v, False) for k, v in caches], repeats)
    return _point(positions, HEADS * 2 * HEAD_DIM * positions, times)


def _prefill(tokens: int, repeats: int) -> dict[str, Any]:
    """Causal attention of a prompt of ``tokens`` in bf16; multiply-adds are those of the causal half."""
    q = _random(1, HEADS, tokens, HEAD_DIM)
    k, v = _random(1, KV_HEADS, tokens, HEAD_DIM), _random(1, KV_HEADS, tokens, HEAD_DIM)
    times = _times([partial(_attention, q, k, v, True)] * 8, repeats)
    return _point(tokens, HEADS * 2 * HEAD_DIM * tokens * (tokens + 1) // 2, times)


def _attention(q: Any, k: Any, v: Any, causal: bool) -> None:  # noqa: ANN401 - torch is imported late
    import torch.nn.functional as functional

    functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def _random(*shape: int) -> Any:  # noqa: ANN401
    import torch

    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def _times(calls: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Microseconds of one call: means over all of them in a row, in a graph, on the GPU's clock."""
    import torch

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for i in range(repeats + 2):  # two warm up
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i > 1:
            times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return times


def _point(size: int, work: int, times: list[float]) -> dict[str, Any]:
    rates = [work / us * 1e-3 for us in times]
    return {"size": size, "rate": statistics.median(rates), "samples": rates, "us": statistics.median(times)}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), 3 if "quick" in sys.argv else 9)))

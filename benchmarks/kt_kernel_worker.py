"""Worker that runs one MoE layer through kt-kernel: CLASS --threads N and the layer's sizes.

Runs in the peers' environment (torch, kt-kernel without its dependencies). Weights are random; CLASS is one of
kt_kernel_ext.moe's, for example AMXInt4_MOE (a scale a row), or AMXInt4_KGroup_MOE and AVX2RawInt4_MOE (a scale for 32
columns, 4.5 bits; the latter for CPUs without AMX).
"""

from __future__ import annotations

import argparse
import time

import kt_kernel
import torch
from kt_kernel import kt_kernel_ext as ext

from benchmarks.worker import serve

GROUP = 32


def quantise(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[E, n, k] as nibbles [E, n, k / 2] and scales [E, n, k / 32] in bf16, absmax / 7."""
    groups = w.float().unflatten(-1, (-1, GROUP))
    scales = (groups.abs().amax(-1, keepdim=True) / 7).clamp_min(1e-8).to(torch.bfloat16)
    codes = ((groups / scales.float()).round().clamp(-8, 7) + 8).to(torch.uint8).flatten(-2)
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).contiguous(), scales.squeeze(-1).contiguous()


def main() -> None:
    """Serves version and seconds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    for option in ("threads", "experts", "hidden", "intermediate", "top-k", "most-tokens"):
        parser.add_argument(f"--{option}", type=int, required=True)
    o = parser.parse_args()
    e, k, h, i = o.experts, o.top_k, o.hidden, o.intermediate
    pool = ext.WorkerPoolConfig()
    pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [o.threads]
    cpu = ext.CPUInfer(pool)
    torch.manual_seed(0)
    distinct = min(e, 16)
    gate = (torch.randn(distinct, i, h) / h**0.5).to(torch.bfloat16).repeat(e // distinct, 1, 1).contiguous()
    down = (torch.randn(distinct, h, i) / i**0.5).to(torch.bfloat16).repeat(e // distinct, 1, 1).contiguous()
    held = [gate, down, torch.zeros(e, dtype=torch.bool), torch.arange(e, dtype=torch.int64).contiguous()]
    config = ext.moe.MOEConfig(e, k, h, i, held[2].data_ptr())
    config.layer_idx, config.max_len, config.pool = 0, o.most_tokens, cpu.backend_
    config.gate_proj, config.up_proj, config.down_proj = gate.data_ptr(), gate.data_ptr(), down.data_ptr()
    config.gate_scale = config.up_scale = config.down_scale = 0
    if "KGroup" in o.name or "RawInt4" in o.name:
        (gq, gs), (dq, ds) = quantise(gate), quantise(down)
        held += [gq, gs, dq, ds]
        config.gate_proj, config.up_proj, config.down_proj = gq.data_ptr(), gq.data_ptr(), dq.data_ptr()
        config.gate_scale, config.up_scale, config.down_scale = gs.data_ptr(), gs.data_ptr(), ds.data_ptr()
        config.quant_config.bits, config.quant_config.group_size, config.quant_config.zero_point = 4, GROUP, False
    moe = getattr(ext.moe, o.name)(config)
    cpu.submit(moe.load_weights_task(held[3].data_ptr()))
    cpu.sync()
    torch.set_num_threads(1)

    def seconds(tokens: int, calls: int) -> float:
        """Of one call, the mean of ``calls``; every call routes its tokens anew, uniformly."""
        x = torch.randn(tokens, h).to(torch.bfloat16).contiguous()
        weights = torch.rand(tokens, k).contiguous()
        y = torch.empty(tokens, h, dtype=torch.bfloat16)
        count = torch.tensor([tokens], dtype=torch.int32)
        routes = [
            torch.stack([torch.randperm(e)[:k] for _ in range(tokens)]).contiguous() for _ in range(min(calls, 64))
        ]

        def call(n: int) -> None:
            ids = routes[n % len(routes)]
            pointers = (ids.data_ptr(), weights.data_ptr(), x.data_ptr(), y.data_ptr())
            cpu.submit(moe.forward_task(count.data_ptr(), k, *pointers, False))
            cpu.sync()

        call(0)
        start = time.perf_counter()
        for n in range(calls):
            call(n)
        return (time.perf_counter() - start) / calls

    serve(
        {"seconds": seconds, "version": lambda: {"kt-kernel": f"{kt_kernel.__version__} {kt_kernel.__cpu_variant__}"}}
    )


if __name__ == "__main__":
    main()

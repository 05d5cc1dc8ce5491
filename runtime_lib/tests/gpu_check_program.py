"""Writes the folder that ``gpu_check`` loads: python gpu_check_program.py FOLDER [CC ...]. Needs triton, no GPU."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

WIDTH = 2048  # f32 values that cross in each direction: a hidden state
BLOCK = 256
LAYERS = 48


@triton.jit
def add_one(x, y, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """y[n] = x[n] + 1, f32."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n) + 1, mask=i < n)


def compile_kernel(folder: Path, cc: int) -> dict[str, Any]:
    """The kernel's record for kernels.json; writes its cubin."""
    source = ASTSource(
        fn=add_one,
        signature={"x": "*fp32", "y": "*fp32", "n": "i32", "BLOCK": "constexpr"},
        constexprs={"BLOCK": BLOCK},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(3)},
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", cc, 32), options={"num_warps": 4})
    file = f"sm_{cc}/add_one.cubin"
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(kernel.asm["cubin"])
    return {
        "name": "add_one",
        "entry": kernel.metadata.name,
        "cc": cc,
        "file": file,
        "sha256": hashlib.sha256(kernel.asm["cubin"]).hexdigest(),
        "num_warps": kernel.metadata.num_warps,
        "shared_bytes": kernel.metadata.shared,
        "global_scratch_bytes": kernel.metadata.global_scratch_size,
        "arguments": [{"name": "x", "type": "ptr"}, {"name": "y", "type": "ptr"}, {"name": "n", "type": "i32"}],
    }


def nodes(hand_overs: bool, work: str | None) -> list[dict[str, Any]]:
    """The graph of a step. ``work``: where a kernel stands that the GPU runs while the CPU computes, as a shared expert
    would: on a branch of its own ("beside"), or in line between asking and awaiting ("between")."""
    steps: list[dict[str, Any]] = []

    def kernel(source: str, target: str, after: list[int]) -> int:
        arguments = [{"buffer": source, "offset": 0}, {"buffer": target, "offset": 0}, {"i32": WIDTH}]
        steps.append({"kernel": "add_one", "grid": [WIDTH // BLOCK, 1, 1], "arguments": arguments, "after": after})
        return len(steps) - 1

    def hand_over(flag: int, to: str, after: list[int]) -> int:
        ends = {"from": "gpu:0", "to": to} if to == "cpu" else {"from": "cpu", "to": to}
        steps.append({"hand_over": {"flag": flag, **ends}, "after": after})
        return len(steps) - 1

    last: list[int] = []
    for layer in range(LAYERS):
        source = "input" if layer == 0 else "x"
        last = [kernel(source, "crossing", last)]
        if hand_overs:
            asked = hand_over(layer, "cpu", last)
            meanwhile = [kernel("x", "meanwhile", [asked])] if work else []
            last = [hand_over(layer, "gpu:0", meanwhile if work == "between" else [asked])]
            last += meanwhile if work == "beside" else []
        last = [kernel("crossing", "output" if layer == LAYERS - 1 else "x", last)]
    return steps


def main() -> None:
    """Writes gpu/ and check.json into the folder of the command line."""
    folder = Path(sys.argv[1])
    gpu = folder / "gpu"
    records = [compile_kernel(gpu, int(cc)) for cc in sys.argv[2:] or ["90"]]
    (gpu / "kernels.json").write_text(json.dumps({"schema": [1, 0], "kernels": records}, indent=1))
    variants: dict[str, dict[str, Any]] = {
        "with_hand_overs": {"batch": 1, "hand_overs": True, "work": None},
        "with_hand_overs_and_work_beside": {"batch": 2, "hand_overs": True, "work": "beside"},
        "with_hand_overs_and_work_between": {"batch": 3, "hand_overs": True, "work": "between"},
        "without_hand_overs": {"batch": 4, "hand_overs": False, "work": None},
    }
    kinds = {"input": "step", "output": "pinned_out", "crossing": "pinned_out", "x": "arena", "meanwhile": "arena"}
    program = {
        "schema": [5, 0],
        "device": "gpu:0",
        "device_bytes": 1 << 20,
        "flags": LAYERS,
        "buffers": [{"name": name, "bytes": 4 * WIDTH, "kind": kind} for name, kind in kinds.items()],
        "graphs": [
            {"batch": v["batch"], "exact": True, "nodes": nodes(v["hand_overs"], v["work"])} for v in variants.values()
        ],
    }
    (gpu / "program.json").write_text(json.dumps(program))
    (folder / "check.json").write_text(json.dumps({"layers": LAYERS, "variants": variants}))


if __name__ == "__main__":
    main()

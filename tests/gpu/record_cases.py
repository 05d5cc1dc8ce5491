"""Records what the interpreter tests of GPU kernels run, so that tests/gpu/replay_cases.py can run the cubins on a
machine with a GPU and the driver, numpy and nothing else.

HETCOMP_GPU_CASES=FOLDER pytest tests/unit/test_gpu_kernels_linear.py ... records each run into FOLDER (for the compute
capability HETCOMP_GPU_CASES_CC, 90 if it is not set).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hetcomp.backends.gpu.compile_kernels import CompiledKernel, compile_kernels
from hetcomp.backends.gpu.kernels import GpuCode, Launch, Operand

Bytes = npt.NDArray[np.uint8]


def folder() -> Path | None:
    """Where to record; None: nowhere."""
    name = os.environ.get("HETCOMP_GPU_CASES")
    return Path(name) if name else None


def record(
    target: Path,
    code: GpuCode,
    before: Mapping[str, Bytes],
    after: Mapping[str, Bytes],
    slot_blocks: int,
    rows: int,
    guard: int,
) -> None:
    """One run: buffers with their guard zones before it, those that it writes after it, by :func:`buffer_name`; rows of
    the grids."""
    cc = int(os.environ.get("HETCOMP_GPU_CASES_CC", "90"))
    made = {m.kernel: m for m in compile_kernels([launch.kernel for launch in code.launches], (cc,), threads=1)}
    target.mkdir(parents=True, exist_ok=True)
    for kernel in made.values():
        shutil.copyfile(kernel.cubin, target / f"{kernel.kernel.name}.cubin")
    launches = [_launch(launch, made[launch.kernel], slot_blocks, rows) for launch in code.launches]
    case = {"test": os.environ.get("PYTEST_CURRENT_TEST", ""), "guard": guard, "launches": launches}
    arrays = {f"before.{n}": a for n, a in before.items()} | {f"after.{n}": a for n, a in after.items()}
    digest = hashlib.sha256(json.dumps(case).encode() + b"".join(a.tobytes() for a in before.values()))
    stem = target / digest.hexdigest()[:16]
    np.savez_compressed(stem.with_suffix(".npz"), **arrays)  # type: ignore[arg-type]  # names are ours
    stem.with_suffix(".json").write_text(json.dumps(case))


def buffer_name(source: str, key: object) -> str:
    """The buffer of an operand: ``input_0``, ``step_rows``, .."""
    return f"{source}_{key}"


def _launch(launch: Launch, made: CompiledKernel, slot_blocks: int, rows: int) -> dict[str, Any]:
    return {
        "cubin": f"{made.kernel.name}.cubin",
        "entry": made.entry,
        "threads": 32 * made.num_warps,
        "shared_bytes": made.shared_bytes,
        "grid": [axis.programs(rows) for axis in launch.grid],
        "arguments": [_argument(operand, slot_blocks) for operand in launch.operands],
    }


def _argument(operand: Operand, slot_blocks: int) -> dict[str, Any]:
    if operand.source == "slot_blocks":
        return {"i32": slot_blocks}
    key = operand.name if operand.source in ("step", "adapters") else operand.index
    return {"buffer": buffer_name(operand.source, key), "offset": operand.offset}

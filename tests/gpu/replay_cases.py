"""Runs recorded launches (tests/gpu/record_cases.py) on a GPU and compares with what Triton's interpreter made of them.

    python3 replay_cases.py FOLDER

Needs the NVIDIA driver and numpy. Prints the largest error of each test relative to its largest number; exit code 1 if
one is above 1e-3 (order of sums and bf16 that rounds to the other side explain less), whole numbers differ, or a byte
outside of an output is written.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_TOLERANCE = 1e-3
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_FREE_SHARED = 48 * 1024  # what a kernel may have without asking


class Driver:
    """The few calls of the CUDA driver that a replay takes, on the first GPU."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self("cuInit", 0)
        self("cuDeviceGet", ctypes.byref(device), 0)
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self("cuCtxSetCurrent", context)

    def __call__(self, name: str, *arguments: Any) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code != 0:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorName(code, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'?').decode()}")

    def upload(self, data: npt.NDArray[np.uint8]) -> ctypes.c_uint64:
        """A new buffer with these bytes."""
        address = ctypes.c_uint64()
        self("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(1, data.nbytes)))
        self("cuMemcpyHtoD_v2", address, ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(data.nbytes))
        return address

    def download(self, address: ctypes.c_uint64, size: int) -> npt.NDArray[np.uint8]:
        """The buffer's bytes."""
        data = np.empty(size, np.uint8)
        self("cuMemcpyDtoH_v2", ctypes.c_void_p(data.ctypes.data), address, ctypes.c_size_t(size))
        return data

    def launch(self, folder: Path, launch: dict[str, Any], addresses: dict[str, ctypes.c_uint64], guard: int) -> None:
        """Loads the cubin, runs it and waits for its end."""
        if 0 in launch["grid"]:
            return
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self("cuModuleLoad", ctypes.byref(module), str(folder / launch["cubin"]).encode())
        self("cuModuleGetFunction", ctypes.byref(function), module, launch["entry"].encode())
        if launch["shared_bytes"] > _FREE_SHARED:
            self("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, launch["shared_bytes"])
        values: list[ctypes.c_int32 | ctypes.c_uint64] = [
            ctypes.c_int32(a["i32"])
            if "i32" in a
            else ctypes.c_uint64(addresses[a["buffer"]].value + guard + a["offset"])
            for a in launch["arguments"]
        ]
        values += [ctypes.c_uint64(0), ctypes.c_uint64(0)]  # global and profile scratch memory: none
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        shape = *launch["grid"], launch["threads"], 1, 1
        self("cuLaunchKernel", function, *shape, launch["shared_bytes"], None, pointers, None)
        self("cuCtxSynchronize")
        self("cuModuleUnload", module)


def replay(driver: Driver, folder: Path, case: dict[str, Any], arrays: dict[str, npt.NDArray[np.uint8]]) -> float:
    """The largest error of the case relative to its largest number; infinity if anything else is wrong."""
    guard = case["guard"]
    before = {n.removeprefix("before."): a for n, a in arrays.items() if n.startswith("before.")}
    after = {n.removeprefix("after."): a for n, a in arrays.items() if n.startswith("after.")}
    addresses = {name: driver.upload(data) for name, data in before.items()}
    worst = 0.0
    for launch in case["launches"]:
        driver.launch(folder, launch, addresses, guard)
    for name, data in before.items():
        got = driver.download(addresses[name], data.nbytes)
        driver("cuMemFree_v2", addresses[name])
        body = slice(guard, data.nbytes - guard)
        outside = np.ones(data.nbytes, bool)
        outside[body] = False
        if not np.array_equal(got[outside], data[outside]):
            worst = np.inf
        if name in after:
            worst = max(worst, error(got[body], after[name][body]))
        elif not name.startswith("workspace") and not np.array_equal(got, data):
            worst = np.inf
    return worst


def error(got: npt.NDArray[np.uint8], want: npt.NDArray[np.uint8]) -> float:
    """Relative to the largest number wanted, 0 if all bytes are equal; bytes are f32 where they can be."""
    if np.array_equal(got, want):
        return 0.0
    if want.size % 4:
        return float("inf")
    a, b = (x.copy().view(np.float32).astype(np.float64) for x in (got, want))
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return float("inf")
    finite = np.isfinite(b)
    largest = np.abs(b[finite]).max(initial=0.0)
    if largest < 1e-30:  # whole numbers, read as f32
        return float("inf")
    return float(np.abs(a - b)[finite].max() / largest)


def main() -> int:
    """0 if all cases agree."""
    folder, driver = Path(sys.argv[1]), Driver()
    worst: dict[str, float] = {}
    cases = sorted(folder.glob("*.json"))
    for path in cases:
        case = json.loads(path.read_text())
        with np.load(path.with_suffix(".npz")) as stored:
            found = replay(driver, folder, case, dict(stored))
        worst[case["test"]] = max(worst.get(case["test"], 0.0), found)
    failed = [test for test, found in worst.items() if found > _TOLERANCE]
    for test, found in sorted(worst.items(), key=lambda item: -item[1]):
        print(f"{found:9.2e}  {test}")
    print(f"{len(cases)} runs of {len(worst)} tests, {len(failed)} tests off")
    return 1 if failed or not cases else 0


if __name__ == "__main__":
    sys.exit(main())

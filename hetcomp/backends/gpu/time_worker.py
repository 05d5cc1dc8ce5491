"""A process that times launches on the first GPU: one JSON job a line in, one JSON answer a line out.

It needs the driver and numpy, and nothing of CUDA. A process of its own, because a fault of a kernel takes the CUDA
context of its process with it. Run by hetcomp.backends.gpu.tile_timer; alone, with a file of jobs as its argument, it
prints its answers.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Json = dict[str, Any]
_REPEATS = 9
# Written before each repeat: more than any GPU's L2 cache, twice, so that the launches are waiting when it is done.
_FLUSH_BYTES, _FLUSHES = 256 << 20, 2
_CHUNK_BYTES = 16 << 20
_SHARED_ATTRIBUTE, _SHARED_WITHOUT_ASKING = 8, 48 << 10  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


class Driver:
    """libcuda.so.1 with its first device's context current. Raises OSError without a driver, RuntimeError naming the
    call that failed."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self.call("cuInit", 0)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        name = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", name, len(name), device)
        version, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self.call("cuDriverGetVersion", ctypes.byref(version))
        self.call("cuDeviceGetAttribute", ctypes.byref(major), _MAJOR, device)
        self.call("cuDeviceGetAttribute", ctypes.byref(minor), _MINOR, device)
        self.facts = {"gpu": name.value.decode(), "driver": version.value, "cc": 10 * major.value + minor.value}
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)

    def call(self, name: str, *arguments: object) -> None:
        """Calls a function of the driver."""
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            raise RuntimeError(f"{name} failed with {code}")

    def allocate(self, size: int) -> int:
        """An address of device memory."""
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 16)))
        return address.value

    def fill(self, address: int, size: int, byte: int) -> None:
        """Sets memory to a byte."""
        if size:
            self.call("cuMemsetD8_v2", ctypes.c_uint64(address), ctypes.c_ubyte(byte), ctypes.c_size_t(size))

    def write(self, address: int, size: int, pattern: bytes) -> None:
        """Fills memory with a pattern again and again."""
        chunk = pattern * max(1, min(_CHUNK_BYTES // len(pattern), -(-size // len(pattern))))
        for at in range(0, size, len(chunk)):
            length = ctypes.c_size_t(min(len(chunk), size - at))
            self.call("cuMemcpyHtoD_v2", ctypes.c_uint64(address + at), chunk, length)

    def read(self, address: int, size: int) -> NDArray[np.uint8]:
        """A copy of memory."""
        data = np.empty(size, np.uint8)
        self.call(
            "cuMemcpyDtoH_v2", data.ctypes.data_as(ctypes.c_void_p), ctypes.c_uint64(address), ctypes.c_size_t(size)
        )
        return data


class _Launch:
    """A launch ready to go."""

    def __init__(self, driver: Driver, spec: _Json, addresses: dict[str, int], scratch: int) -> None:
        self._driver = driver
        self.module, function = ctypes.c_void_p(), ctypes.c_void_p()
        driver.call("cuModuleLoadData", ctypes.byref(self.module), Path(spec["cubin"]).read_bytes())
        driver.call("cuModuleGetFunction", ctypes.byref(function), self.module, spec["entry"].encode())
        if spec["shared_bytes"] > _SHARED_WITHOUT_ASKING:
            driver.call("cuFuncSetAttribute", function, _SHARED_ATTRIBUTE, spec["shared_bytes"])
        self._values: list[Any] = [
            ctypes.c_int32(a["i32"]) if "i32" in a else ctypes.c_uint64(addresses[a["buffer"]] + a["offset"])
            for a in spec["arguments"]
        ]
        self._values += [ctypes.c_uint64(scratch), ctypes.c_uint64(0)]
        pointers = (ctypes.c_void_p * len(self._values))(*(ctypes.addressof(v) for v in self._values))
        threads = 32 * spec["num_warps"]
        self._arguments = (function, *spec["grid"], threads, 1, 1, spec["shared_bytes"], None, pointers, None)

    def go(self) -> None:
        self._driver.call("cuLaunchKernel", *self._arguments)

    def close(self) -> None:
        self._driver.call("cuModuleUnload", self.module)


class Bench:
    """Runs jobs: ``buffers`` by name (bytes; pattern, a file, or null), ``outputs`` by name (a numpy type, or bf16),
    ``variants``: lists of launches that should write the same. The first variant is what the others are compared
    with."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._flush = driver.allocate(_FLUSH_BYTES)
        self._events: list[ctypes.c_void_p] = []

    def run(self, job: _Json) -> list[_Json]:
        """Of each variant the median microseconds of each launch, and how far its outputs are from the first's: the
        norm of the difference in parts of the norm. Raises RuntimeError if a call fails."""
        with self._memory(job["buffers"]) as addresses:
            answers: list[_Json] = []
            wanted: dict[str, NDArray[np.float32]] = {}
            for variant in job["variants"]:
                us = self._times(variant, job, addresses)
                difference = 0.0
                for name, kind in job["outputs"].items():
                    got = _numbers(self._driver.read(addresses[name], job["buffers"][name]["bytes"]), kind)
                    want = wanted.setdefault(name, got)
                    difference = max(difference, _difference(got, want))
                answers.append({"us": us, "difference": difference})
            return answers

    @contextmanager
    def _memory(self, buffers: _Json) -> Any:  # noqa: ANN401 - a generator of a context manager
        addresses: dict[str, int] = {}
        try:
            for name, spec in buffers.items():
                addresses[name] = self._driver.allocate(spec["bytes"])
                if spec["pattern"]:
                    self._driver.write(addresses[name], spec["bytes"], Path(spec["pattern"]).read_bytes())
            yield addresses
        finally:
            for address in addresses.values():
                self._driver.call("cuMemFree_v2", ctypes.c_uint64(address))

    def _times(self, variant: list[_Json], job: _Json, addresses: dict[str, int]) -> list[float]:
        driver = self._driver
        for name, spec in job["buffers"].items():
            if not spec["pattern"]:
                driver.fill(addresses[name], spec["bytes"], 0xFF)  # NaN, and -1
        scratch = driver.allocate(max((s["scratch_bytes"] for s in variant), default=0))
        launches = [_Launch(driver, spec, addresses, scratch) for spec in variant]
        for launch in launches:
            launch.go()
        driver.call("cuCtxSynchronize")
        samples = [self._once(launches) for _ in range(_REPEATS)]
        for launch in launches:
            launch.close()
        driver.call("cuMemFree_v2", ctypes.c_uint64(scratch))
        return [statistics.median(of_launch) for of_launch in zip(*samples, strict=True)]

    def _once(self, launches: Sequence[_Launch]) -> list[float]:
        """Microseconds of the launches, one after the other, with nothing in the cache before the first."""
        driver = self._driver
        while len(self._events) <= len(launches):
            self._events.append(ctypes.c_void_p())
            driver.call("cuEventCreate", ctypes.byref(self._events[-1]), 0)
        for _ in range(_FLUSHES):
            self._driver.call(
                "cuMemsetD8Async", ctypes.c_uint64(self._flush), ctypes.c_ubyte(0), ctypes.c_size_t(_FLUSH_BYTES), None
            )
        driver.call("cuEventRecord", self._events[0], None)
        for launch, event in zip(launches, self._events[1:], strict=False):
            launch.go()
            driver.call("cuEventRecord", event, None)
        driver.call("cuCtxSynchronize")
        times = []
        for before, after in zip(self._events, self._events[1 : len(launches) + 1], strict=False):
            ms = ctypes.c_float()
            driver.call("cuEventElapsedTime", ctypes.byref(ms), before, after)
            times.append(ms.value * 1e3)
        return times


def _numbers(data: NDArray[np.uint8], kind: str) -> NDArray[np.float32]:
    if kind == "bf16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data.view(kind).astype(np.float32)


def _difference(got: NDArray[np.float32], want: NDArray[np.float32]) -> float:
    """Infinite where a number is not finite."""
    if not (np.isfinite(got).all() and np.isfinite(want).all()):
        return float("inf")
    norm = float(np.linalg.norm(want))
    return float(np.linalg.norm(got - want)) / norm if norm else float("inf")


def main() -> None:
    """Tells of the GPU, then answers jobs until the input ends. After an error nothing more is answered."""
    answers, sys.stdout = sys.stdout, sys.stderr
    lines = Path(sys.argv[1]).read_text().splitlines() if len(sys.argv) > 1 else sys.stdin
    try:
        driver = Driver()
        bench = Bench(driver)
        print(json.dumps(driver.facts), file=answers, flush=True)
        for line in lines:
            print(json.dumps({"variants": bench.run(json.loads(line))}), file=answers, flush=True)
    except (OSError, RuntimeError, AttributeError) as error:
        print(json.dumps({"error": str(error)}), file=answers, flush=True)


if __name__ == "__main__":
    main()

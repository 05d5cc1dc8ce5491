"""What times launches, on a driver that is made up: what is filled, compared and timed; and a process without a GPU."""

from __future__ import annotations

import ctypes
import ctypes.util
from typing import Any

import numpy as np
import pytest

from hetcomp.backends.gpu import tile_timer
from hetcomp.backends.gpu.tile_timer import GpuTimer, TimedBuffer, TimingJob
from hetcomp.backends.gpu.time_worker import Bench, Driver


class FakeDriver(Driver):
    """Host memory; a kernel's image is the name of what it does: ``copy``, ``double`` or ``nan`` of x to y, ``fail``.
    A launch takes as many milliseconds as its grid has programs."""

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.calls: list[str] = []
        self.modules: list[str] = []
        self.clock = 0.0
        self.at: dict[int, float] = {}

    def allocate(self, size: int) -> int:
        buffer = ctypes.create_string_buffer(max(size, 1))
        self.memory[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def call(self, name: str, *arguments: Any) -> None:
        self.calls.append(name)
        handler = getattr(self, f"_{name}", None)
        if handler is not None:
            handler(*arguments)

    def _cuMemsetD8_v2(self, address: Any, byte: Any, size: Any) -> None:
        ctypes.memset(address.value, byte.value, size.value)

    def _cuMemcpyHtoD_v2(self, address: Any, data: bytes, size: Any) -> None:
        ctypes.memmove(address.value, data, size.value)

    def _cuMemcpyDtoH_v2(self, target: Any, address: Any, size: Any) -> None:
        ctypes.memmove(target, address.value, size.value)

    def _cuMemFree_v2(self, address: Any) -> None:
        del self.memory[address.value]

    def _cuModuleLoadData(self, module: Any, image: bytes) -> None:
        self.modules.append(image.decode())
        module._obj.value = len(self.modules)

    def _cuModuleGetFunction(self, function: Any, module: Any, entry: bytes) -> None:
        function._obj.value = module.value

    def _cuEventCreate(self, event: Any, flags: int) -> None:
        event._obj.value = len(self.at) + 1
        self.at[event._obj.value] = 0.0

    def _cuEventRecord(self, event: Any, stream: None) -> None:
        self.at[event.value] = self.clock

    def _cuEventElapsedTime(self, ms: Any, before: Any, after: Any) -> None:
        ms._obj.value = self.at[after.value] - self.at[before.value]

    def _cuLaunchKernel(self, function: Any, x: int, y: int, z: int, *rest: Any) -> None:
        pointers = rest[5]
        source, target = (ctypes.cast(pointers[i], ctypes.POINTER(ctypes.c_uint64)).contents.value for i in (0, 1))
        what = self.modules[function.value - 1]
        if what == "fail":
            raise RuntimeError("cuLaunchKernel failed with 700")
        numbers = np.frombuffer(self.memory[source], np.float32, 4).copy()
        done = numbers * {"copy": 1, "double": 2, "nan": np.nan}[what]
        ctypes.memmove(target, done.astype(np.float32).tobytes(), 16)
        self.clock += x * y * z


@pytest.fixture
def job(tmp_path):
    (tmp_path / "x").write_bytes(np.array([1, 2], np.float32).tobytes())

    def launch(what: str, grid: int) -> dict[str, Any]:
        (tmp_path / what).write_text(what)
        arguments = [{"buffer": "x", "offset": 0}, {"buffer": "y", "offset": 0}]
        facts = {"entry": "k", "num_warps": 4, "shared_bytes": 0, "scratch_bytes": 0}
        return {"cubin": str(tmp_path / what), "grid": [grid, 1, 1], "arguments": arguments, **facts}

    def made(*variants: list[tuple[str, int]]) -> dict[str, Any]:
        buffers = {"x": {"bytes": 16, "pattern": str(tmp_path / "x")}, "y": {"bytes": 16, "pattern": None}}
        listed = [[launch(*each) for each in variant] for variant in variants]
        return {"buffers": buffers, "outputs": {"y": "float32"}, "variants": listed}

    return made


def test_times_of_each_launch_and_differences_from_the_first(job):
    driver = FakeDriver()
    answers = Bench(driver).run(job([("copy", 3), ("copy", 5)], [("copy", 2)], [("double", 1)], [("nan", 1)]))
    assert [answer["us"] for answer in answers] == [[3000.0, 5000.0], [2000.0], [1000.0], [1000.0]]
    # The pattern 1, 2 is repeated; twice as much is off by the norm itself.
    assert [answer["difference"] for answer in answers] == [0.0, 0.0, pytest.approx(1.0), float("inf")]
    assert len(driver.memory) == 1  # what is written to empty the cache
    assert driver.calls.count("cuModuleLoadData") == driver.calls.count("cuModuleUnload") == 5


def test_a_fault_is_an_error_of_the_job(job):
    with pytest.raises(RuntimeError, match="cuLaunchKernel failed with 700"):
        Bench(FakeDriver()).run(job([("copy", 1)], [("fail", 1)]))


@pytest.mark.skipif(ctypes.util.find_library("cuda") is not None, reason="this machine has a driver")
def test_without_a_driver_there_is_no_timer():
    assert GpuTimer.open() is None


def test_a_process_that_ends_fails_its_job_and_the_next_has_another(monkeypatch, tmp_path):
    started: list[object] = []

    class Process:
        stdin, stdout = None, None

        def kill(self) -> None: ...

        def communicate(self) -> None: ...

    def start() -> tuple[Process, dict[str, Any]]:
        started.append(None)
        return Process(), {"gpu": "a GPU", "driver": 13000, "cc": 90}

    answers = iter([{"error": "cuLaunchKernel failed with 700"}, {"variants": [{"us": [1.0], "difference": 0.0}]}])
    monkeypatch.setattr(tile_timer, "_start", start)
    monkeypatch.setattr(tile_timer, "_ask", lambda process, line: next(answers))
    timer = GpuTimer.open()
    assert timer is not None and (timer.name, timer.driver, timer.cc) == ("a GPU", "13000", 90)
    job = TimingJob({"x": TimedBuffer(4)}, {}, [])
    with timer:
        assert timer.time(job) == [] and len(started) == 1
        assert [v.us for v in timer.time(job)] == [(1.0,)] and len(started) == 2

"""The GPUs that the NVIDIA driver knows, asked through its C API. No driver is a normal case."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

from hetcomp.hardware.figures import Gpu, Source

# CUdevice_attribute (cuda.h).
_CLOCK_KHZ, _BUS_BITS, _MAJOR, _MINOR = 36, 37, 75, 76


@dataclass(frozen=True)
class GpuDriver:
    """``state``: ``usable``, ``absent``, or why it cannot be used."""

    state: str
    version: str | None = None
    cuda: str | None = None
    gpus: tuple[Gpu, ...] = ()


def detect_gpus() -> GpuDriver:
    """Asks the driver; never raises."""
    version = _kernel_driver()
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        state = "the kernel driver is loaded but libcuda.so.1 is not installed" if version else "absent"
        return GpuDriver(state, version)
    status = cuda.cuInit(0)
    if status != 0:
        return GpuDriver(f"cuInit failed with CUDA error {status}", version)
    number = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    spelled = f"{number.value // 1000}.{number.value % 1000 // 10}"
    count = ctypes.c_int()
    if cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return GpuDriver("cuDeviceGetCount failed", version, spelled)
    return GpuDriver("usable", version, spelled, tuple(_gpu(cuda, i) for i in range(count.value)))


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device = ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGetName(name, len(name), device)
    memory = ctypes.c_size_t()
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    # Two transfers a clock (DDR); newer drivers report a clock of 0.
    bandwidth = 2 * attribute(_CLOCK_KHZ) * 1e3 * attribute(_BUS_BITS) / 8 / 1e9
    return Gpu(
        name=name.value.decode(errors="replace"),
        memory_bytes=memory.value,
        compute_capability=(attribute(_MAJOR), attribute(_MINOR)),
        gb_per_s=bandwidth or None,
        source=Source.DATA_SHEET,
    )


def _kernel_driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found.group(1) if found else "unknown"

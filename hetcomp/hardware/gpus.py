"""The GPUs that the NVIDIA driver knows, asked through its C API. No driver is a normal case."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

from hetcomp.hardware.figures import Gpu, Source
from hetcomp.hardware.gpu_estimates import completed

# CUdevice_attribute (cuda.h).
_SM_CLOCK_KHZ, _MULTIPROCESSORS, _CLOCK_KHZ, _BUS_BITS, _MAJOR, _MINOR = 13, 16, 36, 37, 75, 76
_NAME_BYTES = 256


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
    name = ctypes.create_string_buffer(_NAME_BYTES)
    cuda.cuDeviceGetName(name, len(name), device)
    memory = ctypes.c_size_t()
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    # Two transfers a clock (DDR); newer drivers report a clock of 0.
    bandwidth = 2 * attribute(_CLOCK_KHZ) * 1e3 * attribute(_BUS_BITS) / 8 / 1e9
    bus_id = _bus_id(cuda, device)
    gpu = Gpu(
        name=name.value.decode(errors="replace"),
        memory_bytes=memory.value,
        free_bytes=_free_bytes(bus_id),
        compute_capability=(attribute(_MAJOR), attribute(_MINOR)),
        gb_per_s=bandwidth or None,
        source=Source.DATA_SHEET,
    )
    return completed(gpu, attribute(_MULTIPROCESSORS), attribute(_SM_CLOCK_KHZ), bus_id)


def _bus_id(cuda: ctypes.CDLL, device: ctypes.c_int) -> str | None:
    text = ctypes.create_string_buffer(_NAME_BYTES)
    if cuda.cuDeviceGetPCIBusId(text, len(text), device) != 0:
        return None
    return text.value.decode(errors="replace") or None


class _Memory(ctypes.Structure):
    """nvmlMemory_t (nvml.h), in bytes."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _free_bytes(bus_id: str | None) -> int | None:
    """Memory that nobody uses, as NVML says (the CUDA driver tells it only to those who take some first); None if there
    is no NVML."""
    if bus_id is None:
        return None
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle, memory = ctypes.c_void_p(), _Memory()
    if nvml.nvmlInit_v2() != 0:
        return None
    try:
        asked = nvml.nvmlDeviceGetHandleByPciBusId_v2(bus_id.encode(), ctypes.byref(handle))
        if asked != 0 or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != 0:
            return None
        return int(memory.free)
    finally:
        nvml.nvmlShutdown()


def _kernel_driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found.group(1) if found else "unknown"

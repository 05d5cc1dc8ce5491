"""What a GPU that nobody measured may be taken for: its data sheet where it ships with hetcomp, else estimates."""

from __future__ import annotations

from pathlib import Path

from hetcomp.hardware.figures import Gpu, GpuRate, Source
from hetcomp.hardware.presets import gpu_names, gpu_preset

# FLOP a clock of a multiprocessor's tensor cores, bf16 with f32 sums, by compute capability (NVIDIA's architecture
# whitepapers: A100 312 TFLOP/s = 108 x 1.41 GHz x 2048, RTX 3090 71 = 82 x 1.70 x 512, RTX 4090 165 = 128 x 2.52 x 512,
# H100 989 = 132 x 1.83 x 4096, RTX 5090 210 = 170 x 2.41 x 512).
_FLOP_A_CLOCK = {80: 2048, 86: 512, 89: 512, 90: 4096, 120: 512}
_LEAST_FLOP_A_CLOCK = 512
_CLOCK_KHZ = 1_500_000  # where the driver does not say
_PCIE_GB_PER_S = 15.8  # 3.0 x16, where the system does not say
# GB/s of a lane at so many GT/s (PCI Express: 8b/10b encoding below 8 GT/s, 128b/130b from there).
_LANE_GB_PER_S = {2.5: 0.25, 5.0: 0.5, 8.0: 0.985, 16.0: 1.969, 32.0: 3.938, 64.0: 7.563}
_PCI_DEVICES = Path("/sys/bus/pci/devices")


def completed(
    gpu: Gpu, multiprocessors: int, clock_khz: int, bus_id: str | None, pci_devices: Path = _PCI_DEVICES
) -> Gpu:
    """``gpu`` with the bandwidths and rates that it lacks: those of the preset of its name, or estimates from its
    multiprocessors, their clock, and its place on the bus (``0000:65:00.0``)."""
    known = next((p.gpu for p in map(gpu_preset, gpu_names()) if p.gpu.name == gpu.name), None)
    if known is not None:
        return gpu.model_copy(
            update={
                "gb_per_s": gpu.gb_per_s or known.gb_per_s,
                "link_gb_per_s": gpu.link_gb_per_s or _link(bus_id, pci_devices) or known.link_gb_per_s,
                "rates": gpu.rates or known.rates,
            }
        )
    major, minor = gpu.compute_capability
    a_clock = _FLOP_A_CLOCK.get(10 * major + minor, _LEAST_FLOP_A_CLOCK)
    tflops = multiprocessors * (clock_khz or _CLOCK_KHZ) * 1e3 * a_clock / 1e12
    return gpu.model_copy(
        update={
            "link_gb_per_s": gpu.link_gb_per_s or _link(bus_id, pci_devices) or _PCIE_GB_PER_S,
            "rates": gpu.rates or (GpuRate(weight_format="bf16", tflops=tflops, source=Source.ESTIMATE),),
        }
    )


def _link(bus_id: str | None, pci_devices: Path) -> float | None:
    """GB/s of the device's link as the system shows it, None if it does not."""
    if not bus_id:
        return None
    folder = pci_devices / bus_id.lower()
    try:
        speed = float((folder / "max_link_speed").read_text(encoding="ascii").split()[0])
        width = int((folder / "max_link_width").read_text(encoding="ascii"))
    except (OSError, ValueError, IndexError):
        return None
    return _LANE_GB_PER_S[speed] * width if speed in _LANE_GB_PER_S and 0 < width <= 32 else None

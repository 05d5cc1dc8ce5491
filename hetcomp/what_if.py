"""What a plan would be on a machine that is like this one, but for one thing."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hetcomp.errors import HetcompError
from hetcomp.hardware.figures import Gpu, KernelCurve, KernelPoint, NumaNode
from hetcomp.hardware.profile import HardwareProfile
from hetcomp.ir.plan import Plan
from hetcomp.passes.device_time import MEMORY_BOUND_TOKENS
from hetcomp.passes.mix_time import mix_us

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>[KMGT]?)(?:i?B)?", re.IGNORECASE)
_CHANGE = re.compile(r"(?P<name>\w+)=(?P<sign>\+?)(?P<number>\d+(?:\.\d+)?)(?P<unit>x|[KMGT]?)(?:i?B)?", re.IGNORECASE)


def parse_size(text: str, what: str) -> int:
    """Bytes of ``16G``, ``512M``, ``1.5T`` (powers of 1024). Raises HetcompError naming ``what``."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise HetcompError(f"{what} {text} is not a size; write it as 16G, 512M or 1.5T (powers of 1024).")
    return int(float(found["number"]) * _UNITS[found["unit"].upper()])


@dataclass(frozen=True)
class Change:
    """``new`` gives the changed figure from the old one."""

    text: str
    name: str
    new: Callable[[float], float]


def parse_change(text: str) -> Change:
    """Reads ``NAME=2x``, ``NAME=+8G`` or ``NAME=90`` (GB/s, us, bytes). Raises HetcompError, with near names."""
    found = _CHANGE.fullmatch(text.strip())
    if found is None:
        raise HetcompError(
            f"--what-if {text} is not understood; write NAME=2x, NAME=+8G or NAME=VALUE with one of "
            f"{', '.join(_CHANGES)}."
        )
    name = found["name"].lower()
    if name not in _CHANGES:
        near = difflib.get_close_matches(name, _CHANGES, n=2, cutoff=0.4)
        meant = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise HetcompError(f"--what-if knows no {name}{meant}; it knows {', '.join(_CHANGES)}.")
    number, unit = float(found["number"]), found["unit"].lower()
    if number == 0 and (unit == "x" or not found["sign"]):
        raise HetcompError(f"--what-if {text} would leave nothing of it; give a figure above zero.")
    if unit == "x":
        return Change(text, name, lambda old: old * number)
    value = number * _UNITS[unit.upper()]
    return Change(text, name, (lambda old: old + value) if found["sign"] else (lambda old: value))


def apply_change(profile: HardwareProfile, change: Change) -> HardwareProfile:
    """The profile with that one thing changed. Raises HetcompError if it has no such thing (a GPU)."""
    if change.name in _GPU_CHANGES and not profile.gpus:
        raise HetcompError(f"--what-if {change.text} speaks of a GPU, but profile {profile.name} has none.")
    changed = _CHANGES[change.name](profile, change.new)
    return changed.model_copy(update={"name": f"{profile.name} with {change.text}"})


def mix_seconds(plan: Plan) -> float:
    """Predicted seconds of the plan's mix: all prompts and answers."""
    return mix_us(plan) / 1e6


def improvements(
    profile: HardwareProfile, seconds: float, seconds_on: Callable[[HardwareProfile], float], most: int = 3
) -> list[tuple[str, float]]:
    """The changes of hardware that would help the mix most, and by how much it would get faster (0.21 = 21 %), each
    planned anew."""
    gains = []
    for label, text in _CANDIDATES.items():
        change = parse_change(text)
        if change.name in _GPU_CHANGES and not profile.gpus:
            continue
        gain = seconds / seconds_on(apply_change(profile, change)) - 1.0
        if gain > 0.005:
            gains.append((label, gain))
    return sorted(gains, key=lambda item: -item[1])[:most]


_CANDIDATES = {
    "+8 GB VRAM": "vram=+8G",
    "GPU memory bandwidth x1.5": "gpu_bandwidth=1.5x",
    "host link x2 (the next PCIe generation)": "link_bandwidth=2x",
    "DRAM bandwidth x1.5": "dram_bandwidth=1.5x",
    "CPU arithmetic x2 (wider ISA or more cores)": "cpu_flops=2x",
    "hand-shakes and barriers at half the time": "handover=0.5x",
}

New = Callable[[float], float]


def _dram_bandwidth(profile: HardwareProfile, new: New) -> HardwareProfile:
    """Reads of all nodes, and the curves where they wait for memory: a rate rises until the kernel's arithmetic holds
    it (its rate from caches, or its multiply-adds a second at many tokens)."""
    old = profile.bandwidth()
    factor = new(old) / old

    def node(n: NumaNode) -> NumaNode:
        points = tuple(p.model_copy(update={"gb_per_s": p.gb_per_s * factor}) for p in n.read_bandwidth)
        return n.model_copy(update={"read_bandwidth": points})

    def curve(c: KernelCurve) -> KernelCurve:
        if c.kernel not in ("linear", "moe_experts") or c.variant not in ("dram", "wide", "small"):
            return c
        # Of small operands, whose activations would hold wide ones to their speed.
        warm = None if c.variant == "wide" else profile.curve(c.kernel, "cache", c.weight_format, c.isa)
        peak = max(p.rate * p.size for p in c.points)

        def ceiling(size: int) -> float:
            cached = warm.rate(size) if warm is not None and size <= MEMORY_BOUND_TOKENS else math.inf
            return min(peak / size, cached)

        points = tuple(
            p.model_copy(update={"rate": max(p.rate * min(1.0, factor), min(p.rate * factor, ceiling(p.size)))})
            for p in c.points
        )
        return c.model_copy(update={"points": points})

    gpus = tuple(
        g.model_copy(update={"joint_gb_per_s": g.joint_gb_per_s * factor}) if g.joint_gb_per_s else g
        for g in profile.gpus
    )
    return profile.model_copy(
        update={
            "nodes": tuple(node(n) for n in profile.nodes),
            "curves": tuple(curve(c) for c in profile.curves),
            "gpus": gpus,
        }
    )


def _cpu_flops(profile: HardwareProfile, new: New) -> HardwareProfile:
    """Rates of matrix products, and the curves where they are bound by arithmetic."""
    factor = new(1.0)
    rates = tuple(r.model_copy(update={"gflops_per_core": r.gflops_per_core * factor}) for r in profile.rates)

    def curve(c: KernelCurve) -> KernelCurve:
        if c.kernel == "elementwise":
            return c
        matrix = c.kernel in ("linear", "moe_experts")
        points = tuple(
            p.model_copy(update={"rate": p.rate * factor}) if not matrix or p.size > MEMORY_BOUND_TOKENS else p
            for p in c.points
        )
        return c.model_copy(update={"points": points})

    return profile.model_copy(update={"rates": rates, "curves": tuple(curve(c) for c in profile.curves)})


def _dram(profile: HardwareProfile, new: New) -> HardwareProfile:
    old = profile.available_bytes()
    factor = new(old) / old
    nodes = tuple(
        n.model_copy(
            update={
                "available_bytes": int(n.available_bytes * factor),
                "memory_bytes": int(n.memory_bytes * max(1.0, factor)),
            }
        )
        for n in profile.nodes
    )
    return profile.model_copy(update={"nodes": nodes})


def _handover(profile: HardwareProfile, new: New) -> HardwareProfile:
    factor = new(1.0)
    gpus = tuple(
        g.model_copy(update={"handshake_us": (6.0 if g.handshake_us is None else g.handshake_us) * factor})
        for g in profile.gpus
    )
    return profile.model_copy(update={"barrier_us": profile.barrier_us * factor, "gpus": gpus})


def _each_gpu(change: Callable[[Gpu, New], Mapping[str, object]]) -> Callable[[HardwareProfile, New], HardwareProfile]:
    def apply(profile: HardwareProfile, new: New) -> HardwareProfile:
        return profile.model_copy(
            update={"gpus": tuple(g.model_copy(update=dict(change(g, new))) for g in profile.gpus)}
        )

    return apply


def _vram(gpu: Gpu, new: New) -> Mapping[str, object]:
    free = gpu.memory_bytes if gpu.free_bytes is None else gpu.free_bytes
    return {"memory_bytes": int(max(gpu.memory_bytes, new(free))), "free_bytes": int(new(free))}


def _gpu_bandwidth(gpu: Gpu, new: New) -> Mapping[str, object]:
    """Reads, and the curves where they wait for them: up to the multiply-adds a second that the kernel reaches."""
    if not gpu.gb_per_s:
        return {}
    factor = new(gpu.gb_per_s) / gpu.gb_per_s

    def curve(c: KernelCurve) -> KernelCurve:
        if c.kernel not in ("linear", "moe_experts", "attention_decode"):
            return c
        peak = max(p.rate * p.size for p in c.points)

        def rate(p: KernelPoint) -> float:
            if c.kernel == "attention_decode":
                return p.rate * factor
            return max(p.rate * min(1.0, factor), min(p.rate * factor, peak / p.size))

        return c.model_copy(update={"points": tuple(p.model_copy(update={"rate": rate(p)}) for p in c.points)})

    return {"gb_per_s": gpu.gb_per_s * factor, "curves": tuple(map(curve, gpu.curves))}


def _gpu_flops(gpu: Gpu, new: New) -> Mapping[str, object]:
    """Rates of matrix products, and the curves where arithmetic bounds them (half of its best rate or more)."""
    best = max((r.tflops for r in gpu.rates), default=1.0)
    factor = new(best) / best

    def curve(c: KernelCurve) -> KernelCurve:
        if c.kernel not in ("linear", "moe_experts", "attention_prefill"):
            return c
        weights = c.kernel != "attention_prefill"
        done = [p.rate * p.size if weights else p.rate for p in c.points]
        points = tuple(
            p.model_copy(update={"rate": p.rate * factor}) if d >= max(done) / 2 else p
            for p, d in zip(c.points, done, strict=True)
        )
        return c.model_copy(update={"points": points})

    rates = tuple(r.model_copy(update={"tflops": new(r.tflops)}) for r in gpu.rates)
    return {"rates": rates, "curves": tuple(map(curve, gpu.curves))}


def _link(gpu: Gpu, new: New) -> Mapping[str, object]:
    if gpu.link_gb_per_s is None:
        return {}
    factor = new(gpu.link_gb_per_s) / gpu.link_gb_per_s
    copies = tuple(
        c.model_copy(
            update={
                "to_device_gb_per_s": c.to_device_gb_per_s * factor,
                "to_host_gb_per_s": c.to_host_gb_per_s * factor,
            }
        )
        for c in gpu.copies
    )
    return {"link_gb_per_s": gpu.link_gb_per_s * factor, "copies": copies}


_CHANGES: Mapping[str, Callable[[HardwareProfile, New], HardwareProfile]] = {
    "dram_bandwidth": _dram_bandwidth,
    "dram": _dram,
    "cpu_flops": _cpu_flops,
    "handover": _handover,
    "vram": _each_gpu(_vram),
    "gpu_bandwidth": _each_gpu(_gpu_bandwidth),
    "gpu_flops": _each_gpu(_gpu_flops),
    "link_bandwidth": _each_gpu(_link),
}
_GPU_CHANGES = frozenset({"vram", "gpu_bandwidth", "gpu_flops", "link_bandwidth"})

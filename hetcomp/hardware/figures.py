"""The parts of a hardware profile: each a figure or a curve with where it comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Finite and above zero: a profile with a bandwidth of 0, -5 or inf predicts nonsense. No machine that this can run on
# reads faster than this from one memory, or computes faster (GFLOP/s a core).
Bandwidth = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
Microseconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class Source(StrEnum):
    """Where a figure comes from. Measured and other figures are never mixed up."""

    MEASURED = "measured"
    DATA_SHEET = "data sheet"
    ESTIMATE = "estimate"


class Model(BaseModel):
    """Frozen, and strict about unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class BandwidthPoint(Model):
    """DRAM read bandwidth in 10^9 bytes a second with ``threads`` threads on the node's own memory."""

    threads: int = Field(ge=1)
    gb_per_s: Bandwidth


class RemoteRead(Model):
    """Read bandwidth of this node's cores from the memory of node ``memory``, all its threads together."""

    memory: int = Field(ge=0)
    gb_per_s: Bandwidth


class NumaNode(Model):
    """One NUMA node. ``cores`` counts the physical cores that this process may use, ``cpus`` names the
    logical ones. ``available_bytes`` is what can be allocated now, cgroup limits included. ``distances`` are the
    kernel's (SLIT) to every node in order of the profile's nodes, 10 being the node itself."""

    id: int = Field(ge=0)
    cores: int = Field(ge=0)
    cpus: tuple[int, ...] = ()
    memory_bytes: int = Field(ge=0)
    available_bytes: int = Field(ge=0)
    read_bandwidth: tuple[BandwidthPoint, ...] = ()
    remote_reads: tuple[RemoteRead, ...] = ()
    distances: tuple[int, ...] = ()
    source: Source


class Cache(Model):
    """One kind of cache: bytes of one instance and how many of them the process can use."""

    level: int = Field(ge=1)
    type: str
    bytes: int = Field(gt=0)
    instances: int = Field(ge=1)


class WorkingSetPoint(Model):
    """Read bandwidth of all threads together over a buffer of ``bytes`` that is read again and again: what caches
    give while it fits into them."""

    bytes: int = Field(gt=0)
    gb_per_s: Bandwidth


class KernelRate(Model):
    """Roofline of matrix kernels with weights of one format on one instruction set.

    ``gflops_per_core``: GEMM on many rows with all cores busy, divided by their number.
    ``bandwidth_fraction``: bytes of weights that a GEMV on one row streams, as a part of the node's read
    bandwidth.
    """

    isa: str
    weight_format: str
    gflops_per_core: Rate
    bandwidth_fraction: float = Field(gt=0, le=1)
    source: Source


KernelName = Literal["linear", "moe_experts", "attention_decode", "attention_prefill", "elementwise"]


class KernelPoint(Model):
    """``rate`` at ``size``; see KernelCurve for both units. ``samples`` are the rates of the single runs."""

    size: int = Field(ge=1)
    rate: Rate
    samples: tuple[Rate, ...] = ()


class KernelCurve(Model):
    """Measured speed of one of our kernels, all threads of one node together, by problem size.

    ==================  ===========================  =====================================================
    kernel              size                         rate, in 10^9 a second
    ==================  ===========================  =====================================================
    linear              tokens (rows of x)           weights (elements of w) passed over
    moe_experts         tokens routed to an expert   weights of the experts that got tokens
    attention_decode    positions in the KV cache    multiply-adds (heads * (head_dim + v_head_dim) * positions)
    attention_prefill   tokens, cache empty before   multiply-adds (the causal half of tokens^2)
    elementwise         tokens                       elements written
    ==================  ===========================  =====================================================

    ``variant``: ``dram`` (operands come from memory), ``wide`` or ``small`` (as well, of wider experts, or of smaller
    matrices or heads) or ``cache`` (operands as for ``small``, just used); for elementwise the op kind (``rms_norm``,
    ``rope``, ``add``, ``route``, ``glu``, ...). ``weight_format`` is the KV cache's for attention and ``f32`` for
    elementwise. ``shape`` says on which operands it was measured.
    """

    kernel: KernelName
    variant: str
    isa: str
    weight_format: str
    shape: dict[str, int]
    points: tuple[KernelPoint, ...] = Field(min_length=1)
    source: Source

    @model_validator(mode="after")
    def _rising(self) -> KernelCurve:
        sizes = [p.size for p in self.points]
        if sizes != sorted(set(sizes)):
            raise ValueError("sizes of a curve's points must rise")
        return self

    def rate(self, size: float) -> float:
        """Rate at ``size``, in 10^9 a second: linear between the points in log-log; beyond the last point as there.

        Below the first point time is taken to be what the first point takes (a kernel does not get faster than its
        fixed cost)."""
        first = self.points[0]
        if size <= first.size:
            scale = 1.0 if self.kernel in ("linear", "moe_experts") else size / first.size
            return first.rate * scale
        return interpolate(size, [p.size for p in self.points], [p.rate for p in self.points], self._beyond())

    def _beyond(self) -> float:
        # Weights passed over: with twice the tokens each takes twice as long. Work done: the rate stays.
        return -1.0 if self.kernel in ("linear", "moe_experts") else 0.0


class CopyPoint(Model):
    """Copies of ``bytes`` between pinned host memory and the GPU, 10^9 bytes a second, start of the copy included."""

    bytes: int = Field(gt=0)
    to_device_gb_per_s: Bandwidth
    to_host_gb_per_s: Bandwidth


class GpuRate(Model):
    """Matrix product on many rows with weights of one format, 10^12 FLOP a second."""

    weight_format: str
    tflops: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
    source: Source


class Gpu(Model):
    """One GPU.

    ``gb_per_s``: reads from its own memory; ``link_gb_per_s``: large copies from the host; ``copies``: by size;
    ``handshake_us``: a round trip GPU -> CPU lane -> GPU through flags in pinned memory; ``launch_us``: one more
    kernel in a CUDA graph; ``joint_gb_per_s``: what host memory gives to CPU cores and the GPU's copies together.
    None: not known. ``source`` is that of the bandwidths and times; rates have their own.
    """

    name: str
    memory_bytes: int = Field(gt=0)
    free_bytes: int | None = Field(default=None, ge=0)
    compute_capability: tuple[int, int]
    gb_per_s: Bandwidth | None = None
    link_gb_per_s: Bandwidth | None = None
    copies: tuple[CopyPoint, ...] = ()
    rates: tuple[GpuRate, ...] = ()
    curves: tuple[KernelCurve, ...] = ()
    handshake_us: Microseconds | None = None
    launch_us: Microseconds | None = None
    joint_gb_per_s: Bandwidth | None = None
    source: Source


class Disk(Model):
    """Sequential reads of large files, page cache avoided."""

    path: str
    gb_per_s: Bandwidth
    source: Source


class Calibration(Model):
    """A correction found by holding a prediction against a run: predicted times of ``term`` are multiplied by
    ``factor``. ``term``: a kernel name of KernelCurve, an op kind, or ``barrier``."""

    term: str
    factor: Annotated[float, Field(gt=0.05, lt=20, allow_inf_nan=False)]
    run: str
    measured_at: str


def interpolate(x: float, xs: Sequence[float], ys: Sequence[float], slope_beyond: float = 0.0) -> float:
    """Linear in log-log between rising ``xs``; the first value below them; beyond them a power law of the given
    exponent from the last value on."""
    if x <= xs[0]:
        return ys[0]
    for i in range(1, len(xs)):
        if x <= xs[i]:
            part = math.log(x / xs[i - 1]) / math.log(xs[i] / xs[i - 1])
            return float(ys[i - 1] * (ys[i] / ys[i - 1]) ** part)
    return float(ys[-1] * (x / xs[-1]) ** slope_beyond)

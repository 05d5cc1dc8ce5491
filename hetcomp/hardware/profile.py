"""The hardware profile: what the passes know of a machine, measured, from a file or from a data sheet."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from pydantic import Field, ValidationError, model_validator

from hetcomp.errors import HetcompError
from hetcomp.hardware.figures import (
    Cache,
    Calibration,
    Disk,
    Gpu,
    KernelCurve,
    KernelName,
    KernelRate,
    Microseconds,
    Model,
    NumaNode,
    Source,
    WorkingSetPoint,
)
from hetcomp.hardware.tuning import KernelTuning

SCHEMA = (2, 2)  # major: readers refuse another; minor: fields were added

# Estimated part of a data sheet's peak that is reached in practice: by reads of all cores together, and by GEMM.
DATA_SHEET_READS = 0.8
DATA_SHEET_FLOPS = 0.7
# Formats that are not measured, each with one whose kernels multiply in the same way, and that one's bits of a weight.
KIN = {"q6k": ("q8", 8.5), "q5k": ("q4", 4.5), "q4z": ("q4", 4.5), "q4k": ("q4", 4.5)}


class HardwareProfile(Model):
    """A machine. ``isas`` as hetcomp names them, weakest first; ``threads`` is how many the lanes run
    (physical cores within the cgroup's CPU quota); ``barrier_us`` what it costs all of them to meet once.

    ``rates`` is the roofline that every profile has; ``curves`` are measurements of our own kernels, which take
    precedence where they exist. ``cpu_quota`` and ``memory_limit_bytes`` are the cgroup's (None: none).
    ``tunings`` are the constants that kernels are generated with; without them, defaults of the instruction set.
    ``references`` says where each figure of a data sheet comes from, by the field's path (``gpus.0.gb_per_s``);
    ``samples`` holds the raw readings of measured figures by the same paths. ``calibrations`` correct predictions.
    """

    schema_version: tuple[int, int] = Field(default=SCHEMA, alias="schema")
    name: str = Field(min_length=1)
    cpu: str
    isas: tuple[str, ...]
    threads: int = Field(ge=1)
    logical_cpus: int = Field(ge=1)
    nodes: tuple[NumaNode, ...] = Field(min_length=1)
    caches: tuple[Cache, ...] = ()
    rates: tuple[KernelRate, ...] = Field(min_length=1)
    curves: tuple[KernelCurve, ...] = ()
    tunings: tuple[KernelTuning, ...] = ()
    cached_reads: tuple[WorkingSetPoint, ...] = ()
    barrier_us: Microseconds
    huge_pages: str = "unknown"
    cpu_quota: float | None = Field(default=None, gt=0)
    memory_limit_bytes: int | None = Field(default=None, ge=0)
    gpus: tuple[Gpu, ...] = ()
    disk: Disk | None = None
    calibrations: tuple[Calibration, ...] = ()
    references: dict[str, str] = Field(default_factory=dict)
    samples: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    measured_at: str | None = None
    origin: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> HardwareProfile:
        ids = [node.id for node in self.nodes]
        if len(set(ids)) != len(ids):
            raise ValueError("two NUMA nodes have the same id")
        if not any(node.cores and node.read_bandwidth for node in self.nodes):
            raise ValueError("no NUMA node has cores and a read bandwidth")
        tuned = [(tuning.isa, tuning.weight_format) for tuning in self.tunings]
        if len(set(tuned)) != len(tuned):
            raise ValueError("two tunings are of the same instruction set and weight format")
        return self

    @property
    def measured(self) -> bool:
        """Whether every figure that predictions use was measured on the machine itself."""
        sources = [rate.source for rate in self.rates] + [n.source for n in self.compute_nodes]
        return all(source is Source.MEASURED for source in sources)

    @property
    def caveat(self) -> str:
        """Why predictions from this profile deserve less trust than a measurement; empty if they do not."""
        if self.measured:
            return f"{self.name}: {self.origin}" if self.origin else ""
        used = {rate.source for rate in self.rates} | {node.source for node in self.compute_nodes}
        kinds = " and ".join(sorted(source.value for source in used - {Source.MEASURED}))
        why = f" ({self.origin})" if Source.ESTIMATE in used and self.origin else ""
        return f"{self.name}: times are predicted from {kinds} figures, not from measured ones{why}"

    @property
    def compute_nodes(self) -> tuple[NumaNode, ...]:
        """Nodes that have cores for a lane; the others (memory expanders) only hold data."""
        return tuple(n for n in self.nodes if n.cores and n.read_bandwidth)

    def node(self, id: int) -> NumaNode:
        """The node with that id; KeyError if there is none."""
        for node in self.nodes:
            if node.id == id:
                return node
        raise KeyError(id)

    def node_threads(self, id: int) -> int:
        """Threads of the node's lane: its share of ``threads``, at least one."""
        cores = sum(n.cores for n in self.nodes)
        return max(1, min(self.node(id).cores, self.threads * self.node(id).cores // max(cores, 1)))

    def bandwidth(self, node: int | None = None) -> float:
        """Read bandwidth of the node in 10^9 bytes a second with its lane's threads (None: the fastest node)."""
        if node is None:
            return max(self.bandwidth(n.id) for n in self.compute_nodes)
        found, threads = self.node(node), self.node_threads(node)
        usable = [p.gb_per_s for p in found.read_bandwidth if p.threads <= threads]
        # A curve that starts above our thread count: a thread reads at most its share of the first point.
        first = min(found.read_bandwidth, key=lambda p: p.threads, default=None)
        best = max(usable) if usable else (first.gb_per_s * threads / first.threads if first else 0.0)
        return best * (DATA_SHEET_READS if found.source is Source.DATA_SHEET else 1.0)

    def rate(self, weight_format: str, isa: str | None = None) -> KernelRate:
        """The rate of a format on ``isa`` (None: the fastest); where the profile lacks it, that of its kin, of another
        instruction set, then bf16's (data sheets know no more). Raises HetcompError if none is known."""
        of_format = [r for r in self.rates if r.weight_format == weight_format]
        if not of_format and weight_format in KIN:
            return self.rate(KIN[weight_format][0], isa)
        quantised = weight_format in ("q8", "fp8", "q4", "mxfp4")
        bf16 = [r for r in self.rates if r.weight_format == "bf16" and quantised]
        for known in (of_format, bf16):
            same = [r for r in known if isa in (None, r.isa)]
            if same or known:
                return max(same or known, key=lambda r: r.gflops_per_core)
        raise HetcompError(
            f"Hardware profile {self.name} has no kernel rate for format {weight_format}; "
            "measure the machine again (--hw auto) or add the rate to the profile file."
        )

    def gflops(self, weight_format: str, node: int | None = None, isa: str | None = None) -> float:
        """GEMM rate of one node's lane in 10^9 FLOP a second (None: of the node with most threads)."""
        rate = self.rate(weight_format, isa)
        ids = [n.id for n in self.compute_nodes] if node is None else [node]
        derate = DATA_SHEET_FLOPS if rate.source is Source.DATA_SHEET else 1.0
        return rate.gflops_per_core * max(self.node_threads(i) for i in ids) * derate

    def curve(self, kernel: KernelName, variant: str, weight_format: str, isa: str | None) -> KernelCurve | None:
        """The measured curve of a kernel on ``isa`` (None or not measured: on the profile's last measured one), None if
        there is none."""
        found = [c for c in self.curves if (c.kernel, c.variant, c.weight_format) == (kernel, variant, weight_format)]
        same = [c for c in found if c.isa == isa]
        return next(reversed(same or found), None)

    def calibration(self, term: str) -> float:
        """Factor on predicted times of ``term``; 1 without a calibration."""
        return next((c.factor for c in reversed(self.calibrations) if c.term == term), 1.0)

    def available_bytes(self) -> int:
        """Memory that a model may take on all nodes together."""
        return sum(node.available_bytes for node in self.nodes)

    def ridge(self, weight_format: str) -> float:
        """Arithmetic intensity (FLOP a byte) above which kernels of the format are bound by compute."""
        return self.gflops(weight_format) / (self.bandwidth() * self.rate(weight_format).bandwidth_fraction)

    def compile_threads(self) -> int:
        """Compilers to run at once: a large kernel takes up to about 1 GB. They run on this machine, whichever
        one the profile describes, so that its CPUs are a bound as well."""
        here = len(os.sched_getaffinity(0))
        return max(1, min(self.logical_cpus, here, self.available_bytes() >> 30))

    def to_json(self) -> str:
        """The profile as JSON, as :func:`load_profile` reads it."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"

    def sha256(self) -> str:
        """Names the machine and its figures; what changes from minute to minute (free memory) is left out."""
        volatile = {"nodes": {"__all__": {"available_bytes"}}}
        document = self.model_dump(mode="json", by_alias=True, exclude=volatile)
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def load_profile(spec: str) -> HardwareProfile:
    """``auto``: this machine, measured once and then cached; ``preset:MACHINE+GPU`` (see presets); or a profile file.

    Raises HetcompError if there is no such preset or file, or if it is not a valid profile.
    """
    if spec == "auto":
        from hetcomp.hardware.measure import measured_profile

        return measured_profile()
    if spec.startswith("preset:"):
        from hetcomp.hardware.presets import preset

        return preset(spec.removeprefix("preset:"))
    path = Path(spec)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise HetcompError(
            f"Hardware profile {spec} does not exist; give auto, a profile file, or a preset such as "
            "preset:rtx4090+2x8480."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise HetcompError(f"Hardware profile {spec} cannot be read: {error}.") from None
    return parse_profile(text, spec)


def parse_profile(text: str, origin: str) -> HardwareProfile:
    """Reads a profile's JSON. Raises HetcompError naming ``origin`` and the path in the document."""
    try:
        document = json.loads(text)
    except ValueError as error:
        raise HetcompError(f"Hardware profile {origin} is not valid JSON: {error}.") from None
    schema = document.get("schema") if isinstance(document, dict) else None
    if not (isinstance(schema, list) and len(schema) == 2 and schema[0] == SCHEMA[0]):
        raise HetcompError(
            f"Hardware profile {origin} has schema {schema}, this hetcomp reads {SCHEMA[0]}.x; "
            "measure the machine again or update hetcomp."
        )
    try:
        return HardwareProfile.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"]) or "the top level"
        raise HetcompError(f"Hardware profile {origin} is not valid at {path}: {first['msg']}.") from None

"""Measured figures of the GPUs: a small C++ program that needs the driver alone, and torch's kernels where torch has
CUDA. Nothing is made up: what fails is left out, with a note."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hetcomp.errors import HetcompError
from hetcomp.hardware.compilers import find_cxx
from hetcomp.hardware.detect import Machine, detect_machine
from hetcomp.hardware.figures import CopyPoint, Gpu, GpuRate, KernelCurve, KernelPoint, Source
from hetcomp.hardware.gpus import detect_gpus
from hetcomp.profiler import gpu_torch
from hetcomp.progress import ProgressSink

Progress = Callable[[str], None] | ProgressSink

PROBE_SECONDS = 60.0
TORCH_SECONDS = 120.0
_FILES = (
    *("gpu_probe.cpp", "gpu_probe_joint.h", "gpu_probe_matrix.h", "gpu_probe_ptx.h", "gpu_probe_session.h"),
    *("cuda_api.h", "cuda_driver.h"),
)
# Host memory that the CPU reads beside copies: well above the caches, little of what is free.
_READ_BYTES, _QUICK_READ_BYTES = 4 << 30, 512 << 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GpuFigures:
    """``samples``: raw readings by the figure's path in a profile (``gpus.0.gb_per_s``), in its unit; ``references``:
    what measured a figure, by the same paths; ``notes``: what could not be measured and why, one sentence each;
    ``documents``: what the programs printed, by GPU."""

    gpus: tuple[Gpu, ...]
    samples: dict[str, tuple[float, ...]]
    references: dict[str, str]
    notes: tuple[str, ...]
    documents: tuple[dict[str, Any], ...]


def measure_gpus(progress: Progress | None = None, quick: bool = False) -> tuple[Gpu, ...]:
    """The GPUs that the driver shows, measured (about 20 s each; with ``quick`` 5 s and without torch); empty without
    a driver or a GPU.

    What could not be measured is None, with a remark to ``progress`` and the log. Raises HetcompError only where the
    probe cannot be built.
    """
    return measure_gpu_figures(progress, quick).gpus


def measure_gpu_figures(progress: Progress | None = None, quick: bool = False) -> GpuFigures:
    """As :func:`measure_gpus`, with the raw readings and notes."""
    count = len(detect_gpus().gpus)
    if not count:
        return GpuFigures((), {}, {}, (), ())
    say = _Say(progress)
    with tempfile.TemporaryDirectory(prefix="hetcomp-gpu-") as folder:
        probe = build_probe(Path(folder))
        found = [_measure(probe, index, quick, say) for index in range(count)]
    samples: dict[str, tuple[float, ...]] = {}
    references: dict[str, str] = {}
    for index, one in enumerate(found):
        samples |= {f"gpus.{index}.{path}": readings for path, readings in one.samples.items()}
        references |= {f"gpus.{index}.{path}": text for path, text in one.references.items()}
    documents = tuple(one.document for one in found)
    return GpuFigures(tuple(one.gpu for one in found), samples, references, tuple(say.notes), documents)


def build_probe(folder: Path) -> Path:
    """Compiles the probe into ``folder``. Raises HetcompError if there is no compiler or if it fails."""
    compiler = find_cxx()
    sources = resources.files("hetcomp.codegen_templates") / "probe"
    for name in _FILES:
        (folder / name).write_text((sources / name).read_text(encoding="utf-8"), encoding="utf-8")
    probe = folder / "gpu_probe"
    flags = ["-std=c++20", "-O3", "-march=native", "-pthread"]
    command = [str(compiler.path), *flags, str(folder / "gpu_probe.cpp"), "-o", str(probe), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise HetcompError(f"{compiler.path} cannot build the GPU probe: {last}.")
    return probe


class _Say:
    """Passes stages and remarks on, and keeps the remarks."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self.notes: list[str] = []

    def stage(self, text: str) -> None:
        if callable(self._progress):
            self._progress(text)
        elif self._progress is not None:
            self._progress.advance(0, text)

    def done(self) -> None:
        if self._progress is not None and not callable(self._progress):
            self._progress.advance(1)

    def note(self, text: str) -> None:
        self.notes.append(text)
        _log.warning("%s", text)
        if callable(self._progress):
            self._progress(text)
        elif self._progress is not None:
            self._progress.warn(text)


@dataclass(frozen=True)
class _Found:
    gpu: Gpu
    samples: dict[str, tuple[float, ...]]
    references: dict[str, str]
    document: dict[str, Any]


def _measure(probe: Path, index: int, quick: bool, say: _Say) -> _Found:
    """Measures one GPU; what the driver says of it if the probe does not even get that far."""
    machine = detect_machine()
    try:
        say.stage(f"GPU {index}: copies, memory, matrix products, hand-shakes")
        document = _run(_probe_command(probe, index, machine, quick), PROBE_SECONDS, f"The probe of GPU {index}")
        found = parse(document, index, say.note)
    except HetcompError as error:
        say.note(str(error))
        return _Found(detect_gpus().gpus[index], {}, {}, {})
    if not quick and _torch_has_cuda():
        say.stage(f"GPU {index}: torch's kernels")
        found = _with_torch(found, index, say)
    say.done()
    return found


def _probe_command(probe: Path, index: int, machine: Machine, quick: bool) -> list[str]:
    cpus = [core for node in machine.nodes for core in node.cores][: machine.threads]
    free = sum(node.available_bytes for node in machine.nodes)
    mebibytes = max(64, min(_QUICK_READ_BYTES if quick else _READ_BYTES, free // 8) >> 20)
    command = [str(probe), "measure", str(index), str(mebibytes), ",".join(map(str, cpus))]
    return [*command, "quick"] if quick else command


def _run(command: list[str], seconds: float, who: str) -> dict[str, Any]:
    """What a program prints: one JSON object. Raises HetcompError where it does not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise HetcompError(f"{who} did not end within {seconds:.0f} s.") from None
    except OSError as error:
        raise HetcompError(f"{who} cannot be run: {error}.") from None
    try:
        document = json.loads(done.stdout)
    except ValueError:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise HetcompError(f"{who} failed with status {done.returncode}: {said}.") from None
    if not isinstance(document, dict):
        raise HetcompError(f"{who} printed no JSON object.")
    return document


def parse(document: Mapping[str, Any], index: int, note: Callable[[str], None]) -> _Found:
    """Reads what the probe printed. Raises HetcompError where it says nothing of the device; a part that is null or
    does not hold what it should is left out with a ``note``."""
    for warning in document.get("warnings", ()):
        note(f"GPU {index}: {warning}")
    missing = [key for key in ("name", "memory_bytes", "compute_capability") if key not in document]
    if missing:
        raise HetcompError(f"The probe of GPU {index} does not say the device's {missing[0]}.")
    parts = _Parts(document, index, note)
    try:
        return _Found(_gpu(document, parts), parts.samples, parts.references, dict(document))
    except (ValidationError, TypeError, ValueError) as error:
        raise HetcompError(
            f"The probe of GPU {index} printed no valid figures: {str(error).splitlines()[0]}."
        ) from None


class _Parts:
    """Reads the document's parts, each by itself."""

    def __init__(self, document: Mapping[str, Any], index: int, note: Callable[[str], None]) -> None:
        self._document, self._index, self._note = document, index, note
        self.samples: dict[str, tuple[float, ...]] = {}
        self.references: dict[str, str] = {}

    def copies(self) -> tuple[CopyPoint, ...]:
        points = self._document.get("copies")
        if points is None:
            return ()
        try:
            return tuple(
                CopyPoint.model_validate({key: p[key] for key in ("bytes", "to_device_gb_per_s", "to_host_gb_per_s")})
                for p in points
            )
        except (ValidationError, TypeError, KeyError):
            self._note(f"GPU {self._index}: copies: the probe printed no valid figures.")
            return ()

    def figure(self, part: str, key: str, path: str) -> float | None:
        """The number ``key`` of ``part``, kept with its samples under ``path``."""
        found = self._document.get(part)
        if found is None:
            return None
        try:
            value, samples = float(found[key]), tuple(float(s) for s in found["samples"])
        except (TypeError, KeyError, ValueError):
            value, samples = math.nan, ()
        if not (math.isfinite(value) and value > 0):
            self._note(f"GPU {self._index}: {part}: the probe printed no valid figure.")
            return None
        self.samples[path] = samples
        return value


def _gpu(document: Mapping[str, Any], parts: _Parts) -> Gpu:
    copies = parts.copies()
    rates: list[GpuRate] = []
    for form in ("bf16", "int8"):
        path = f"rates.{len(rates)}.tflops"
        tflops = parts.figure(form, "tflops", path)
        if tflops is not None:
            rates.append(GpuRate(weight_format=form, tflops=tflops, source=Source.MEASURED))
            parts.references[path] = f"hetcomp's kernel: {document[form].get('kernel', form)}"
    return Gpu(
        name=document["name"],
        memory_bytes=document["memory_bytes"],
        free_bytes=document.get("free_bytes"),
        compute_capability=tuple(document["compute_capability"]),
        gb_per_s=parts.figure("reads", "gb_per_s", "gb_per_s"),
        link_gb_per_s=copies[-1].to_device_gb_per_s if copies else None,
        copies=copies,
        rates=tuple(rates),
        handshake_us=parts.figure("handshake", "us", "handshake_us"),
        launch_us=parts.figure("launch", "us", "launch_us"),
        joint_gb_per_s=parts.figure("joint", "gb_per_s", "joint_gb_per_s"),
        source=Source.MEASURED,
    )


def _torch_has_cuda() -> bool:
    """Whether the installed torch was built for CUDA, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    return any((Path(spec.origin).parent / "lib").glob("libtorch_cuda*.so"))


def _with_torch(found: _Found, index: int, say: _Say) -> _Found:
    """``found`` with torch's curves, and its rate of bf16 products in place of our kernel's."""
    command = [sys.executable, str(gpu_torch.__file__), str(index)]
    try:
        document = _run(command, TORCH_SECONDS, f"Measuring torch on GPU {index}")
        return merge_torch(found, document)
    except (HetcompError, ValidationError, KeyError, TypeError, ValueError) as error:
        say.note(f"GPU {index}: torch's kernels: {str(error).splitlines()[0]}")
        return found


def merge_torch(found: _Found, document: Mapping[str, Any]) -> _Found:
    """Adds what gpu_torch.py printed; it must be of the same GPU."""
    if document["name"] != found.gpu.name:
        raise ValueError(f"torch shows another GPU ({document['name']}).")
    isa = "sm_{}{}".format(*found.gpu.compute_capability)
    heads = {"heads": gpu_torch.HEADS, "kv_heads": gpu_torch.KV_HEADS, "head_dim": gpu_torch.HEAD_DIM}
    features = {"out_features": gpu_torch.FEATURES, "in_features": gpu_torch.FEATURES}
    shapes = {"linear": features, "attention_decode": heads, "attention_prefill": heads}
    curves = tuple(
        KernelCurve.model_validate(
            {
                "kernel": kernel,
                "variant": "dram",
                "isa": isa,
                "weight_format": "bf16",
                "shape": shape,
                "points": [{key: p[key] for key in ("size", "rate", "samples")} for p in document[kernel]],
                "source": Source.MEASURED,
            }
        )
        for kernel, shape in shapes.items()
    )
    top = max(curves[0].points, key=lambda point: point.size * point.rate)
    rate = GpuRate(weight_format="bf16", tflops=_tflops(top, top.rate), source=Source.MEASURED)
    rates = (rate, *(r for r in found.gpu.rates if r.weight_format != "bf16"))
    before = {r.weight_format: i for i, r in enumerate(found.gpu.rates)}
    samples = {p: s for p, s in found.samples.items() if not p.startswith("rates.")}
    references = {p: s for p, s in found.references.items() if not p.startswith("rates.")}
    for i, r in enumerate(rates):
        old, path = f"rates.{before.get(r.weight_format)}.tflops", f"rates.{i}.tflops"
        samples[path] = found.samples.get(old, ()) if i else tuple(_tflops(top, s) for s in top.samples)
        references[path] = found.references.get(old, "") if i else f"torch {document['torch']}: matmul, {top.size} rows"
    references["curves"] = f"torch {document['torch']}: matmul, scaled_dot_product_attention"
    gpu = found.gpu.model_copy(update={"rates": rates, "curves": curves})
    return _Found(gpu, samples, references, {**found.document, "torch": dict(document)})


def _tflops(point: KernelPoint, rate: float) -> float:
    """Of a point of a ``linear`` curve: two operations a weight and token."""
    return 2 * point.size * rate * 1e-3

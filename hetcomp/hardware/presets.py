"""Machines and GPUs that ship with hetcomp, put together by name: ``preset:rtx4090+2x8480``."""

from __future__ import annotations

import difflib
import json
from importlib import resources
from importlib.resources.abc import Traversable

from pydantic import Field, ValidationError

from hetcomp.errors import HetcompError
from hetcomp.hardware.figures import Gpu, Model
from hetcomp.hardware.profile import HardwareProfile


class GpuPreset(Model):
    """A GPU's data-sheet figures and where each comes from."""

    gpu: Gpu
    references: dict[str, str] = Field(default_factory=dict)


def machine_names() -> tuple[str, ...]:
    """Machines without GPUs."""
    return _names("machines")


def gpu_names() -> tuple[str, ...]:
    """GPUs that can be put into a machine."""
    return _names("gpus")


def preset(spec: str) -> HardwareProfile:
    """The profile of ``PART+PART+..``: exactly one machine and any number of GPUs (``2xrtx5090``: two of them).

    All figures are data-sheet figures or estimates, each with its reference. Raises HetcompError for unknown parts,
    with near names, and for no or several machines.
    """
    machines: list[str] = []
    gpus: list[str] = []
    for part in (p.strip().lower() for p in spec.split("+")):
        count, _, rest = part.partition("x")
        if part in machine_names():
            machines.append(part)
        elif part in gpu_names():
            gpus.append(part)
        elif count.isdecimal() and 0 < int(count) <= 16 and rest in gpu_names():
            gpus += [rest] * int(count)
        else:
            raise HetcompError(_unknown(part))
    if len(machines) != 1:
        have = f"names {' and '.join(machines)}" if machines else "names no machine"
        raise HetcompError(f"preset:{spec} {have}; give exactly one of {', '.join(machine_names())}.")
    base = _machine(machines[0])
    parts = [gpu_preset(name) for name in gpus]
    references = dict(base.references)
    for index, found in enumerate(parts):
        references |= {f"gpus.{index}.{path}": text for path, text in found.references.items()}
    return base.model_copy(update={"name": spec, "gpus": tuple(p.gpu for p in parts), "references": references})


def _machine(name: str) -> HardwareProfile:
    text = (_folder("machines") / f"{name}.json").read_text(encoding="utf-8")
    return HardwareProfile.model_validate_json(text)


def gpu_preset(name: str) -> GpuPreset:
    """The GPU ``name`` of :func:`gpu_names`."""
    document = json.loads((_folder("gpus") / f"{name}.json").read_text(encoding="utf-8"))
    try:
        return GpuPreset.model_validate(document)
    except ValidationError as error:  # a bug of ours, found by the test that loads them all
        raise HetcompError(f"The GPU preset {name} is not valid: {error.errors()[0]['msg']}.") from None


def _unknown(part: str) -> str:
    names = (*machine_names(), *gpu_names())
    near = difflib.get_close_matches(part, names, n=3, cutoff=0.5) or [n for n in names if part and part in n][:3]
    meant = f" (did you mean {' or '.join(near)}?)" if near else ""
    return (
        f"There is no hardware preset '{part}'{meant}; a preset is a machine, with + GPUs: "
        f"machines {', '.join(machine_names())}; GPUs {', '.join(gpu_names())}."
    )


def _names(kind: str) -> tuple[str, ...]:
    return tuple(sorted(f.name.removesuffix(".json") for f in _folder(kind).iterdir() if f.name.endswith(".json")))


def _folder(kind: str) -> Traversable:
    return resources.files("hetcomp.models_zoo") / "hardware" / kind

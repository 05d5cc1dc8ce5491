"""A model after the passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hetcomp import frontend
from hetcomp.adapters.low_rank import Adapter
from hetcomp.backends.select_kernels import CpuTarget
from hetcomp.hardware.profile import HardwareProfile
from hetcomp.ir.plan import Plan
from hetcomp.passes.context import Context


@dataclass(frozen=True)
class Planned:
    """A model after the passes: what `hetcomp-plan` shows and what the backends generate from. ``seconds`` is the
    time that each pass took. ``adapter``: what is merged into the weights."""

    plan: Plan
    imported: frontend.Imported
    target: CpuTarget
    profile: HardwareProfile
    context: Context
    seconds: Mapping[str, float]
    adapter: Adapter | None = None

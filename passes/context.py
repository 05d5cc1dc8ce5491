"""What passes may look at besides the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from hetcomp.errors import HetcompError
from hetcomp.hardware.profile import HardwareProfile
from hetcomp.ir.target import Checkpoint, KernelTarget
from hetcomp.passes.expert_statistics import ExpertStatistics
from hetcomp.passes.pins import Pin

Role = Literal["experts", "attention", "dense", "router", "embedding", "kv"]
ROLES: tuple[Role, ...] = ("experts", "attention", "dense", "router", "embedding", "kv")
FORMATS = ("f32", "bf16", "q8", "fp8", "q4", "mxfp4")  # by falling size
AVAILABLE_FORMATS = FORMATS  # of weights
KV_FORMATS = ("f32", "bf16")


@dataclass(frozen=True)
class FormatRequest:
    """Formats the user asked for by role; ``auto`` where the user leaves the choice to choose_formats."""

    by_role: Mapping[Role, str] = field(default_factory=dict)

    @staticmethod
    def parse(formats: str | Mapping[str, str], *, planning: bool = False) -> FormatRequest:
        """One format for all roles, or a mapping by role. ``planning``: formats are allowed whose kernels do not exist
        yet. Raises HetcompError for unknown spellings."""
        if isinstance(formats, str):
            _check_format(formats, planning)
            # A router decides which experts run; in a coarser format than f32 it flips near ties for nothing
            # saved (0.03 % of the bytes of a Qwen3-30B-A3B).
            kv = formats if formats in KV_FORMATS else "auto"
            return FormatRequest({**{role: formats for role in ROLES}, "router": "f32", "kv": kv})
        by_role: dict[Role, str] = {}
        for name, form in formats.items():
            role = next((r for r in ROLES if r == name), None)
            if role is None:
                raise HetcompError(f"Unknown weight role '{name}' in formats; the roles are {', '.join(ROLES)}.")
            if role == "kv":
                _check_kv_format(form)
            else:
                _check_format(form, planning)
            by_role[role] = form
        return FormatRequest(by_role)

    def of(self, role: Role) -> str:
        """The request for ``role``: a format or ``auto``."""
        return self.by_role.get(role, "f32" if role == "router" else "auto")


def _check_kv_format(name: str) -> None:
    if name not in ("auto", *KV_FORMATS):
        raise HetcompError(f"Unknown KV cache format '{name}'; the formats are auto, {', '.join(KV_FORMATS)}.")


def _check_format(name: str, planning: bool) -> None:
    if name == "auto" or name in (FORMATS if planning else AVAILABLE_FORMATS):
        return
    if name in FORMATS:
        raise HetcompError(
            f"Weight format '{name}' is known but its kernels do not exist yet; choose from auto, "
            f"{', '.join(AVAILABLE_FORMATS)}."
        )
    raise HetcompError(f"Unknown weight format '{name}'; the formats are auto, {', '.join(FORMATS)}.")


@dataclass(frozen=True)
class Context:
    """The machine, the checkpoint's headers (None: config only), the kernels that will be generated, and the
    user's wishes. ``isa`` is the instruction set that costs are predicted for (None: the profile's fastest).

    ``planning``: nothing will be generated from the plan, so that formats without kernels may be used.
    ``use_gpus``: the profile's GPUs take part in placement. ``vram``: bytes that may be used of each GPU (None: what
    is free), ``pinned_bytes`` likewise of pinned host memory. ``pins``: placements that the user decided.
    ``statistics``: how often experts are chosen (None: uniformly)."""

    profile: HardwareProfile
    checkpoint: Checkpoint | None
    target: KernelTarget
    formats: FormatRequest = field(default_factory=FormatRequest)
    isa: str | None = None
    planning: bool = False
    use_gpus: bool = False
    vram: int | None = None
    pinned_bytes: int | None = None
    pins: tuple[Pin, ...] = ()
    statistics: ExpertStatistics | None = None

    def expert_shares(self, moe_layer: int, experts: int) -> tuple[float, ...]:
        """Part of its assignments that each expert of a MoE layer gets: the statistics', or equal parts."""
        return self.statistics.shares[moe_layer] if self.statistics else (1.0 / experts,) * experts

    @property
    def nearest_formats(self) -> tuple[str, ...]:
        """Formats to suggest where a plan does not fit, by falling size."""
        return FORMATS if self.planning else AVAILABLE_FORMATS

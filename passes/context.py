"""What passes may look at besides the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from hetcomp.errors import HetcompError
from hetcomp.hardware.profile import HardwareProfile
from hetcomp.ir.target import Checkpoint, KernelTarget

Role = Literal["experts", "attention", "dense", "router", "embedding", "kv"]
ROLES: tuple[Role, ...] = ("experts", "attention", "dense", "router", "embedding", "kv")
FORMATS = ("f32", "bf16", "fp8", "q8", "q4", "mxfp4")
AVAILABLE_FORMATS = ("f32", "bf16")


@dataclass(frozen=True)
class FormatRequest:
    """Formats the user asked for by role; ``auto`` where the user leaves the choice to choose_formats."""

    by_role: Mapping[Role, str] = field(default_factory=dict)

    @staticmethod
    def parse(formats: str | Mapping[str, str]) -> FormatRequest:
        """One format for all roles, or a mapping by role. Raises HetcompError for unknown spellings."""
        if isinstance(formats, str):
            _check_format(formats)
            # A router decides which experts run; in a coarser format than f32 it flips near ties for nothing
            # saved (0.03 % of the bytes of a Qwen3-30B-A3B).
            return FormatRequest({role: "f32" if role == "router" else formats for role in ROLES})
        by_role: dict[Role, str] = {}
        for name, form in formats.items():
            role = next((r for r in ROLES if r == name), None)
            if role is None:
                raise HetcompError(f"Unknown weight role '{name}' in formats; the roles are {', '.join(ROLES)}.")
            _check_format(form)
            by_role[role] = form
        return FormatRequest(by_role)

    def of(self, role: Role) -> str:
        """The request for ``role``: a format or ``auto``."""
        return self.by_role.get(role, "f32" if role == "router" else "auto")


def _check_format(name: str) -> None:
    if name == "auto" or name in AVAILABLE_FORMATS:
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
    user's wishes. ``isa`` is the instruction set that costs are predicted for (None: the profile's fastest)."""

    profile: HardwareProfile
    checkpoint: Checkpoint | None
    target: KernelTarget
    formats: FormatRequest = field(default_factory=FormatRequest)
    isa: str | None = None

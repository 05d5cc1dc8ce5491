"""What passes may look at besides the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from hetcomp.errors import HetcompError
from hetcomp.hardware.profile import HardwareProfile
from hetcomp.ir.annotations import AdapterRoom, AttachedAdapter
from hetcomp.ir.target import Checkpoint, DeferralMeasure, KernelTarget
from hetcomp.ir.types import CACHE_DTYPES
from hetcomp.passes.expert_statistics import ExpertStatistics
from hetcomp.passes.pins import Pin
from hetcomp.quantised_numbers import K_SCALES

# How experts get to a GPU that has no room for all: placed once, or kept in slots whose experts change.
CachePolicy = Literal["static", "lru", "lfu"]
CACHE_POLICIES: tuple[CachePolicy, ...] = ("static", "lru", "lfu")
Role = Literal["experts", "attention", "dense", "router", "embedding", "kv"]
ROLES: tuple[Role, ...] = ("experts", "attention", "dense", "router", "embedding", "kv")
# Weight formats by falling size, those of them that only checkpoints are made in, and those of the KV cache.
FORMATS = ("f32", "bf16", "q8", "fp8", "q6k", "q5k", "q4z", "q4k", "q4", "mxfp4")
TAKEN_OVER = ("q4z", *K_SCALES)
KV_FORMATS = tuple(d.value for d in CACHE_DTYPES)
# A router decides which experts run; in a coarser format than f32 it flips near ties for nothing saved (0.03 % of the
# bytes of a Qwen3-30B-A3B).
_ROUTER = "f32"


@dataclass(frozen=True)
class FormatRequest:
    """Formats the user asked for by role: one, several of which the planner may choose (``q4|q8``), or ``auto``.

    ``at_most``: roles whose format the planner chose where memory is short: quantised weights of the checkpoint keep
    theirs if it is no larger."""

    by_role: Mapping[Role, str] = field(default_factory=dict)
    at_most: frozenset[Role] = frozenset()

    @staticmethod
    def parse(formats: str | Mapping[str, str]) -> FormatRequest:
        """One format for all roles (the router stays f32, the KV cache is quantised only where its role asks for it),
        or a mapping by role to a format or several, joined with ``|``. Raises HetcompError for unknown spellings."""
        if isinstance(formats, str):
            _check_format(formats, "experts")
            kv = formats if formats in ("f32", "bf16") else "auto"
            return FormatRequest({**{role: formats for role in ROLES}, "router": _ROUTER, "kv": kv})
        by_role: dict[Role, str] = {}
        for name, wanted in formats.items():
            role = next((r for r in ROLES if r == name), None)
            if role is None:
                raise HetcompError(f"Unknown weight role '{name}' in formats; the roles are {', '.join(ROLES)}.")
            forms = [form.strip() for form in wanted.split("|")]
            for form in forms:
                _check_format(form, role)
            if "auto" in forms and len(forms) > 1:
                raise HetcompError(f"Formats '{wanted}' of {role} mix auto with others; give auto or a list.")
            by_role[role] = "|".join(sorted(set(forms), key=(*formats_of(role), "auto").index))
        return FormatRequest(by_role)

    def of(self, role: Role) -> str:
        """The request for ``role``: a format or ``auto``. Where the user allowed several, the finest."""
        return self.allowed(role)[0]

    def of_quantised(self, role: Role, native: str) -> str:
        """The format of a weight that the checkpoint has quantised, which ``native`` takes over: that, unless the user
        asked for another or memory is too short for it."""
        wanted = self.of(role)
        if wanted == "auto" or (role in self.at_most and FORMATS.index(native) >= FORMATS.index(wanted)):
            return native
        return wanted

    def allowed(self, role: Role) -> tuple[str, ...]:
        """The formats that the user allowed for ``role``, finest first, or ``auto`` alone."""
        return tuple(self.by_role.get(role, _ROUTER if role == "router" else "auto").split("|"))


@dataclass(frozen=True)
class DeferralRequest:
    """Of each generated token at most ``choices`` of experts on the CPU are deferred, in every MoE layer or by layer;
    None: as many as fill the time in which the CPU waits, and as keep the mean KL divergence that ``measure`` finds
    within ``max_kl`` (nats a token; without ``measure`` nothing is checked)."""

    choices: int | tuple[int, ...] | None
    max_kl: float = 0.0
    measure: DeferralMeasure | None = None


def formats_of(role: Role) -> tuple[str, ...]:
    """The formats of a role by falling size."""
    return KV_FORMATS if role == "kv" else FORMATS


def _check_format(name: str, role: Role) -> None:
    if name == "auto" or name in formats_of(role):
        return
    what = "KV cache" if role == "kv" else "weight"
    raise HetcompError(f"Unknown {what} format '{name}'; the formats are auto, {', '.join(formats_of(role))}.")


@dataclass(frozen=True)
class Context:
    """The machine, the checkpoint's headers (None: config only), the kernels that will be generated, and the
    user's wishes. ``isa`` is the instruction set that costs are predicted for (None: the profile's fastest).

    ``planning``: nothing will be generated from the plan.
    ``use_gpus``: the profile's GPUs take part in placement. ``vram``: bytes that may be used of each GPU, or one
    figure a GPU of the profile (None: what is free), ``pinned_bytes`` likewise of pinned host memory. ``pins``:
    placements that the user decided. ``statistics``: how often experts are chosen (None: uniformly). ``deferral``:
    whether experts are deferred (None: no). ``expert_cache``: other than static, all routed experts are in CPU memory,
    and the GPUs' memory that is left holds some of them in turn. ``from_disk``: experts that do not fit into CPU memory
    stay on the disk. ``adapters``: LoRA adapters that the model is compiled with; ``adapter_room``: what there shall be
    memory for at run time. ``adapted_rank``: costs are those of steps whose tokens all have one adapter of that rank
    (None: none)."""

    profile: HardwareProfile
    checkpoint: Checkpoint | None
    target: KernelTarget
    formats: FormatRequest = field(default_factory=FormatRequest)
    isa: str | None = None
    planning: bool = False
    use_gpus: bool = False
    vram: int | tuple[int, ...] | None = None
    pinned_bytes: int | None = None
    pins: tuple[Pin, ...] = ()
    statistics: ExpertStatistics | None = None
    deferral: DeferralRequest | None = None
    expert_cache: CachePolicy = "static"
    from_disk: bool = False
    adapters: tuple[AttachedAdapter, ...] = ()
    adapter_room: AdapterRoom | None = None
    adapted_rank: int | None = None

    def expert_shares(self, moe_layer: int, experts: int) -> tuple[float, ...]:
        """Part of its assignments that each expert of a MoE layer gets: the statistics', or equal parts."""
        return self.statistics.shares[moe_layer] if self.statistics else (1.0 / experts,) * experts

"""What a user may ask of a plan beside formats, checked before anything is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hetcomp.errors import HetcompError
from hetcomp.hardware.profile import HardwareProfile
from hetcomp.ir.annotations import AdapterRoom, Mix
from hetcomp.passes.context import CACHE_POLICIES, CachePolicy, DeferralRequest
from hetcomp.passes.expert_statistics import ExpertStatistics, parse_statistics
from hetcomp.progress import ProgressSink
from hetcomp.routing_trace import RoutingTrace

if TYPE_CHECKING:
    import torch

# Adapters in memory at once (ResidentAdapters::kMost), and their greatest rank on a GPU: a program has all of a pair's
# h in registers.
MAX_ADAPTERS, MAX_ADAPTER_RANK = 32, 128

# The expert cache that a routing trace decides about.
AUTO_CACHE = "auto"


@dataclass(frozen=True)
class PlanWishes:
    """What a user may ask of placement. mix: prompt, answer and batch to optimise for. vram: bytes of each GPU that may
    be used, or one figure a GPU of the profile; pinned_bytes: of pinned host memory. pins: ``ROLE[@LAYERS]=DEVICE``
    each. statistics: path of a file of expert statistics, or ``PATH#DOMAIN``. expert_cache: ``static``, where experts
    on a GPU stay there, or ``lru`` or ``lfu``, where it holds those that are hot while decoding; or ``auto``, where
    ``routing_trace`` (a file that ``hetcomp trace --routing`` wrote) decides which of them is fastest.

    from_disk: experts that do not fit into CPU memory stay on the disk.

    adapter_room: how many LoRA adapters of what rank there shall be memory for that are loaded at run time; without it
    none can change what a GPU computes.

    deferral: of each generated token at most so many choices of experts on the CPU are added one MoE layer later, where
    a GPU computes attention; ``auto``: as many as make it faster, within a mean KL divergence of ``max_kl`` (nats a
    token) that is measured on ``deferral_text`` (a UTF-8 file; None: the zoo's evaluation texts)."""

    mix: Mix | None = None
    vram: int | tuple[int, ...] | None = None
    pinned_bytes: int | None = None
    pins: Sequence[str] = ()
    statistics: str | None = None
    deferral: int | Literal["auto"] = 0
    max_kl: float = 0.01
    deferral_text: str | Path | None = None
    expert_cache: str = "static"
    routing_trace: str | Path | None = None
    from_disk: bool = False
    adapter_room: AdapterRoom | None = None


def use_gpus(profile: HardwareProfile, vram: int | tuple[int, ...] | None) -> bool:
    """Whether any GPU takes part. Raises HetcompError if ``vram`` has not one figure a GPU."""
    if isinstance(vram, tuple) and len(vram) != len(profile.gpus):
        raise HetcompError(
            f"--vram has {len(vram)} sizes, profile {profile.name} {len(profile.gpus)} GPUs; give one for each, in the "
            "profile's order, or one for all."
        )
    return bool(profile.gpus) and (any(vram) if isinstance(vram, tuple) else vram != 0)


def deferral_request(
    model: str | Path | torch.nn.Module, wishes: PlanWishes, has_weights: bool, progress: ProgressSink
) -> DeferralRequest | None:
    """A config without weights cannot be measured; its plan says so."""
    if wishes.deferral != "auto":
        if wishes.deferral < 0:
            raise HetcompError(f"Deferral of {wishes.deferral} choices of a token is not possible; give 0 or more.")
        return DeferralRequest(wishes.deferral) if wishes.deferral else None
    if not wishes.max_kl > 0:
        raise HetcompError(f"A KL divergence of at most {wishes.max_kl:g} allows no deferral; give --max-kl above 0.")
    if not has_weights:
        return DeferralRequest(None)
    if not isinstance(model, str | Path):
        raise HetcompError("Deferral is measured on text with a model in a folder; give a folder, or a number.")
    from hetcomp.deferral_on_text import DeferralOnText

    return DeferralRequest(None, wishes.max_kl, DeferralOnText(model, wishes.deferral_text, progress))


def adapter_room(wanted: AdapterRoom | None) -> AdapterRoom | None:
    """Raises HetcompError for numbers that are not possible."""
    if wanted is None or wanted.count == 0:
        return None
    if not 1 <= wanted.count <= MAX_ADAPTERS:
        raise HetcompError(f"Room for {wanted.count} adapters is not possible; give --adapters 0 to {MAX_ADAPTERS}.")
    if not 1 <= wanted.rank <= MAX_ADAPTER_RANK:
        raise HetcompError(
            f"Room for adapters of rank {wanted.rank} is not possible; give --adapter-rank 1 to {MAX_ADAPTER_RANK}."
        )
    return wanted


def expert_statistics(spec: str | None) -> ExpertStatistics | None:
    if spec is None:
        return None
    name, _, domain = spec.partition("#")
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HetcompError(f"Expert statistics {name} cannot be read: {error}.") from None
    return parse_statistics(text, name, domain or None)


def routing_trace(wishes: PlanWishes) -> RoutingTrace | None:
    """The trace that decides about the expert cache. Raises HetcompError if it is missing or cannot be read."""
    if wishes.expert_cache != AUTO_CACHE:
        if wishes.routing_trace is not None:
            raise HetcompError("--routing-trace decides between expert caches; give --expert-cache auto with it.")
        return None
    if wishes.routing_trace is None:
        raise HetcompError(
            "--expert-cache auto needs recorded routing: record it with hetcomp trace MODEL.hetc --routing FILE --text "
            "TEXT, and give --routing-trace FILE."
        )
    return RoutingTrace.read(Path(wishes.routing_trace))


def cache_policy(name: str) -> CachePolicy:
    """Raises HetcompError for a policy that is unknown."""
    found = next((policy for policy in CACHE_POLICIES if policy == name), None)
    if found is None:
        raise HetcompError(
            f"Unknown expert cache '{name}'; the policies are {', '.join((*CACHE_POLICIES, AUTO_CACHE))}."
        )
    return found

"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hetcomp.errors import HetcompError

if TYPE_CHECKING:
    from hetcomp.plan_wishes import PlanWishes

DEFAULT_MAX_KL = 0.01
DEFAULT_ADAPTER_RANK = 16

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="HF folder, GGUF or ONNX file, zoo name, or (plan) an artifact.")
]
Hw = Annotated[str, typer.Option("--hw", help="auto, preset:NAME, or a profile file.")]
Formats = Annotated[
    str,
    typer.Option("--formats", help="auto, bf16, q8, q4, .., or role=format|format,... (experts, attention, kv, ...)."),
]
Context = Annotated[int | None, typer.Option("--context", min=1, help="Positions of the KV cache.")]
KvTokens = Annotated[
    int | None, typer.Option("--kv-tokens", min=1, help="Positions that all sequences hold together; default: all.")
]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Sequences kept at once.")]
IsaList = Annotated[str, typer.Option("--isa", help="auto (the profile's), or a list: avx512,avx2.")]
Prompt = Annotated[int | None, typer.Option("--prompt", min=1, help="Tokens of a prompt to plan for.")]
Answer = Annotated[int | None, typer.Option("--answer", min=1, help="Tokens of an answer to plan for.")]
Vram = Annotated[
    str | None,
    typer.Option("--vram", help="Of each GPU: 16G, or 12G,24G (powers of 1024; 0: none). Default: what is free."),
]
Pinned = Annotated[str | None, typer.Option("--pinned", help="Limit of pinned host memory.")]
PinList = Annotated[list[str] | None, typer.Option("--pin", help="ROLE[@LAYERS]=DEVICE, e.g. attn@0-3=gpu:0.")]
Stats = Annotated[str | None, typer.Option("--stats", help="Expert statistics: FILE or FILE#DOMAIN.")]
Defer = Annotated[
    str, typer.Option("--defer", help="Experts on the CPU that a token adds one MoE layer later: a number, or auto.")
]
MaxKl = Annotated[
    float, typer.Option("--max-kl", help="With --defer auto: allowed mean KL divergence, in nats a token.")
]
DeferText = Annotated[
    Path | None,
    typer.Option(
        "--defer-text", help="With --defer auto: UTF-8 text, 2,048 tokens of it are read. Default: the zoo's."
    ),
]
ExpertCache = Annotated[
    str, typer.Option("--expert-cache", help="static; lru or lfu: hot experts move to the GPU while decoding; or auto.")
]
RoutingTraceFile = Annotated[
    Path | None,
    typer.Option("--routing-trace", help="With --expert-cache auto: what hetcomp trace --routing wrote decides."),
]
FromDisk = Annotated[
    bool,
    typer.Option("--from-disk", help="Experts that do not fit into memory stay on the disk, read as they are chosen."),
]
Adapters = Annotated[list[str] | None, typer.Option("--adapter", help="LoRA adapter (PEFT folder); with --merge.")]
Merge = Annotated[bool, typer.Option("--merge", help="Add the adapter to the weights before they are packed.")]
AllowRouter = Annotated[bool, typer.Option("--allow-router", help="Accept an adapter that changes routers.")]
AdapterCount = Annotated[
    int,
    typer.Option("--adapters", min=0, help="Room for so many LoRA adapters at run time; a GPU needs it."),
]
AdapterRank = Annotated[int, typer.Option("--adapter-rank", min=1, help="With --adapters: their greatest rank.")]
AdapterExperts = Annotated[
    bool,
    typer.Option("--adapter-experts/--no-adapter-experts", help="With --adapters: also for routed experts on GPUs."),
]
StopAfter = Annotated[str | None, typer.Option("--stop-after", metavar="PASS", help="Print the plan after PASS.")]
DumpDir = Annotated[Path | None, typer.Option("--dump-dir", help="Write the plan after every pass here.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def formats_of(text: str) -> str | dict[str, str]:
    """One format for all roles, or formats by role. Raises HetcompError."""
    if "=" not in text:
        return text
    pairs = [part.partition("=") for part in text.split(",")]
    for role, equals, form in pairs:
        if not (role and equals and form):
            raise HetcompError(f"--formats {text} is not understood; write one format or role=format,role=format.")
    return {role.strip(): form.strip() for role, _, form in pairs}


def wishes_of(
    prompt: int | None,
    answer: int | None,
    batch: int,
    vram: str | None,
    pinned: str | None,
    pins: list[str] | None,
    stats: str | None,
    defer: str = "0",
    max_kl: float = DEFAULT_MAX_KL,
    defer_text: Path | None = None,
    expert_cache: str = "static",
    routing_trace: Path | None = None,
    *,
    from_disk: bool = False,
    adapters: int = 0,
    adapter_rank: int = DEFAULT_ADAPTER_RANK,
    adapter_experts: bool = True,
) -> PlanWishes:
    """What the options ask of placement. Raises HetcompError for sizes and numbers that are not understood."""
    from hetcomp.ir.annotations import AdapterRoom, Mix
    from hetcomp.passes.phases import DEFAULT_ANSWER, DEFAULT_PROMPT
    from hetcomp.plan_wishes import PlanWishes
    from hetcomp.what_if import parse_size

    mix = Mix(prompt or DEFAULT_PROMPT, answer or DEFAULT_ANSWER, batch) if prompt or answer else None
    return PlanWishes(
        mix=mix,
        vram=vram_of(vram) if vram is not None else None,
        pinned_bytes=parse_size(pinned, "--pinned") if pinned is not None else None,
        pins=tuple(pins or ()),
        statistics=stats,
        deferral=_deferral_of(defer),
        max_kl=max_kl,
        deferral_text=defer_text,
        expert_cache=expert_cache,
        routing_trace=routing_trace,
        from_disk=from_disk,
        adapter_room=AdapterRoom(adapters, adapter_rank, adapter_experts) if adapters else None,
    )


def vram_of(text: str) -> int | tuple[int, ...]:
    """Bytes of each GPU (``16G``), or one figure a GPU (``12G,24G``). Raises HetcompError."""
    from hetcomp.what_if import parse_size

    sizes = tuple(parse_size(part, "--vram") for part in text.split(","))
    return sizes[0] if len(sizes) == 1 else sizes


def _deferral_of(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise HetcompError(f"--defer {text} is not understood; write a number, or auto.") from None


def ccs_of(text: str) -> list[int]:
    """Compute capabilities of a list as ``80,90``; empty for the profile's GPU's. Raises HetcompError."""
    try:
        return [int(part) for part in text.split(",")] if text != "auto" else []
    except ValueError:
        raise HetcompError(f"--cc {text} is not understood; write auto, or a list such as 80,89,90.") from None


def isas_of(text: str) -> list[str] | None:
    """Instruction sets, None for the profile's best."""
    return None if text == "auto" else [part.strip() for part in text.split(",")]


def token_ids(text: str) -> list[int]:
    """Token ids of a list as ``1,2,3``. Raises HetcompError."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise HetcompError(f"--ids {text} is not a list of integers such as 1,2,3.") from None

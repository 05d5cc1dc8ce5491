"""compile(): from a checkpoint to an artifact, stage by stage."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hetcomp import frontend
from hetcomp.adapters.low_rank import Adapter
from hetcomp.adapters.merge import MergedReader, adapter_to_merge, attached
from hetcomp.artifact.staging import staged_folder
from hetcomp.backends.cut_weights import CutImportance, CutReader
from hetcomp.backends.importance import Importance
from hetcomp.backends.pack_weights import WeightPacker
from hetcomp.backends.protocol import Isa
from hetcomp.backends.select_kernels import CpuTarget, default_backends
from hetcomp.build_artifact import all_cuts, write_artifact
from hetcomp.choose_expert_cache import choose_expert_cache
from hetcomp.conversion_error import conversion_notes
from hetcomp.errors import HetcompError
from hetcomp.executable import Executable
from hetcomp.external import EXTERNAL, check_wish, external_weights
from hetcomp.hardware.profile import HardwareProfile, load_profile
from hetcomp.ir.annotations import Mix
from hetcomp.ir.deferral import moe_layers
from hetcomp.ir.kv_pool import KvPool
from hetcomp.ir.plan import Plan
from hetcomp.ir.types import Dim
from hetcomp.passes.context import Context, DeferralRequest, FormatRequest
from hetcomp.passes.format_search import search_formats
from hetcomp.passes.phases import default_mix
from hetcomp.passes.pins import parse_pin
from hetcomp.passes.pipeline import run_pipeline
from hetcomp.passes.step_length import step_tokens
from hetcomp.plan_wishes import (
    AUTO_CACHE,
    PlanWishes,
    adapter_room,
    cache_policy,
    deferral_request,
    expert_statistics,
    routing_trace,
    use_gpus,
)
from hetcomp.planned import Planned
from hetcomp.progress import ProgressSink, QuietProgress
from hetcomp.replay import replay

if TYPE_CHECKING:
    import torch

# Context when the user names none: what a chat needs, not what the config allows (a 128k KV cache would
# fill the memory of the machines we aim at).
DEFAULT_CONTEXT = 4096
# Largest step. 512 tokens keep the activations of one step in the L2/L3 caches of desktop CPUs while every
# weight is read once for them; llama.cpp's default micro-batch is the same.
MAX_STEP_TOKENS = 512
# Rows of logits a step may return; more are computed in several steps (a vocabulary of 150k is 0.6 MB a row).
MAX_LOGIT_ROWS = 64


# Largest step where a GPU takes part. FreeToken streams whole layers for chunks of 4,096 tokens and more.
MAX_GPU_STEP_TOKENS = 16384


def plan_model(
    model: str | Path | torch.nn.Module,
    *,
    hw_profile: str | Path | HardwareProfile = "auto",
    context_length: int | None = None,
    max_batch: int = 1,
    kv_tokens: int | None = None,
    formats: str | Mapping[str, str] = "auto",
    isa: Sequence[str] | None = None,
    wishes: PlanWishes | None = None,
    adapters: Sequence[str | Path] = (),
    merge: bool = False,
    allow_router: bool = False,
    planning: bool = False,
    stop_after: str | None = None,
    dump_dir: Path | None = None,
    progress: ProgressSink | None = None,
) -> Planned:
    """Traces ``model`` and runs the passes, without reading a weight, but for one of each class of quantised weights
    that the plan converts, to measure what that costs. Arguments as in :func:`compile`.

    planning: nothing will be generated from the plan, which may then stream weights to GPUs; else it is the one that
    :func:`compile` generates.
    """
    progress = progress or QuietProgress()
    wishes = wishes or PlanWishes()
    request = FormatRequest.parse(formats)
    progress.stage("measure hardware" if hw_profile == "auto" else "read hardware profile")
    profile = hw_profile if isinstance(hw_profile, HardwareProfile) else load_profile(str(hw_profile))
    target = CpuTarget(_choose_isas(isa, profile), default_backends(), profile.tunings)
    context = Context(
        profile,
        None,
        target,
        request,
        isa=target.isas[0].value,
        planning=planning,
        use_gpus=use_gpus(profile, wishes.vram),
        vram=wishes.vram,
        pinned_bytes=wishes.pinned_bytes,
        pins=tuple(parse_pin(pin) for pin in wishes.pins),
        statistics=expert_statistics(wishes.statistics),
        expert_cache="static" if wishes.expert_cache == AUTO_CACHE else cache_policy(wishes.expert_cache),
        from_disk=wishes.from_disk,
        adapter_room=adapter_room(wishes.adapter_room),
    )
    mix, trace = wishes.mix, routing_trace(wishes)
    progress.stage("trace")
    imported = frontend.load(
        model,
        context_length=_context_length(context_length, mix),
        default_context=DEFAULT_CONTEXT,
        max_batch=max(max_batch, mix.batch if mix else 1),
        max_tokens=_step_tokens(context, mix),
        max_logit_rows=MAX_LOGIT_ROWS,
    )
    adapter = adapter_to_merge(adapters, merge, imported, allow_router=allow_router)
    if adapter is not None:
        context = replace(context, adapters=(attached(adapter),))
        if wishes.deferral == "auto":
            raise HetcompError(
                f"--defer auto measures the model without adapter {adapter.name}; give a number beside --adapter."
            )
    if wishes.deferral and wishes.expert_cache != "static":
        raise HetcompError(
            f"Deferred experts and --expert-cache {wishes.expert_cache} exclude each other: what a token defers must "
            "not depend on what a cache holds. Give one of them."
        )
    deferral = deferral_request(model, wishes, imported.checkpoint is not None, progress)
    context = replace(context, checkpoint=imported.checkpoint, deferral=deferral)
    imported = replace(imported, plan=_share_cache(imported.plan, kv_tokens))
    usual = replace(default_mix(KvPool.of(imported.plan.max_dims()).longest), batch=max_batch)
    imported = replace(imported, plan=replace(imported.plan, mix=mix or usual))
    _check_mix(imported.plan)
    if imported.unused:
        progress.warn(
            f"{len(imported.unused)} tensors of the checkpoint are not used, the first is {imported.unused[0]}"
        )
    progress.stage("plan")
    free_step = context.use_gpus and not planning and mix is None
    if trace is not None:
        chosen = choose_expert_cache(
            trace, str(wishes.routing_trace), context, lambda c: _run_passes(imported, c, target, free_step)
        )
        if stop_after is None and dump_dir is None:
            return _noted(chosen, adapter)
        context = chosen.context
    return _noted(_run_passes(imported, context, target, free_step, stop_after, dump_dir), adapter)


def _noted(planned: Planned, adapter: Adapter | None) -> Planned:
    """With the adapter that will be merged, and notes of what is converted out of a quantised checkpoint."""
    notes = conversion_notes(planned.plan, planned.imported.checkpoint)
    return replace(planned, adapter=adapter, plan=replace(planned.plan, notes=(*planned.plan.notes, *notes)))


def replan(planned: Planned, profile: HardwareProfile) -> Planned:
    """The same model, wishes and formats on another machine; nothing is traced again. Deferral that was measured is
    taken as it was found: plans of one accuracy are compared."""
    deferral = planned.context.deferral
    if deferral is not None and deferral.measure is not None:
        deferral = DeferralRequest(tuple(layer.placement.deferred for layer in moe_layers(planned.plan)))
    with_gpus = use_gpus(profile, planned.context.vram)
    context = replace(planned.context, profile=profile, use_gpus=with_gpus, deferral=deferral)
    seconds: dict[str, float] = {}
    plan = run_pipeline(planned.imported.plan, context, seconds=seconds)
    return Planned(plan, planned.imported, planned.target, profile, context, seconds, planned.adapter)


def _run_passes(
    imported: frontend.Imported,
    context: Context,
    target: CpuTarget,
    free_step: bool,
    stop_after: str | None = None,
    dump_dir: Path | None = None,
) -> Planned:
    """free_step: the length of the largest step is ours to choose, for each choice of formats anew."""
    seconds: dict[str, float] = {}

    def with_steps(context: Context) -> frontend.Imported:
        return replace(imported, plan=_best_steps(imported.plan, context)) if free_step else imported

    found = None
    if stop_after not in ("lower", "bind_weights"):  # nothing depends on formats yet

        def run(context: Context) -> Plan:
            plan = with_steps(context).plan
            seconds.clear()
            return run_pipeline(plan, context, seconds=seconds)

        context, found = search_formats(context, run)
        steps = with_steps(context).plan if found is None else found
        imported = replace(imported, plan=replace(imported.plan, dims=steps.dims))
    if found is None or stop_after is not None or dump_dir is not None:
        notes = found.notes if found is not None and stop_after is None else None
        found = run_pipeline(imported.plan, context, stop_after=stop_after, dump_dir=dump_dir, seconds=seconds)
        found = found if notes is None else replace(found, notes=notes)
    return Planned(found, imported, target, context.profile, context, seconds)


def _context_length(wanted: int | None, mix: Mix | None) -> int | None:
    """The user's; else what the mix needs where that is more than the default."""
    if wanted is not None or mix is None:
        return wanted
    needed = mix.prompt + mix.answer
    return needed if needed > DEFAULT_CONTEXT else None


def _step_tokens(context: Context, mix: Mix | None) -> int:
    """Tokens of the largest step: all of the prompt that is planned for, or of any, where a GPU takes part."""
    if not context.use_gpus:
        return MAX_STEP_TOKENS
    wanted = mix.prompt if mix else MAX_STEP_TOKENS if context.planning else MAX_GPU_STEP_TOKENS
    return min(MAX_GPU_STEP_TOKENS, max(MAX_STEP_TOKENS, wanted))


def _best_steps(plan: Plan, context: Context) -> Plan:
    """The plan with so many tokens a step as a request that fills the context is fastest with."""
    tokens = step_tokens(run_pipeline(plan, context, stop_after="choose_formats"), context)
    return replace(plan, dims=tuple(replace(d, max=tokens) if d.name == "T" else d for d in plan.dims))


def _share_cache(plan: Plan, tokens: int | None) -> Plan:
    """The plan with a bound of the positions that all sequences hold together."""
    if tokens is None:
        return plan
    dims = plan.max_dims()
    whole = dims["slots"] * dims["context"]
    if not 1 <= tokens <= whole:
        raise HetcompError(
            f"A KV cache of {tokens} positions was asked for; {dims['slots']} sequences of {dims['context']} positions "
            f"hold {whole}: give 1 to {whole}, a longer --context or a larger --batch."
        )
    return replace(plan, dims=(*plan.dims, Dim("kv_tokens", tokens, tokens)))


def _check_mix(plan: Plan) -> None:
    mix, pool = plan.mix, KvPool.of(plan.max_dims())
    if mix is not None and mix.prompt + mix.answer > pool.longest:
        what, option = ("context", "--context") if pool.longest == pool.context else ("KV cache", "--kv-tokens")
        raise HetcompError(
            f"A prompt of {mix.prompt} and an answer of {mix.answer} tokens do not fit into a {what} of "
            f"{pool.longest}; give a larger {option} or shorter texts."
        )


def compile(
    model: str | Path | torch.nn.Module,
    hw_profile: str | Path | HardwareProfile = "auto",
    *,
    context_length: int | None = None,
    max_batch: int = 1,
    kv_tokens: int | None = None,
    formats: str | Mapping[str, str] = "auto",
    out: str | Path | None = None,
    isa: Sequence[str] | None = None,
    wishes: PlanWishes | None = None,
    ccs: Sequence[int] = (),
    tune: bool | None = None,
    plan: str | Path | None = None,
    importance: str | Path | None = None,
    adapters: Sequence[str | Path] = (),
    merge: bool = False,
    allow_router: bool = False,
    tokenizer: str | Path | None = None,
    weights: str = "packed",
    dump_dir: Path | None = None,
    progress: ProgressSink | None = None,
) -> Executable:
    """Compiles a model to native code and returns it, loaded on first use.

    model: a Hugging Face folder (config.json and safetensors), a GGUF file (any of a split model's), an ONNX file of a
    decoder, a transformers module, or a zoo name.
    hw_profile: ``auto`` measures this machine (cached), ``preset:NAME``, a profile file or object.
    context_length: positions of the KV cache; by default the model's maximum, at most 4096.
    max_batch: sequences kept at once. kv_tokens: positions that they hold together, which is what the KV cache takes
    memory for; by default max_batch x context_length. formats: ``auto`` (the checkpoint's, coarser where memory
    requires it), one of f32, bf16, q8, fp8, q4, mxfp4 (of files that have it q6k, q5k, q4z, q4k), or a mapping by role
    (experts, attention, dense, router, embedding; kv: f32, bf16, q8, fp8) to one, or to several to choose from:
    ``q4|q8``. out: the artifact's folder; by default a temporary one that lives as long as the Executable. isa:
    instruction sets to build for, best first; by default the profile's best.
    wishes: what placement shall keep to; the profile's GPUs take part unless ``wishes.vram`` is 0. ccs: compute
    capabilities (80, 90, ..) that GPU code is generated for; by default those of the GPUs that the plan uses. tune:
    whether tiles of GPU kernels are measured on this machine's first GPU, at most a minute and remembered (None: where
    it has one that code is generated for), or taken from tables.
    importance: a safetensors file that says how much each column of a weight matters (hetcomp.backends.importance).
    adapters: a PEFT LoRA folder, which is merged into the float weights before they are packed (merge: must be True);
    allow_router: it may change routers. tokenizer: a folder whose tokenizer and chat template are taken instead of the
    model's own. weights: ``packed`` into the artifact, or ``external``: what the checkpoint's files have as the kernels
    compute with it stays there alone, and is repacked when the artifact is loaded, which needs the files then.

    Raises HetcompError, with nothing left at ``out``, if the input is damaged or unknown, the model does not fit
    the profile's memory, or the machine lacks a compiler.
    """
    progress = progress or QuietProgress()
    check_wish(weights, wishes or PlanWishes())
    words = Path(tokenizer) if tokenizer is not None else None
    if words is not None and not (words / "tokenizer.json").is_file():
        raise HetcompError(f"{words} has no tokenizer.json; give the folder of a Hugging Face tokenizer.")
    planned = plan_model(
        model,
        hw_profile=hw_profile,
        context_length=context_length,
        max_batch=max_batch,
        kv_tokens=kv_tokens,
        formats=formats,
        isa=isa,
        wishes=wishes,
        adapters=adapters,
        merge=merge,
        allow_router=allow_router,
        stop_after="lower" if plan is not None else None,
        dump_dir=dump_dir,
        progress=progress,
    )
    if plan is not None:
        planned = replace(planned, plan=replay(Path(plan), planned.imported.plan, planned.context))
    checkpoint = planned.imported.checkpoint
    if checkpoint is None:
        raise HetcompError(
            f"{planned.plan.model.name} is a config without weights: it can be planned (hetcomp plan), "
            "not compiled. Give a folder with safetensors files, or a GGUF or ONNX file."
        )
    columns = Importance.load(Path(importance), planned.plan.values) if importance is not None else None
    owner = None
    if out is None:
        owner = tempfile.TemporaryDirectory(prefix="hetcomp-")
        out = Path(owner.name) / f"{planned.plan.model.name}.hetc"
    target = Path(out)
    with staged_folder(target) as staging:
        cuts = all_cuts(planned.plan)
        merged = MergedReader(checkpoint, planned.adapter) if planned.adapter is not None else None
        packer = WeightPacker(CutReader(merged or checkpoint, cuts), CutImportance(columns, cuts) if columns else None)
        external = None
        if weights == EXTERNAL:
            planned, external = external_weights(planned, checkpoint, cuts)
        write_artifact(planned, packer, staging, progress, ccs, tune, merged, words, external)
    return Executable(target, owner=owner)


def _choose_isas(wanted: Sequence[str] | None, profile: HardwareProfile) -> tuple[Isa, ...]:
    """The instruction sets to build for, best first."""
    known = {isa.value: isa for isa in Isa}
    if wanted is None:
        best = [isa for isa in Isa if isa.value in profile.isas]
        if not best:
            raise HetcompError(
                f"The CPU of profile {profile.name} has none of the supported instruction sets {', '.join(known)}."
            )
        return (best[-1],)
    for name in wanted:
        if name not in known:
            raise HetcompError(f"Unknown instruction set '{name}'; choose from {', '.join(known)}.")
    return tuple(sorted({known[name] for name in wanted}, key=list(Isa).index, reverse=True))

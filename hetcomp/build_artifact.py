"""Builds an artifact's code and weights from a planned model."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from hetcomp import installed_runtime
from hetcomp.adapters.base_model import ARTIFACT_FILE, BaseModel
from hetcomp.adapters.merge import MergedReader
from hetcomp.artifact.chat_template import compile_chat_template, template_bytes
from hetcomp.artifact.chat_template_parity import prove_chat_template_parity
from hetcomp.artifact.external_weights import ExternalRecord, ExternalWeights, record_external
from hetcomp.artifact.gpu_program_file import write_gpu_program
from hetcomp.artifact.tokenizer import compile_tokenizer
from hetcomp.artifact.tokenizer_parity import prove_parity
from hetcomp.artifact.weight_files import WeightRecord, write_weights
from hetcomp.artifact.writer import Documents, copy_runtime, write_documents, write_manifest
from hetcomp.backends.exchange import Exchange
from hetcomp.backends.gpu.compile_kernels import CompiledKernel, compile_kernels
from hetcomp.backends.gpu.gpu_program import GpuProgram, lower_programs
from hetcomp.backends.gpu.measure_tiles import measure_tiles
from hetcomp.backends.gpu.tile_choices import MeasuredTile, choices_of
from hetcomp.backends.gpu.tile_timer import GpuTimer
from hetcomp.backends.gpu.write_kernels import write_kernels
from hetcomp.backends.native_compiler import Source, compile_objects, link_program
from hetcomp.backends.pack_weights import Packer
from hetcomp.backends.program import ProgramLayout, render_program
from hetcomp.backends.protocol import Isa
from hetcomp.backends.select_kernels import select_kernels
from hetcomp.backends.tvm import support_source
from hetcomp.errors import HetcompError
from hetcomp.frontend.gguf.tokenizer import write_tokenizer
from hetcomp.ir.homes import CPU, number, on_gpu
from hetcomp.ir.node_parts import Cut, gpu_cut_weights
from hetcomp.ir.plan import Plan, Value
from hetcomp.ir.printer import print_plan
from hetcomp.ir.serialise import to_json
from hetcomp.passes.memory_table import gpu_limit
from hetcomp.planned import Planned
from hetcomp.progress import ProgressSink

_IDS_ONLY = "The artifact takes token ids only (--ids)."


def all_cuts(plan: Plan) -> dict[str, tuple[Value, Cut]]:
    """By id of every weight that an artifact has a part of: the whole weight and the cut."""
    of_gpu = {value.id: (plan.value_map()[whole], cut) for whole, (value, cut) in gpu_cut_weights(plan).items()}
    return {**ProgramLayout.of(plan).cuts, **of_gpu}


def write_artifact(
    planned: Planned,
    packer: Packer,
    staging: Path,
    progress: ProgressSink,
    ccs: Sequence[int] = (),
    tune: bool | None = False,
    merged: MergedReader | None = None,
    tokenizer: Path | None = None,
    external: ExternalWeights | None = None,
) -> None:
    """Fills ``staging`` with the code, weights and documents of a planned model. ``tune``: whether the GPU's tiles are
    measured; None: where this machine has a GPU that code is generated for. ``merged``: what ``packer`` reads from, if
    an adapter is merged. ``tokenizer``: the folder whose tokenizer and chat template are taken instead of the model's
    own. ``external``: which weights the artifact only refers to."""
    plan = planned.plan
    layout = ProgramLayout.of(plan)
    documents = _documents(planned, tokenizer, progress)
    digest = hashlib.sha256(documents.plan_json.encode()).hexdigest()
    # Code first: it fails early and cheaply, weights are the long part.
    wanted = sorted(set(ccs) or _capabilities(planned))
    tiles = _measured_tiles(planned, wanted, tune, progress)
    programs = lower_programs(plan, choices_of(tiles))
    compiled = _compile_gpus(planned, programs, wanted, tiles, staging, progress) if programs else []
    for isa in planned.target.isas:
        _build_program(planned, isa, digest, staging, progress)
    of_gpus = (value for program in programs for value in program.weights)
    sizes = [planned.target.packed_bytes(v) for v in (*layout.weights, *of_gpus)]
    progress.stage("pack weights", total=sum(sizes))
    records = _write_weights(layout.weights, planned, packer, external, staging, "weights", progress)
    records = [replace(record, node=node) for record, node in zip(records, layout.weight_nodes, strict=True)]
    gpus = []
    cpu_weights = [value.id for value in layout.weights]
    for program in programs:
        stem = f"gpu{program.number}-weights"
        gpu_records = _write_weights(program.weights, planned, packer, external, staging, stem, progress)
        sources = external.sources() if external is not None else ()
        gpus.append(write_gpu_program(program, gpu_records, cpu_weights, compiled, staging, sources))
    for name in packer.not_finite:
        progress.warn(
            f"weight {name} holds numbers that are NaN, infinite or too large for its format; the model's output will "
            "not be usable"
        )
    if merged is not None and not any(weight.delta_norm for weight in merged.write_report(staging)):
        progress.warn("the adapter changes nothing: all of its deltas are zero")
    for name in packer.rounded:
        progress.warn(f"weight {name} has scales that fp16 cannot hold; they were rounded")
    write_documents(documents, staging)
    (staging / ARTIFACT_FILE).write_text(BaseModel.of(planned.imported).to_json(), encoding="utf-8")
    copy_runtime(staging)
    write_manifest(
        plan,
        layout,
        records,
        planned.target.isas,
        version("hetcomp"),
        {"name": planned.profile.name, "sha256": planned.profile.sha256()},
        staging,
        gpus,
        list(Exchange.of(plan).of_side(CPU)) if programs else (),
        external,
    )


def _write_weights(
    values: Sequence[Value],
    planned: Planned,
    packer: Packer,
    external: ExternalWeights | None,
    staging: Path,
    stem: str,
    progress: ProgressSink,
) -> list[WeightRecord | ExternalRecord]:
    """Writes those of ``values`` that ``external`` does not refer to; records of all, in order."""
    outside = {v.id for v in values if external is not None and external.stored(v) is not None}
    here = [v for v in values if v.id not in outside]
    sizes = [planned.target.packed_bytes(v) for v in here]
    written = iter(write_weights(here, sizes, packer.chunks(here), staging, progress.advance, stem))
    if external is None:
        return list(written)
    there = [v for v in values if v.id in outside]
    referred = iter(record_external(there, external, packer.chunks(there), progress.advance))
    return [next(referred) if v.id in outside else next(written) for v in values]


def _capabilities(planned: Planned) -> set[int]:
    """Of the GPUs that the plan uses."""
    gpus = [planned.profile.gpus[number(device)] for device in on_gpu(planned.plan)]
    return {10 * major + minor for major, minor in (gpu.compute_capability for gpu in gpus)}


def _measured_tiles(
    planned: Planned, wanted: Sequence[int], tune: bool | None, progress: ProgressSink
) -> list[MeasuredTile]:
    """What this machine's first GPU is fastest with, if it is one that code is generated for. Raises HetcompError if it
    is not and the user wants it measured."""
    if tune is False or not on_gpu(planned.plan):
        return []
    timer = GpuTimer.open()
    if timer is None:
        if tune:
            raise HetcompError(
                "--tune times kernels on this machine's GPU, but there is none, or no driver that loads; leave --tune "
                "out to take the tables' tiles."
            )
        return []
    with timer:
        if timer.cc in wanted:
            return measure_tiles(planned.plan, timer, threads=planned.profile.compile_threads(), progress=progress)
    if tune:
        raise HetcompError(
            f"--tune times kernels on this machine's {timer.name}, but code is generated for compute capability "
            f"{', '.join(map(str, wanted))}; add {timer.cc} to --cc, or leave --tune out."
        )
    return []


def _compile_gpus(
    planned: Planned,
    programs: Sequence[GpuProgram],
    wanted: Sequence[int],
    tiles: Sequence[MeasuredTile],
    staging: Path,
    progress: ProgressSink,
) -> list[CompiledKernel]:
    """Compiles and writes all GPUs' kernels. Raises HetcompError if a program needs more memory than it may."""
    kernels = {kernel.name: kernel for program in programs for kernel in program.kernels}
    names = ", ".join(f"sm_{cc}" for cc in wanted)
    progress.stage(f"compile kernels ({names})", total=len(kernels) * len(wanted))
    compiled = compile_kernels(
        kernels.values(),
        wanted,
        threads=planned.profile.compile_threads(),
        progress=lambda stem: progress.advance(1, stem),
    )
    for program in programs:
        needed, limit = program.device_bytes(compiled), gpu_limit(planned.context, program.number)
        if needed > limit:
            raise HetcompError(
                f"The part of the plan on {program.device} needs {needed:,} bytes, {limit:,} may be used; give a "
                "larger --vram, or a shorter --context or --prompt."
            )
    write_kernels(compiled, staging / "gpu", tiles)
    return compiled


def _documents(planned: Planned, tokenizer: Path | None, progress: ProgressSink) -> Documents:
    """Plan texts, and the tokenizer and chat template, those of the folder ``tokenizer`` before the model's own."""
    plan, imported = planned.plan, planned.imported
    words, template = None, None
    folder = tokenizer or imported.folder
    if folder is not None or imported.gguf is not None:
        progress.stage("tokenizer")
    if folder is not None:
        words, template = _words(folder, progress)
    elif imported.gguf is not None:
        with tempfile.TemporaryDirectory(prefix="hetcomp-") as temporary:
            try:
                write_tokenizer(imported.gguf, Path(temporary))
            except HetcompError as error:
                progress.warn(f"{error} {_IDS_ONLY}")
            words, template = _words(Path(temporary), progress)
    return Documents(to_json(plan), print_plan(plan), words, template)


def _words(folder: Path, progress: ProgressSink) -> tuple[bytes | None, bytes | None]:
    """The tokenizer and chat template of a folder, whose C++ twins are proven equal to the originals here."""
    words, template = None, None
    try:
        compiled = compile_tokenizer(folder)
        if compiled is not None:
            prove_parity(compiled, folder)
            words = compiled.data
    except HetcompError as error:
        progress.warn(f"{error} {_IDS_ONLY}")
    try:
        tree = compile_chat_template(folder)
        if tree is not None:
            prove_chat_template_parity(tree, folder)
            template = template_bytes(tree)
    except HetcompError as error:
        progress.warn(f"{error} The artifact has no chat template (--chat will be refused).")
    return words, template


def _build_program(planned: Planned, isa: Isa, digest: str, staging: Path, progress: ProgressSink) -> None:
    kernels = select_kernels(planned.plan, planned.target, isa)
    unique = {kernel.name: kernel for kernel in kernels.values()}
    sources = [Source(kernel.name, kernel.source) for kernel in unique.values()]
    sources.append(Source("program", render_program(planned.plan, kernels, isa, digest)))
    sources.append(Source("tvm_support", support_source()))
    folder = staging / "kernels" / "src" / isa.value
    folder.mkdir(parents=True)
    for source in sources:
        (folder / f"{source.stem}.cpp").write_text(source.text)
    progress.stage(f"compile kernels ({isa.value})", total=len(sources))
    objects = compile_objects(
        sources,
        isa,
        installed_runtime.include(),
        threads=planned.profile.compile_threads(),
        progress=lambda stem: progress.advance(1, stem),
    )
    with tempfile.TemporaryDirectory(prefix="hetcomp-") as temporary:
        for stem, data in {name: data for kernel in unique.values() for name, data in kernel.objects}.items():
            path = Path(temporary) / f"{hashlib.sha256(stem.encode()).hexdigest()[:16]}.o"
            path.write_bytes(data)
            objects.append(path)
        link_program(objects, staging / "kernels" / f"lib_{isa.value}.so")

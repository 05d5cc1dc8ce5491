"""``hetcomp adapter``: what a LoRA adapter holds, and the same in other formats."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from hetcomp.cli.guard import guard
from hetcomp.cli.options import AllowRouter, Debug
from hetcomp.errors import HetcompError

if TYPE_CHECKING:
    from hetcomp.adapters.inspection import Inspection

adapter_app = typer.Typer(name="adapter", help="Shows and converts LoRA adapters (PEFT folders).", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="adapter_config.json and adapter_model.safetensors.")]


@adapter_app.command("inspect")
def inspect_command(
    folder: Folder,
    model: Annotated[
        str | None, typer.Option("--model", help="Its base: HF folder or zoo name. Checks that it can be applied.")
    ] = None,
    allow_router: AllowRouter = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
    debug: Debug = False,
) -> None:
    """Shows rank, targets, norms by layer and memory of an adapter; refuses what cannot be applied."""

    def body() -> None:
        from hetcomp.adapters.base_model import BaseModel, import_base
        from hetcomp.adapters.bind_adapter import bind_adapter
        from hetcomp.adapters.inspection import inspect_adapter
        from hetcomp.adapters.peft_folder import read_folder

        read = read_folder(folder)
        bound = None
        if model is not None:
            bound = bind_adapter(read, BaseModel.of(import_base(model)), allow_router=allow_router)
        found = inspect_adapter(read, bound)
        if as_json:
            from pydantic import TypeAdapter

            typer.echo(TypeAdapter(type(found)).dump_json(found, indent=1).decode())
        else:
            _show(found, Console(), applied_to=model)

    guard(body, debug)


@adapter_app.command("pack")
def pack_command(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="The compiled model, MODEL.hetc.")],
    folder: Folder,
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write, e.g. NAME.hetlora; must not exist.")],
    name: Annotated[str | None, typer.Option("--name", help="Default: the folder's.")] = None,
    allow_router: AllowRouter = False,
    debug: Debug = False,
) -> None:
    """Packs an adapter for a compiled model, which loads it at run time (run --adapter, hetcomp_adapter_load)."""

    def body() -> None:
        from hetcomp.adapters.pack_adapter import pack_adapter
        from hetcomp.cli.plan_report import size

        packed = pack_adapter(artifact, folder, out, name=name, allow_router=allow_router)
        typer.echo(f"{packed.path}: {packed.weights} weights, rank {packed.rank}, {size(packed.bytes)} in memory")

    guard(body, debug)


class Form(StrEnum):
    """What adapters are exported to."""

    STACKED = "peft-stacked"
    PER_EXPERT = "peft-per-expert"
    MERGED = "merged"
    GGUF = "gguf"


@adapter_app.command("export")
def export_command(
    folder: Folder,
    to: Annotated[Form, typer.Option("--to", help="PEFT in either form, a merged checkpoint, or llama.cpp's.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder (gguf: file) to write; must not exist.")],
    model: Annotated[
        str | None, typer.Option("--model", help="Its base: HF folder or zoo name. Default: what the adapter names.")
    ] = None,
    allow_router: AllowRouter = False,
    debug: Debug = False,
) -> None:
    """Writes an adapter in another form; what was read is applied whole or refused."""

    def body() -> None:
        from hetcomp.adapters.base_model import BaseModel, import_base
        from hetcomp.adapters.bind_adapter import bind_adapter
        from hetcomp.adapters.export_gguf import export_gguf
        from hetcomp.adapters.export_merged import export_merged
        from hetcomp.adapters.export_peft import export_per_expert, export_stacked
        from hetcomp.adapters.peft_folder import read_folder

        read = read_folder(folder)
        named = model or read.config.base_model_name_or_path
        if named is None or (model is None and not Path(named).is_dir()):
            raise HetcompError(f"{folder} was made for {named or 'an unnamed base'}, which is not here; give --model.")
        imported = import_base(named)
        base = BaseModel.of(imported)
        adapter = bind_adapter(read, base, allow_router=allow_router)
        if to is Form.STACKED:
            export_stacked(adapter, base, out)
        elif to is Form.PER_EXPERT:
            export_per_expert(adapter, base, out)
        elif to is Form.MERGED:
            export_merged(adapter, base, imported, out)
        else:
            export_gguf(adapter, base, out)
        typer.echo(f"{out}")

    guard(body, debug)


def _show(found: Inspection, console: Console, applied_to: str | None) -> None:
    from hetcomp.adapters.inspection import norms_by_layer
    from hetcomp.cli.plan_report import size

    kinds = sorted({(t.target, t.rank) for t in found.targets})
    stabilised = " (rank-stabilised)" if found.rslora else ""
    lines = [
        f"{found.name}: LoRA of rank {found.rank}, alpha {found.alpha:g}{stabilised}, "
        f"{found.parameters:,} numbers in {', '.join(found.dtypes)}",
        f"made for {found.base or 'a base that it does not name'}; sha256 {found.sha256}",
        "targets " + ", ".join(f"{target} (rank {rank})" for target, rank in kinds),
    ]
    lines += [f"every tensor can be applied to {applied_to}"] if applied_to else []
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    layers = Table("layer", "targets", "norm of the delta", title="Layers", title_justify="left")
    for layer, (count, norm) in norms_by_layer(found.targets).items():
        known = f"{norm:.6g}" if norm is not None else "give --model"
        layers.add_row("–" if layer is None else str(layer), str(count), known)
    memory = Table("rank", "stored", "in f32", title="Memory of these targets", title_justify="left")
    for rank, stored, f32 in found.memory:
        memory.add_row(f"{rank}{' (this one)' if rank == found.rank else ''}", size(stored), size(f32))
    console.print(layers, memory)

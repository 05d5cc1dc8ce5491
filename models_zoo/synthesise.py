"""Writes a synthetic Hugging Face checkpoint of a given shape: random weights, real structure.

    python -m hetcomp.models_zoo.synthesise qwen3moe-1b OUT [--seed 1] [--dtype bf16] [--layers N]

Speed is measured on these: kernels do not care what the numbers are, only how many there are. Matrices are
drawn from N(0, 1/sqrt(fan_in)) and embeddings from N(0, 1), which keeps activations of order one through any
number of layers. Each tensor has a random stream of its own, derived from the seed and its name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from hetcomp.errors import HetcompError
from hetcomp.models_zoo import find
from hetcomp.models_zoo.byte_level_tokenizer import MIN_VOCAB, write_tokenizer
from hetcomp.models_zoo.safetensors_stream import plan_shards, write_index, write_shard

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def synthesise(
    model: str | Path,
    out: Path,
    *,
    seed: int = 1,
    dtype: str = "bf16",
    layers: int | None = None,
    max_shard_gb: float = 4.0,
    progress: bool = True,
) -> Path:
    """Writes a checkpoint for ``model`` (a zoo name or a folder with a config.json) into a new folder.

    ``layers`` shortens the model. Tensors have the names and shapes of the architecture's published
    checkpoints (experts one by one where those have them so), in shards of at most ``max_shard_gb`` GB; only
    one tensor is held at a time. ``out`` appears when it is complete. Raises HetcompError if ``out`` exists,
    the model is unknown or transformers cannot build it.
    """
    out = Path(out)
    if out.exists():
        raise HetcompError(f"{out} exists already; name a new folder or remove it.")
    if dtype not in DTYPES:
        raise HetcompError(f"Unknown dtype {dtype!r}; one of {', '.join(DTYPES)} was expected.")
    config_file = _config_file(model)
    config = _shortened(json.loads(config_file.read_text()), layers) | {"torch_dtype": str(DTYPES[dtype])[6:]}
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        (work / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _write_weights(work, DTYPES[dtype], seed, max_shard_gb, progress)
        _write_text_side(work, config)
        work.chmod(0o755)
        work.rename(out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return out


def _config_file(model: str | Path) -> Path:
    folder = Path(model)
    if (folder / "config.json").is_file():
        return folder / "config.json"
    return find(str(model)) / "config.json"


def _shortened(config: dict[str, Any], layers: int | None) -> dict[str, Any]:
    if layers is None:
        return config
    if not 1 <= layers <= config["num_hidden_layers"]:
        raise HetcompError(f"--layers {layers}: the model has {config['num_hidden_layers']} layers.")
    shorter = config | {"num_hidden_layers": layers}
    if isinstance(config.get("layer_types"), list):
        shorter["layer_types"] = config["layer_types"][:layers]
    return shorter


def _write_weights(work: Path, dtype: torch.dtype, seed: int, max_shard_gb: float, progress: bool) -> None:
    shapes, transposed = checkpoint_shapes(work)
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()}
    shards = plan_shards(sizes, int(max_shard_gb * 1e9))
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not progress,
    )
    with bar:
        task = bar.add_task(f"{work.name.split('.')[1]}: {len(shards)} shard(s)", total=sum(sizes.values()))
        for shard in shards:
            for n_bytes in write_shard(
                work,
                shard,
                shapes,
                dtype,
                lambda name: _make(name, shapes[name], name in transposed, seed, dtype),
            ):
                bar.advance(task, n_bytes)
    write_index(work, shards, sum(sizes.values()))


def checkpoint_shapes(folder: Path) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Names and shapes of the tensors in a checkpoint for ``folder``'s config.json, and the names of those
    matrices that are stored as [..., in, out].

    transformers builds the model without memory (meta device) and turns its own parameter names back into the
    published layout with the table that it uses for saving.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, OSError) as error:
        raise HetcompError(f"transformers cannot build a model from {folder}/config.json: {error}") from error
    transposed = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if getattr(module, "is_transposed", False)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }
    state = dict(model.state_dict())
    if config.tie_word_embeddings:
        state = {name: tensor for name, tensor in state.items() if name not in (model._tied_weights_keys or {})}
    published = revert_weight_conversion(model, state)
    return {name: tuple(tensor.shape) for name, tensor in published.items()}, transposed


def _make(name: str, shape: tuple[int, ...], transposed: bool, seed: int, dtype: torch.dtype) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    leaf = name.rsplit(".", 1)[-1]
    # A bias (of a projection, or of DeepSeek's expert choice) is small against what it is added to.
    if leaf.endswith("bias"):
        scale = 0.02
    elif leaf == "sinks":
        scale = 1.0
    elif len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    elif "embed_tokens" in name:
        scale = 1.0
    else:
        scale = shape[-2 if transposed else -1] ** -0.5
    return torch.randn(shape, generator=generator, dtype=torch.float32).mul_(scale).to(dtype)


def _write_text_side(work: Path, config: Mapping[str, Any]) -> None:
    eos, bos = config.get("eos_token_id"), config.get("bos_token_id")
    generation = {"bos_token_id": bos, "eos_token_id": eos, "do_sample": False}
    (work / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
    if config["vocab_size"] >= MIN_VOCAB:
        first_eos = eos[0] if isinstance(eos, list) else eos
        write_tokenizer(work, config["vocab_size"], bos, first_eos, config["max_position_embeddings"])


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m hetcomp.models_zoo.synthesise", description=__doc__)
    parser.add_argument("model", help="a zoo name or a folder with a config.json")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--layers", type=int, default=None, help="keep only the first N layers")
    parser.add_argument("--max-shard-gb", type=float, default=4.0)
    options = parser.parse_args(argv)
    try:
        synthesise(
            options.model,
            options.out,
            seed=options.seed,
            dtype=options.dtype,
            layers=options.layers,
            max_shard_gb=options.max_shard_gb,
        )
    except HetcompError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{options.out}: {error.strerror or error}; nothing was left behind.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

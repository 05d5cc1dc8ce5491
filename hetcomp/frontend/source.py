"""Finds out what the user gave: a folder, a GGUF file, a transformers module or the name of a zoo config."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hetcomp import models_zoo
from hetcomp.errors import HetcompError
from hetcomp.frontend.gguf.config import model_config
from hetcomp.frontend.gguf.model_files import ModelFiles, open_model
from hetcomp.frontend.quantisation_config import QUANTISED, QuantisationConfig, parse_quantisation


@dataclass(frozen=True)
class ModelSource:
    """``raw`` is config.json as written (of a text part its own), or what the module's config or a GGUF file says.
    ``module`` holds the weights of a model given in memory, ``gguf`` has those of GGUF files; otherwise they are in
    ``folder``, if anywhere, quantised as ``quantisation`` says. ``whole``: architecture of the multi-modal model whose
    text part this is."""

    name: str
    config: PreTrainedConfig
    raw: dict[str, Any]
    model_class: type[PreTrainedModel]
    folder: Path | None
    module: PreTrainedModel | None
    quantisation: QuantisationConfig | None = None
    gguf: ModelFiles | None = None
    whole: str | None = None

    def refuse_quantised(self, purpose: str) -> None:
        """Raises HetcompError if the weights are quantised or in a GGUF file: ``purpose`` runs the model in
        transformers, in float32."""
        if self.gguf is not None:
            raise HetcompError(
                f"{self.gguf.path} is a GGUF file, but {purpose} runs the model in transformers; give the folder of "
                "the checkpoint that it was made from"
            )
        if self.quantisation is not None:
            raise HetcompError(
                f"{self.folder} is quantised ({self.quantisation.method}), but {purpose} runs the model in float32; "
                "give the checkpoint that it was made from"
            )


def resolve(model: str | Path | nn.Module) -> ModelSource:
    """What ``model`` stands for. Raises HetcompError if it is nothing that hetcomp can read."""
    if isinstance(model, nn.Module):
        return _from_module(model)
    folder = Path(model)
    if not folder.is_dir():
        if folder.is_file() and folder.suffix == ".onnx":
            raise HetcompError(
                f"{folder} is an ONNX file, but this runs the model in transformers; give the folder of the checkpoint "
                "that it was made from"
            )
        if folder.is_file() and folder.suffix == ".gguf":
            return _from_gguf(folder)
        if folder.is_file():
            raise HetcompError(
                f"{folder} is a file; give a .gguf or .onnx file, or the folder that holds config.json and the "
                "safetensors files"
            )
        folder = _from_zoo(str(model))
    graphs = sorted(folder.glob("*.onnx"))
    if graphs and not (folder / "config.json").is_file():
        raise HetcompError(f"{folder} has no config.json, but ONNX files; give one of them, as {graphs[0]}")
    return _from_folder(folder)


def _from_zoo(name: str) -> Path:
    # models_zoo/demo-moe also means the zoo's model where no such folder is in the working directory.
    reason = models_zoo.unsupported(name) if name in models_zoo.names() else None
    if reason is not None:
        raise HetcompError(f"{name} cannot be traced by this version: {reason}.")
    if name in models_zoo.names():
        return models_zoo.find(name)
    tail = Path(name).name
    if Path(name).parent.name in ("models_zoo", "configs") and tail in models_zoo.names():
        return models_zoo.find(tail)
    raise HetcompError(
        f"{name} is neither a folder, a .gguf or .onnx file nor a model of the zoo; the zoo has "
        f"{', '.join(models_zoo.names())}"
    )


def _from_module(module: nn.Module) -> ModelSource:
    if not isinstance(module, PreTrainedModel):
        raise HetcompError(
            f"{type(module).__name__} is not a transformers model (PreTrainedModel); hetcomp compiles causal "
            "language models of transformers"
        )
    if not type(module).__name__.endswith("ForCausalLM"):
        raise HetcompError(
            f"{type(module).__name__} is not a causal language model; give the ...ForCausalLM class, which "
            "has the head that makes logits"
        )
    config = module.config
    raw = config.to_dict()
    if raw.get("quantization_config"):
        raise HetcompError(f"{type(module).__name__} in memory is quantised; give the folder of its checkpoint instead")
    name = Path(str(getattr(config, "_name_or_path", "") or "")).name or str(config.model_type)
    return ModelSource(name, config, raw, type(module), None, module)


def _from_folder(folder: Path) -> ModelSource:
    path = folder / "config.json"
    raw = _read_json(path)
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    if not isinstance(model_type, str) or not model_type:
        raise HetcompError(f"{path} has no model_type, so the model's architecture is unknown")
    if not isinstance(architectures, list) or not architectures or not all(isinstance(a, str) for a in architectures):
        raise HetcompError(
            f'{path} has no architectures list, for example ["Qwen3MoeForCausalLM"], so the model\'s class is unknown'
        )
    if model_type not in CONFIG_MAPPING:
        raise HetcompError(
            f"{path}: model_type {model_type!r} is unknown to transformers {transformers.__version__}; "
            "models with their own code (trust_remote_code) are not run"
        )
    quantisation = parse_quantisation(raw, str(path))
    given = {k: v for k, v in raw.items() if k not in QUANTISED}
    name, whole = folder.resolve().name, None
    if isinstance(raw.get("text_config"), dict) and not any(a.endswith("ForCausalLM") for a in architectures):
        whole = architectures[0]
        model_class, config = _text_part(path, whole, _config(path, given, model_type), raw)
        raw = raw["text_config"]
    else:
        model_class, config = _model_class(path, architectures), _config(path, given, model_type)
    return ModelSource(name, config, raw, model_class, folder, None, quantisation, whole=whole)


def _text_part(
    path: Path, whole: str, config: PreTrainedConfig, raw: dict[str, Any]
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The causal language model in a model that also takes images, as transformers has it for the text's config."""
    text = getattr(config, "text_config", None)
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(getattr(text, "model_type", None)), "")
    found = getattr(transformers, str(name), None)
    if not (isinstance(text, PreTrainedConfig) and isinstance(found, type) and str(name).endswith("ForCausalLM")):
        raise HetcompError(
            f"{path}: architecture {whole} is not a causal language model (...ForCausalLM), and transformers "
            f"{transformers.__version__} has none for its text_config"
        )
    if "tie_word_embeddings" in raw:  # of the whole, which decides there
        text.tie_word_embeddings = bool(raw["tie_word_embeddings"])
    return found, text


def _from_gguf(path: Path) -> ModelSource:
    files = open_model(path)
    raw = model_config(files)
    config = _config(path, raw, raw["model_type"])
    return ModelSource(files.name, config, raw, _model_class(path, raw["architectures"]), None, None, gguf=files)


def _model_class(path: Path, architectures: list[str]) -> type[PreTrainedModel]:
    for architecture in architectures:
        found = getattr(transformers, architecture, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            if not architecture.endswith("ForCausalLM"):
                raise HetcompError(
                    f"{path}: architecture {architecture} is not a causal language model (...ForCausalLM)"
                )
            return found
    raise HetcompError(
        f"{path}: architecture {', '.join(architectures)} is unknown to transformers "
        f"{transformers.__version__}; models with their own code (trust_remote_code) are not run"
    )


def _config(path: Path, raw: dict[str, Any], model_type: str) -> PreTrainedConfig:
    try:
        made = CONFIG_MAPPING[model_type].from_dict(dict(raw))
    except Exception as error:
        text = " ".join(str(error).split())
        raise HetcompError(f"{path} is no valid {model_type} config: {type(error).__name__}: {text}") from error
    if not isinstance(made, PreTrainedConfig):
        raise HetcompError(f"{path} is no valid {model_type} config")
    return made


def _read_json(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise HetcompError(f"{path.parent} has no config.json, so it is not a Hugging Face model folder") from None
    except (OSError, UnicodeDecodeError) as error:
        raise HetcompError(f"cannot read {path}: {error}") from error
    try:
        made = json.loads(text)
    except json.JSONDecodeError as error:
        raise HetcompError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(made, dict):
        raise HetcompError(f"{path} holds no JSON object")
    return made

"""What ``quantization_config`` of a config.json says: which quantiser wrote the weights, and how it stores them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hetcomp.errors import HetcompError

READ = (
    "fp8, mxfp4, compressed-tensors (pack-quantized, int-quantized, float-quantized, mxfp4-pack-quantized), gptq, awq"
)
QUANTISED = ("quantization_config", "compression_config")  # where a config.json says it
# Formats of compressed-tensors, and the types and bits of weights that each stores.
_FORMATS = {
    "pack-quantized": (("int", 4), ("int", 8)),
    "int-quantized": (("int", 8),),
    "float-quantized": (("float", 8),),
    "naive-quantized": (("int", 8), ("float", 8)),
    "mxfp4-pack-quantized": (("float", 4),),
}


@dataclass(frozen=True)
class Stored:
    """How the weights of some modules are stored. ``kind``: fp8, mxfp4, gptq, awq, or a format of compressed-tensors.
    ``bits`` of a code; ``group``: columns that share a scale (0: all of a row; with ``block``: rows and columns; both 0
    and ``block`` (0, 0): all of the tensor)."""

    kind: str
    bits: int = 8
    group: int = 0
    block: tuple[int, int] | None = None
    symmetric: bool = True
    act_order: bool = False
    zeros_less_one: bool = False  # gptq's first checkpoint format stores zero points less one


@dataclass(frozen=True)
class QuantisationConfig:
    """``targets``: what is stored how: a module's name, ``re:`` and a pattern, or a class (which stands for all
    modules). ``excluded`` are names and patterns of modules that stay float."""

    method: str
    targets: tuple[tuple[str, Stored], ...]
    excluded: tuple[str, ...] = ()

    def stored(self, module: str) -> Stored | None:
        """How the weight of ``module`` is stored if it is quantised; what names it goes before classes."""
        named = [s for target, s in self.targets if _names(target, module)]
        classes = [s for target, s in self.targets if re.fullmatch(r"[A-Z]\w*", target)]
        return next(iter((*named, *classes)), None)

    def excludes(self, module: str) -> bool:
        """Whether the config names ``module``, whole or by its last parts, as one that stays float."""
        return any(_names(pattern, module) for pattern in self.excluded)


def _names(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return module == pattern or module.endswith(f".{pattern}")


def parse_quantisation(raw: Mapping[str, Any], where: str) -> QuantisationConfig | None:
    """The config's; None if it says nothing of the kind. Raises HetcompError for what is not read, naming it."""
    found = next((raw[key] for key in QUANTISED if raw.get(key)), None)
    if not found:
        return None
    if not isinstance(found, dict):
        raise HetcompError(f"{where}: quantization_config is no object")
    method = found.get("quant_method") or ("compressed-tensors" if "config_groups" in found else None)
    reader = _READERS.get(str(method))
    if reader is None:
        name = method or "an unnamed method"
        raise HetcompError(f"{where}: checkpoints quantised with {name} are not read; {READ} are")
    try:
        return reader(found, where)
    except re.error as error:
        raise HetcompError(f"{where}: quantization_config has a damaged pattern: {error}") from error


def _whole(config: Mapping[str, Any], name: str, where: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise HetcompError(f"{where}: quantization_config has no usable {name} (found {value!r})")
    return value


def _excluded(config: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    listed = config.get(name) or []
    if not isinstance(listed, list) or not all(isinstance(entry, str) for entry in listed):
        raise HetcompError(f"{where}: {name} of quantization_config is no list of names")
    for entry in listed:
        if entry.startswith("re:"):
            re.compile(entry[3:])
    return tuple(listed)


def _block(value: object, where: str) -> tuple[int, int]:
    if isinstance(value, str) and re.fullmatch(r"\d+x\d+", value):  # compressed-tensors has both spellings
        value = [int(number) for number in value.split("x")]
    if not (isinstance(value, list) and len(value) == 2 and all(isinstance(v, int) and v > 0 for v in value)):
        raise HetcompError(f"{where}: quantization_config has blocks of {value!r}; two positive numbers are expected")
    return value[0], value[1]


def _fp8(config: Mapping[str, Any], where: str) -> QuantisationConfig:
    if config.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise HetcompError(f"{where}: FP8 numbers in {config['fmt']} are not read; e4m3 is")
    size = config.get("weight_block_size")
    block = (0, 0) if size is None else _block(size, where)
    excluded = _excluded(config, "modules_to_not_convert", where)
    return QuantisationConfig("fp8", (("Linear", Stored("fp8", block=block)),), excluded)


def _mxfp4(config: Mapping[str, Any], where: str) -> QuantisationConfig:
    excluded = _excluded(config, "modules_to_not_convert", where)
    return QuantisationConfig("mxfp4", (("Linear", Stored("mxfp4", 4, 32)),), excluded)


def _gptq(config: Mapping[str, Any], where: str) -> QuantisationConfig:
    bits, group = _whole(config, "bits", where), _whole(config, "group_size", where)
    form = config.get("checkpoint_format") or "gptq"
    if bits not in (4, 8):
        raise HetcompError(f"{where}: GPTQ with {bits} bits is not read; 4 and 8 are")
    if form not in ("gptq", "gptq_v2"):
        raise HetcompError(f"{where}: GPTQ checkpoints in the format {form} are not read; gptq and gptq_v2 are")
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(key.startswith("-:") for key in dynamic):
        raise HetcompError(f"{where}: GPTQ with settings of their own for some modules (dynamic) is not read")
    stored = Stored(
        "gptq",
        bits,
        max(group, 0),
        symmetric=bool(config.get("sym", True)),
        act_order=bool(config.get("desc_act", False)),
        zeros_less_one=form == "gptq",
    )
    # GPTQModel leaves out what a pattern behind a minus matches.
    left_out = tuple(f"re:{re.compile(key[2:]).pattern}" for key in dynamic)
    excluded = _excluded(config, "modules_to_not_convert", where)
    return QuantisationConfig("gptq", (("Linear", stored),), (*excluded, *left_out))


def _awq(config: Mapping[str, Any], where: str) -> QuantisationConfig:
    bits = _whole(config, "bits" if "bits" in config else "w_bit", where)
    group = _whole(config, "group_size" if "group_size" in config else "q_group_size", where)
    version = str(config.get("version", "gemm")).lower()
    if bits != 4:
        raise HetcompError(f"{where}: AWQ with {bits} bits is not read; 4 are")
    if version != "gemm":
        raise HetcompError(f"{where}: AWQ checkpoints in the layout {version} are not read; gemm is")
    stored = Stored("awq", bits, max(group, 0), symmetric=False)
    return QuantisationConfig("awq", (("Linear", stored),), _excluded(config, "modules_to_not_convert", where))


def _compressed(config: Mapping[str, Any], where: str) -> QuantisationConfig:
    if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise HetcompError(f"{where}: sparse compressed-tensors ({config['sparsity_config']['format']}) are not read")
    if (config.get("transform_config") or {}).get("config_groups"):
        raise HetcompError(f"{where}: compressed-tensors with transforms of activations are not read")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise HetcompError(f"{where}: quantization_config of compressed-tensors has no config_groups")
    targets: list[tuple[str, Stored]] = []
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or not isinstance(group.get("targets"), list):
            raise HetcompError(f"{where}: {name} of config_groups has no weights or no targets")
        stored = _compressed_weights(weights, str(group.get("format") or config.get("format")), f"{where}: {name}")
        targets += [(str(target), stored) for target in group["targets"]]
    return QuantisationConfig("compressed-tensors", tuple(targets), _excluded(config, "ignore", where))


def _compressed_weights(weights: Mapping[str, Any], form: str, where: str) -> Stored:
    if form not in _FORMATS:
        raise HetcompError(f"{where}: compressed-tensors in the format {form} are not read; {', '.join(_FORMATS)} are")
    bits, kind = _whole(weights, "num_bits", where), str(weights.get("type", "int"))
    if (kind, bits) not in _FORMATS[form]:
        raise HetcompError(f"{where}: {form} weights of {bits} bits ({kind}) are not read")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    block, group = None, 0
    if strategy == "group":
        group = _whole(weights, "group_size", where)
    elif strategy == "block":
        block = _block(weights.get("block_structure"), where)
    elif strategy == "tensor":
        block = (0, 0)
    elif strategy != "channel":
        raise HetcompError(f"{where}: scales of weights by {strategy} are not read; tensor, channel, group, block are")
    if form == "naive-quantized":
        form = "int-quantized" if kind == "int" else "float-quantized"
    order = weights.get("actorder") in ("group", "dynamic", True)  # others leave groups runs of columns
    return Stored(form, bits, max(group, 0), block, bool(weights.get("symmetric", True)), order)


_READERS = {"fp8": _fp8, "mxfp4": _mxfp4, "gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed}

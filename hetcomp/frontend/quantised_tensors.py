"""Finds the quantised tensors of a checkpoint by its config and headers: what is stored for each, checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from hetcomp.errors import HetcompError
from hetcomp.frontend.quantisation_config import QuantisationConfig, Stored
from hetcomp.ir.plan import CheckpointTensor, Quantised

_Tensors = Mapping[str, CheckpointTensor]
_FLOATS = ("F32", "F16", "BF16")
_SCALE_BITS = {"F32": 32, "F16": 16, "BF16": 16, "F8_E8M0": 8, "U8": 8}
GROUP = 32  # columns that share a scale in q4 and q8
# What belongs to a weight, by what it is for: tried in turn behind the name without the suffix of the codes.
_OF_CODES = {
    "fp8": ("weight", {"scales": "weight_scale_inv"}),
    "mxfp4": ("_blocks", {"scales": "_scales"}),
    "gptq": ("qweight", {"scales": "scales", "zeros": "qzeros", "groups": "g_idx"}),
    "awq": ("qweight", {"scales": "scales", "zeros": "qzeros"}),
    "pack-quantized": (
        "weight_packed",
        {
            "scales": "weight_scale",
            "zeros": "weight_zero_point",
            "groups": "weight_g_idx",
            "shape": "weight_shape",
        },
    ),
    "int-quantized": ("weight", {"scales": "weight_scale", "zeros": "weight_zero_point"}),
    "float-quantized": ("weight", {"scales": "weight_scale"}),
    "mxfp4-pack-quantized": ("weight_packed", {"scales": "weight_scale"}),
}
# Scales of activations: hetcomp quantises these in its own way, or not at all.
_OF_ACTIVATIONS = (".input_scale", ".activation_scale", ".input_zero_point", ".input_global_scale")


def quantised_tensors(tensors: _Tensors, config: QuantisationConfig, origin: str) -> dict[str, CheckpointTensor]:
    """``tensors`` with one entry for every quantised weight, under the name and with the shape of its numbers, in place
    of what is stored for it. Raises HetcompError, naming the tensor, for what contradicts the config."""
    out: dict[str, CheckpointTensor] = {}
    used: set[str] = set()
    for name, tensor in tensors.items():
        found = _quantised(name, tensor, tensors, config, origin)
        if found is not None:
            assert found.quantised is not None
            out[found.name] = found
            used.update(part.name for _, part in found.quantised.parts)
    if not out:
        raise HetcompError(f"{origin}: config.json says that it is quantised ({config.method}), but no tensor is")
    for name, tensor in tensors.items():
        if name in used or name.endswith(_OF_ACTIVATIONS):
            continue
        if name in out:
            raise HetcompError(f"{origin}: both {name} and quantised tensors of that name are there")
        out[name] = tensor
    return out


def _quantised(
    name: str, tensor: CheckpointTensor, tensors: _Tensors, config: QuantisationConfig, origin: str
) -> CheckpointTensor | None:
    for kind in dict.fromkeys(stored.kind for _, stored in config.targets):
        suffix, others = _OF_CODES[kind]
        if not name.endswith(suffix) or (tensor.dtype in (*_FLOATS, "F64")):
            continue
        prefix = name.removesuffix(suffix)
        weight = prefix if suffix.startswith("_") else f"{prefix}weight"
        module = weight.removesuffix(".weight")
        stored = config.stored(module)
        if stored is None or stored.kind != kind:
            continue
        if config.excludes(module):
            raise HetcompError(f"{origin}: quantization_config leaves {module} as it is, but {name} is {tensor.dtype}")
        parts = {"codes": tensor} | {p: tensors[prefix + s] for p, s in others.items() if prefix + s in tensors}
        if "scales" not in parts:
            raise HetcompError(f"{origin}: tensor {name} in {tensor.file} has no scales ({prefix}{others['scales']})")
        return _CHECKS[kind](_Found(weight, stored, parts, origin))
    if tensor.dtype == "F8_E4M3" and f"{name}_scale_inv" in tensors:
        return _fused_fp8(name, tensor, tensors, config, origin)
    return None


def _fused_fp8(
    name: str, tensor: CheckpointTensor, tensors: _Tensors, config: QuantisationConfig, origin: str
) -> CheckpointTensor | None:
    """Experts in one tensor, as transformers saves them: ``gate_up_proj`` beside ``gate_up_proj_scale_inv``."""
    stored = config.stored(name)
    if stored is None or stored.kind != "fp8":
        return None
    return _fp8(_Found(name, stored, {"codes": tensor, "scales": tensors[f"{name}_scale_inv"]}, origin))


def has_whole_groups(stored: Stored, columns: int) -> bool:
    """Whether groups of whole numbers have so many columns that q4 and q8 can repeat their scales over them."""
    groups = columns // stored.group if stored.group else 1
    return groups == 1 or not stored.group % GROUP


class _Found:
    """What is stored for one weight."""

    def __init__(self, name: str, stored: Stored, parts: Mapping[str, CheckpointTensor], origin: str) -> None:
        self.name, self.stored, self.parts, self.origin = name, stored, parts, origin
        self.codes, self.scales = parts["codes"], parts["scales"]

    def expect(self, part: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> None:
        """Raises HetcompError if the part is missing or has another type or none of the shapes."""
        tensor = self.parts.get(part)
        if tensor is None:
            raise HetcompError(f"{self.origin}: tensor {self.codes.name} in {self.codes.file} has no {part}")
        if tensor.dtype not in dtypes:
            raise HetcompError(
                f"{self.origin}: tensor {tensor.name} in {tensor.file} has dtype {tensor.dtype}; expected "
                f"{' or '.join(dtypes)} by quantization_config"
            )
        if shapes and tensor.shape not in shapes:
            raise HetcompError(
                f"{self.origin}: tensor {tensor.name} in {tensor.file} has shape {list(tensor.shape)}; expected "
                f"{' or '.join(str(list(shape)) for shape in shapes)} by quantization_config"
            )

    def rank(self, *ranks: int) -> None:
        """Raises HetcompError if the codes have another number of axes, or none of some axis."""
        if len(self.codes.shape) not in ranks or not math.prod(self.codes.shape):
            raise HetcompError(
                f"{self.origin}: tensor {self.codes.name} in {self.codes.file} has shape {list(self.codes.shape)}, "
                "which is no quantised matrix"
            )

    def groups(self, columns: int) -> int:
        """Number of groups of columns. Raises HetcompError if they do not come out even."""
        group = self.stored.group or columns
        if columns % group:
            raise HetcompError(
                f"{self.origin}: tensor {self.codes.name} has {columns} columns, which groups of {group} do not divide"
            )
        return columns // group

    def made(
        self,
        shape: tuple[int, ...],
        label: str,
        form: str,
        block: tuple[int, int],
        inexact: str,
        zero_bits: int = 0,
        act_order: bool = False,
    ) -> CheckpointTensor:
        """The weight. ``block``: rows and columns of a scale. ``act_order``: its groups may be scattered."""
        per_scale = _SCALE_BITS[self.scales.dtype] + zero_bits
        quantised = Quantised(
            self.stored.kind,
            label,
            block,
            tuple(self.parts.items()),
            form,
            inexact,
            self.stored.bits + per_scale / (block[0] * block[1]),
            act_order,
        )
        return replace(self.codes, name=self.name, shape=shape, quantised=quantised)


def _fp8(found: _Found) -> CheckpointTensor:
    found.rank(2, 3)
    found.expect("codes", ("F8_E4M3",))
    *experts, rows, columns = found.codes.shape
    block = found.stored.block
    if block is None:  # compressed-tensors: a scale a row, or a group of columns of one
        block = (1, found.stored.group or columns)
        label = f"a scale a row and {block[1]} columns" if found.stored.group else "a scale a row"
    elif block == (0, 0):
        block, label = (rows, columns), "a scale a tensor"
    else:
        label = f"blocks of {block[0]} x {block[1]}"
    grid = (*experts, -(-rows // block[0]), -(-columns // block[1]))
    shapes = [grid]
    if block == (rows, columns):
        shapes += [tuple(experts), (*experts, 1)]
    found.expect("scales", ("F32", "F16", "BF16", "F8_E8M0"), *shapes)
    return found.made(found.codes.shape, f"FP8, {label}", "fp8", block, "")


def _mxfp4(found: _Found) -> CheckpointTensor:
    found.rank(4)
    *rows, groups, half = found.codes.shape
    found.expect("codes", ("U8",), (*rows, groups, 16))
    found.expect("scales", ("U8", "F8_E8M0"), (*rows, groups))
    return found.made((*rows, groups * 2 * half), "MXFP4", "mxfp4", (1, 32), "")


def _mxfp4_packed(found: _Found) -> CheckpointTensor:
    found.rank(2)
    found.expect("codes", ("U8",))
    rows, columns = found.codes.shape[0], 2 * found.codes.shape[1]
    found.expect("scales", ("U8", "F8_E8M0"), (rows, -(-columns // 32)))
    return found.made((rows, columns), "MXFP4", "mxfp4", (1, 32), "")


def _gptq(found: _Found) -> CheckpointTensor:
    found.rank(2)
    found.expect("codes", ("I32",))
    each = 32 // found.stored.bits
    rows, columns = found.codes.shape[1], found.codes.shape[0] * each
    groups = found.groups(columns)
    found.expect("scales", _FLOATS, (groups, rows))
    found.expect("zeros", ("I32",), (groups, -(-rows // each)))
    if "groups" in found.parts or found.stored.act_order:
        found.expect("groups", ("I32",), (columns,))
    return _whole_numbers(found, "GPTQ", rows, columns, groups)


def _awq(found: _Found) -> CheckpointTensor:
    found.rank(2)
    found.expect("codes", ("I32",))
    rows, columns = found.codes.shape[1] * 8, found.codes.shape[0]
    groups = found.groups(columns)
    found.expect("scales", _FLOATS, (groups, rows))
    found.expect("zeros", ("I32",), (groups, rows // 8))
    return _whole_numbers(found, "AWQ", rows, columns, groups)


def _packed(found: _Found) -> CheckpointTensor:
    found.rank(2)
    found.expect("codes", ("I32",))
    found.expect("shape", ("I64", "I32"), (2,))
    each = 32 // found.stored.bits
    rows, columns = found.codes.shape[0], found.codes.shape[1] * each
    groups = found.groups(columns)
    found.expect("scales", _FLOATS, *_per_row(found, rows, groups))
    if not found.stored.symmetric:
        found.expect("zeros", ("I32",), (-(-rows // each), groups))
    if "groups" in found.parts or found.stored.act_order:
        found.expect("groups", ("I32", "I64"), (columns,))
    return _whole_numbers(found, "compressed-tensors", rows, columns, groups)


def _int8(found: _Found) -> CheckpointTensor:
    found.rank(2)
    found.expect("codes", ("I8",))
    rows, columns = found.codes.shape
    groups = found.groups(columns)
    shapes = _per_row(found, rows, groups)
    found.expect("scales", _FLOATS, *shapes)
    if not found.stored.symmetric:
        found.expect("zeros", ("I8",), *shapes)
    return _whole_numbers(found, "compressed-tensors", rows, columns, groups)


def _per_row(found: _Found, rows: int, groups: int) -> list[tuple[int, ...]]:
    if found.stored.block is None:
        return [(rows, groups)] if found.stored.group else [(rows, 1), (rows,)]
    if found.stored.block != (0, 0):
        raise HetcompError(f"{found.origin}: blocks of whole numbers ({found.codes.name}) are not read")
    return [(1,), (), (1, 1)]


def _whole_numbers(found: _Found, method: str, rows: int, columns: int, groups: int) -> CheckpointTensor:
    """Scales times whole numbers, less zero points: q4 holds 4 bits about 8, q4z less any zero point. Whether columns
    are in the order of activations, where the config says so, is for act_order.settled to find out."""
    stored, group, act_order = found.stored, columns // groups, False
    parts = [f"{method} int{stored.bits}"]
    parts.append(f"groups of {group}" if stored.group else "a scale a tensor" if stored.block else "a scale a row")
    if not stored.symmetric:
        parts.append("zero points")
    if not has_whole_groups(stored, columns):
        form, inexact = "q8", f"its groups are no runs of {GROUP} columns"
    elif not stored.symmetric and stored.bits == 8:
        form, inexact = "q8", "8 bits less a zero point need 9"
    else:
        form = "q8" if stored.bits == 8 else "q4" if stored.symmetric else "q4z"
        inexact = "its scales are f32, those of the format fp16" if found.scales.dtype == "F32" else ""
        act_order = stored.act_order and groups > 1
    block = (rows, columns) if stored.block else (1, group)
    zero_bits = 0 if stored.symmetric and stored.kind not in ("gptq", "awq") else stored.bits
    return found.made((rows, columns), ", ".join(parts), form, block, inexact, zero_bits, act_order)


_CHECKS: Mapping[str, Callable[[_Found], CheckpointTensor]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "gptq": _gptq,
    "awq": _awq,
    "pack-quantized": _packed,
    "int-quantized": _int8,
    "float-quantized": _fp8,
    "mxfp4-pack-quantized": _mxfp4_packed,
}

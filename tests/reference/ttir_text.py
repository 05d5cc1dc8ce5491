"""Triton's own IR as text, taken apart: operations with their operands, attributes, types and regions.

Triton's bindings build this IR and cannot be asked for what is in it, so the text is read: one line an operation, or
several where regions are nested in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_VALUE = re.compile(r"%[\w-]+(?:#\d+)?")
_RESULTS = re.compile(r"((?:%[\w-]+(?::\d+)?(?:, )?)+) = (.*)")
_NAME = re.compile(r'"?([a-z_]\w*(?:\.\w+)+)"?(.*)', re.S)
_BLOCK = re.compile(r"(\^\w+)(?:\((.*)\))?:")
_TENSOR = re.compile(r"tensor<((?:\d+x)*)(.*)>$")
_BITS = {"i1": 1, "i8": 8, "i16": 16, "i32": 32, "i64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64}
_BITS |= {"f8E4M3FN": 8, "f8E5M2": 8}


@dataclass(frozen=True)
class Type:
    """``shape``: () of a scalar. ``element``: MLIR's name, of pointers that of what they point to."""

    shape: tuple[int, ...]
    element: str
    pointer: bool

    @property
    def bytes(self) -> int:
        """Of a number in memory; of pointers, what they point to."""
        return max(_BITS[self.element] // 8, 1)


@dataclass
class Block:
    """Operations one after the other; ``arguments``: the values that whoever runs it gives."""

    arguments: list[str] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)


@dataclass
class Operation:
    """``attributes``: the text between name and types, ``types``: in the order of the text. A region is a list of
    blocks by label; the first is where it begins."""

    name: str
    results: list[str]
    operands: list[str]
    attributes: str
    types: list[Type]
    regions: list[dict[str, Block]] = field(default_factory=list)

    def number(self, attribute: str) -> int:
        """A whole number among the attributes."""
        found = re.search(rf"\b{attribute} = (-?\d+)", self.attributes)
        if found is None:
            raise ValueError(f"{self.name} has no {attribute}: {self.attributes}")
        return int(found.group(1))


@dataclass
class Function:
    """``arguments``: values with their types."""

    arguments: dict[str, Type]
    blocks: dict[str, Block]


def read_type(text: str) -> Type:
    """Of ``tensor<16x!tt.ptr<f32>>``, ``i32`` and the like. Raises ValueError for others."""
    tensor = _TENSOR.fullmatch(text)
    shape = tuple(int(n) for n in tensor.group(1).split("x")[:-1]) if tensor else ()
    element = tensor.group(2) if tensor else text
    pointer = re.fullmatch(r"!tt\.ptr<(\w+)>", element)
    name = pointer.group(1) if pointer else element
    if name not in _BITS:
        raise ValueError(f"a type that the interpreter does not know: {text}")
    return Type(shape, name, pointer is not None)


def read_function(text: str) -> Function:
    """The only function of a module, all calls inlined. Raises ValueError for what is not understood."""
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("#", "//"))]
    (start,) = [i for i, line in enumerate(lines) if line.startswith("tt.func")]
    signature = re.search(r"\((.*?)\)(?: attributes| \{| ->)", lines[start])
    assert signature is not None, lines[start]
    arguments = dict(_typed(re.sub(r" \{[^{}]*\}", "", signature.group(1))))
    blocks, _ = _region(lines, start + 1)
    return Function(arguments, blocks)


def _typed(text: str) -> list[tuple[str, Type]]:
    """Of ``%a: i32, %b: tensor<2xi32>``."""
    pairs = (part.split(": ", 1) for part in text.split(", ") if part)
    return [(name, read_type(kind)) for name, kind in pairs]


def _region(lines: list[str], at: int) -> tuple[dict[str, Block], int]:
    """The blocks from line ``at`` to the brace that ends them, whose line comes back too."""
    blocks = {"": Block()}
    block = blocks[""]
    while not lines[at].startswith("}"):
        label = _BLOCK.match(lines[at])
        if label is None:
            operation, at = _operation(lines, at)
            block.operations.append(operation)
            continue
        block = Block([name for name, _ in _typed(label.group(2) or "")])
        if blocks[""].operations:
            blocks[label.group(1)] = block
        else:  # the first block, with its arguments named
            blocks[""] = block
        at += 1
    return blocks, at


def _operation(lines: list[str], at: int) -> tuple[Operation, int]:
    """The operation whose text starts in a line, and the line behind it."""
    line = lines[at]
    results: list[str] = []
    if found := _RESULTS.fullmatch(line):
        line = found.group(2)
        for name, _, count in (part.partition(":") for part in found.group(1).split(", ")):
            results += [f"{name}#{i}" for i in range(int(count))] if count else [name]
    named = _NAME.fullmatch(line)
    if named is None:
        raise ValueError(f"not an operation: {lines[at]}")
    name, rest = named.groups()
    regions, at = [], at + 1
    if rest.endswith("{"):
        while True:
            region, at = _region(lines, at)
            regions.append(region)
            at += 1
            if not lines[at - 1].endswith("{"):  # neither "} else {" nor "} do {"
                break
        rest = rest.removesuffix("({").removesuffix("{") + lines[at - 1].lstrip("})")
    head, _, kinds = rest.rpartition(" : ")
    if not head or ("}" in kinds and "{" not in kinds):  # no colon, or an attribute's
        head, kinds = rest, ""
    return Operation(name, results, _VALUE.findall(head), head, _types(kinds), regions), at


def _types(text: str) -> list[Type]:
    names = re.findall(r"!?[\w.]+(?:<(?:[^<>]|<[^<>]*>)*>)?", text.replace("->", " ").replace(" to ", " "))
    return [read_type(name) for name in names]

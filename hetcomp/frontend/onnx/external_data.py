"""Where the bytes of a tensor lie, if not in the .onnx file itself: in a file of the same folder, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import onnx

from hetcomp.errors import HetcompError


def locate(tensor: onnx.TensorProto, model: Path, needed: int) -> tuple[str, int]:
    """The file, relative to the model's folder, and the offset of ``needed`` bytes. Raises HetcompError naming the
    tensor if they are not there, or are outside of the folder."""
    facts = {entry.key: entry.value for entry in tensor.external_data}
    name = facts.get("location", "")
    what = f"{model}: the external data of tensor {tensor.name}"
    if not name:
        raise HetcompError(f"{what} has no location")
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise HetcompError(f"{what} lies at {name}; expected a file in the model's folder")
    folder = model.parent.resolve()
    file = folder / path
    if not file.is_file():
        raise HetcompError(f"{what} is missing: there is no file {name} beside the model")
    if not file.resolve().is_relative_to(folder):
        raise HetcompError(f"{what} lies at {name}, a link to outside of the model's folder")
    offset, length = _number(facts, "offset", what, 0), _number(facts, "length", what, needed)
    if length != needed:
        raise HetcompError(f"{what} has {length} bytes; expected {needed} by its type and shape")
    size = file.stat().st_size
    if offset + length > size:
        raise HetcompError(f"{what} ends at byte {offset + length} of {name}, which has {size}; download it again")
    return name, offset


def _number(facts: dict[str, str], key: str, what: str, default: int) -> int:
    text = facts.get(key, str(default))
    if not (text.isascii() and text.isdigit()):
        raise HetcompError(f"{what} has the {key} {text!r}; expected a whole number")
    return int(text)

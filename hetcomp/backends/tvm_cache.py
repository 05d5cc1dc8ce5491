"""Row-wise kernels that TVM compiled before, kept beside the compiled objects: importing TVM and compiling what every
model has takes some seconds."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from importlib import resources
from pathlib import Path

from hetcomp.backends.native_compiler import cache_folder
from hetcomp.backends.protocol import Kernel


def cached_kernel(name: str, make: Callable[[], Kernel]) -> Kernel:
    """The kernel of this name, from the cache or made. ``name`` is unique for what is asked for and for TVM's version;
    the key has the text of everything here that TVM's code and the C++ around it are made from as well."""
    path = cache_folder() / f"{hashlib.sha256(f'{name} {_own_sources()}'.encode()).hexdigest()}.tvm.json"
    try:
        return _read(path)
    except (OSError, ValueError, KeyError, TypeError, binascii.Error):  # not there yet, or not ours
        kernel = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(f".{os.getpid()}.tmp")
    objects = [(stem, base64.b64encode(data).decode()) for stem, data in kernel.objects]
    staged.write_text(json.dumps({**asdict(kernel), "objects": objects}))
    staged.replace(path)
    return kernel


def _read(path: Path) -> Kernel:
    fields = json.loads(path.read_text())
    objects = tuple((stem, base64.b64decode(data, validate=True)) for stem, data in fields.pop("objects"))
    return Kernel(**fields, objects=objects)


@cache
def _own_sources() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("tvm*.py")):
        digest.update(file.read_bytes())
    for template in ("rowwise", "support"):
        digest.update(resources.files("hetcomp.codegen_templates").joinpath("tvm", f"{template}.cpp.j2").read_bytes())
    return digest.hexdigest()

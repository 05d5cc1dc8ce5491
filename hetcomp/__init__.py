"""hetcomp compiles Mixture-of-Experts language models for one workstation.

>>> import hetcomp
>>> exe = hetcomp.compile("models_zoo/demo-moe")
>>> print("".join(token.text for token in exe.generate("Once upon a time", max_new_tokens=32)))
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hetcomp.compiler import compile
    from hetcomp.errors import HetcompError
    from hetcomp.executable import Executable, load
    from hetcomp.hardware.profile import HardwareProfile

__all__ = ["Executable", "HardwareProfile", "HetcompError", "compile", "load"]
__version__ = version("hetcomp")

_HOME = {
    "compile": "hetcomp.compiler",
    "load": "hetcomp.executable",
    "Executable": "hetcomp.executable",
    "HardwareProfile": "hetcomp.hardware.profile",
    "HetcompError": "hetcomp.errors",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - PEP 562; torch is imported only when compile is asked for
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'hetcomp' has no attribute '{name}'")

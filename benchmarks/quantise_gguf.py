"""Quantises a GGUF file with llama.cpp: SOURCE TARGET TYPE (Q4_0, Q4_K_M, Q8_0, ..). Runs in the peers' environment."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import llama_cpp


def main() -> None:
    """Command line; the target appears when it is whole."""
    source, target, kind = sys.argv[1:]
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    partial = f"{target}.partial"
    if llama_cpp.llama_model_quantize(source.encode(), partial.encode(), ctypes.byref(options)) != 0:
        raise SystemExit(f"llama.cpp cannot quantise {source} to {kind}")
    Path(partial).rename(target)


if __name__ == "__main__":
    main()

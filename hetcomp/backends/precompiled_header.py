"""Headers that g++ has read before: they take it half of the time of a kernel (0.6 of 1.3 s for a small linear layer)
and most of that of one whose arithmetic is TVM's (0.7 of 0.8 s).

A source that includes the intrinsics is compiled behind a header of the lines with which it includes the system's
headers and the contract's; any other that includes the kernels' contract, behind a header of that line. Their
precompiled forms lie in the cache (60 and 35 MB for each instruction set), by compiler, flags, lines and the text of
the contract, of which g++ itself does not ask whether it has changed. Lines that are included twice mean nothing, so
objects are the same with and without. For g++ alone, which is what is looked for first: clang++ has options of its own
for it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from hetcomp.hardware.compilers import CxxCompiler

_INTRINSICS = "#include <immintrin.h>\n"
_CONTRACT = '#include "hetcomp/'
_KERNEL = f'{_CONTRACT}kernel.h"\n'


def precompiled_header(
    compiler: CxxCompiler, flags: Sequence[str], text: str, contract: str, cache: Path
) -> tuple[str, ...]:
    """Options that compile the C++ source ``text`` sooner, with ``flags`` as they are used for it, the folder of the
    contract among them; none where nothing is gained or the header cannot be made (then the source's own compilation
    says why). ``contract``: a digest of the contract's headers. Makes the header in ``cache`` if it is not there."""
    includes = _read_before(text)
    if compiler.kind != "g++" or not includes:
        return ()
    key = hashlib.sha256("\0".join((compiler.identity, *flags, contract, includes)).encode()).hexdigest()
    header = cache / f"{key[:32]}.h"
    precompiled = header.with_name(f"{header.name}.gch")
    if precompiled.exists() or _made(compiler, flags, includes, header, precompiled):
        return ("-include", str(header))
    return ()


def _read_before(text: str) -> str:
    """The lines of a source that are worth a header; the fewer kinds there are, the fewer headers."""
    lines = text.splitlines(keepends=True)
    if _INTRINSICS in lines:
        return "".join(line for line in lines if line.startswith(("#include <", _CONTRACT)))
    return _KERNEL if _KERNEL in lines else ""


def _made(compiler: CxxCompiler, flags: Sequence[str], includes: str, header: Path, precompiled: Path) -> bool:
    staged = precompiled.with_name(f"{precompiled.name}.{os.getpid()}.tmp")
    command = [str(compiler.path), *flags, "-x", "c++-header", str(header), "-o", str(staged)]
    try:
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(includes)
        if subprocess.run(command, capture_output=True).returncode != 0:
            staged.unlink(missing_ok=True)
            return False
        staged.replace(precompiled)
    except OSError:
        return False
    return True

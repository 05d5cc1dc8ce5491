"""A process that compiles Triton kernels: one JSON job a line in, one JSON answer a line out.

Triton holds Python's lock through most of a compile, so that threads would take turns; and it must not be imported in
interpreter mode here, whatever the parent does. Run by hetcomp.backends.gpu.compile_kernels.
"""

from __future__ import annotations

import base64
import json
import sys
from importlib import import_module
from typing import Any

# Every pointer is a multiple of 16 bytes (hetcomp.backends.gpu.kernels.Operand): whole vectors can be loaded.
_ALIGNED = [["tt.divisibility", 16]]


def compile_job(job: dict[str, Any]) -> dict[str, Any]:
    """Cubin (base64) and launch facts of a job: module, function, arguments [[name, type]], constants, cc, warps."""
    triton, compiler, backends = (import_module(m) for m in ("triton", "triton.compiler", "triton.backends.compiler"))
    function = getattr(import_module(f"hetcomp.codegen_templates.gpu.{job['module']}"), job["function"])
    given, constants = dict(job["arguments"]), job["constants"]
    signature = {name: given.get(name, "constexpr") for name in function.arg_names}
    aligned = {(i,): _ALIGNED for i, name in enumerate(function.arg_names) if given.get(name, "").startswith("*")}
    source = compiler.ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    target = backends.GPUTarget("cuda", job["cc"], 32)
    options = {"num_warps": job["warps"], "enable_fp_fusion": True}
    made = triton.compile(source, target=target, options=options)
    facts = made.metadata
    if facts.profile_scratch_size:
        raise RuntimeError("the kernel wants profile scratch memory")
    return {
        "entry": facts.name,
        "num_warps": facts.num_warps,
        "shared_bytes": facts.shared,
        "global_scratch_bytes": facts.global_scratch_size,
        "cubin": base64.b64encode(made.asm["cubin"]).decode(),
    }


def main() -> None:
    """Answers jobs until the input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever is printed on the way is no answer
    for line in sys.stdin:
        try:
            answer = compile_job(json.loads(line))
        except Exception as error:  # any failure of the compiler is an answer, not the worker's end
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

"""Flags in the host's memory, by which kernels and the CPU's threads hand over (runtime_lib/src/gpu/hand_shake.h)."""

import triton
import triton.language as tl


@triton.jit
def is_raised(flag):
    """1 when ``flag`` i32[1] is raised, with all that was written before that; else 0."""
    return tl.inline_asm_elementwise(
        "ld.acquire.sys.global.u32 $0, [$1];", "=r,l", [flag], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def await_flag(flag):
    """Until ``flag`` i32[1] is raised: what was written before that is read from here on."""
    raised = is_raised(flag)
    while raised == 0:
        raised = is_raised(flag)


@triton.jit
def raise_flag(flag):
    """Raises ``flag`` i32[1] behind all that the program has written. Its threads all do, of which the first says
    nothing of the others' writes without the barrier."""
    tl.debug_barrier()
    tl.inline_asm_elementwise(
        "fence.acq_rel.sys; st.relaxed.sys.global.u32 [$1], 1; mov.u32 $0, 1;",
        "=r,l",
        [flag],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )

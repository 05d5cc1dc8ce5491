"""Routed experts for a few tokens: one GEMV a chosen expert, every weight of it read once.

An expert's weights may lie elsewhere: ``resident`` i32[experts] then says where an expert's matrices lie among those
that are here, -1 if they do not; such experts add nothing. Without it all experts are here.
"""

import triton
import triton.language as tl

from hetcomp.codegen_templates.gpu.functions import glu
from hetcomp.codegen_templates.gpu.gemv import panel_products


@triton.jit
def expert_of(ids, resident, entry):
    """Which matrices the entry's expert has, -1: none here."""
    expert = tl.load(ids + entry)
    if resident is not None:
        expert = tl.load(resident + expert)
    return expert


@triton.jit
def experts_gate_up_gemv(
    x,
    norm,
    ids,
    resident,
    w,
    bias,
    h,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOP_K: tl.constexpr,
    MATRIX: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    FORMAT: tl.constexpr,
    FUNCTION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    STEPS: tl.constexpr,
):
    """x f32[T, HIDDEN], norm as in panel_products, ids i32[T, TOP_K], w matrices of MATRIX words in layout
    panels16_glu, bias f32[experts, 2 * INTERMEDIATE] or None -> h f32[T, TOP_K, INTERMEDIATE]. Grid: (pairs of panels,
    TOP_K, T)."""
    pair, entry = tl.program_id(0), tl.program_id(2) * TOP_K + tl.program_id(1)
    expert = expert_of(ids, resident, entry)
    if expert < 0:
        return
    c = tl.arange(0, 32)
    totals = panel_products(
        x + tl.program_id(2) * HIDDEN,
        norm,
        w + expert.to(tl.int64) * MATRIX,
        pair * 2 + c // 16,
        c % 16,
        HIDDEN,
        HIDDEN,
        EPS,
        WEIGHT_OFFSET,
        FORMAT,
        1,
        STEPS,
    )
    gate, up = tl.split(tl.permute(tl.reshape(totals[0], (2, 16)), (1, 0)))
    n = pair * 16 + tl.arange(0, 16)
    if bias is not None:
        gate += tl.load(bias + expert * (2 * INTERMEDIATE) + n, mask=n < INTERMEDIATE, other=0.0)
        up += tl.load(bias + expert * (2 * INTERMEDIATE) + INTERMEDIATE + n, mask=n < INTERMEDIATE, other=0.0)
    tl.store(h + entry * INTERMEDIATE + n, glu(gate, up, FUNCTION, ALPHA, LIMIT), mask=n < INTERMEDIATE)


@triton.jit
def experts_down_gemv(
    h,
    ids,
    weights,
    resident,
    w,
    bias,
    added,
    added_1,
    y,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOP_K: tl.constexpr,
    MATRIX: tl.constexpr,
    FORMAT: tl.constexpr,
    STEPS: tl.constexpr,
):
    """h f32[T, TOP_K, INTERMEDIATE], ids i32 and weights f32[T, TOP_K], w matrices of MATRIX words, bias f32[experts,
    HIDDEN] or None -> y f32[T, HIDDEN], added up in the order of the choice; then added and added_1, None or f32 of y's
    shape. Grid: (panels, T)."""
    panel, token = tl.program_id(0), tl.program_id(1)
    r = tl.arange(0, 16)
    n = panel * 16 + r
    sums = tl.zeros((16,), tl.float32)
    for choice in tl.range(0, TOP_K):
        entry = token * TOP_K + choice
        expert = expert_of(ids, resident, entry)
        if expert >= 0:
            totals = panel_products(
                h + entry * INTERMEDIATE,
                None,
                w + expert.to(tl.int64) * MATRIX,
                panel + r * 0,
                r,
                INTERMEDIATE,
                INTERMEDIATE,
                0.0,
                0.0,
                FORMAT,
                1,
                STEPS,
            )
            total = totals[0]
            if bias is not None:
                total += tl.load(bias + expert * HIDDEN + n, mask=n < HIDDEN, other=0.0)
            sums += tl.load(weights + entry) * total
    at = token * HIDDEN + n
    if added is not None:
        sums += tl.load(added + at, mask=n < HIDDEN, other=0.0)
    if added_1 is not None:
        sums += tl.load(added_1 + at, mask=n < HIDDEN, other=0.0)
    tl.store(y + at, sums, mask=n < HIDDEN)

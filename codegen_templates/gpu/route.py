"""Choice of experts: a program ranks the scores of one token (hetcomp.ir.ops.Route)."""

import triton
import triton.language as tl

from hetcomp.codegen_templates.gpu.rowwise import beyond


@triton.jit
def _choice_scores(logits, SCORING: tl.constexpr, inside):
    """Scores of all experts; -inf outside."""
    if SCORING == "softmax":
        p = tl.where(inside, tl.exp(logits - tl.max(tl.max(logits, axis=1), axis=0)), 0.0)
        return p / tl.sum(tl.sum(p, axis=1), axis=0)
    elif SCORING == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-logits))
    else:
        return logits


@triton.jit
def _group_scores(choice, s, GROUP_SCORE: tl.constexpr):
    """f32[groups] from the experts' [groups, size]; s i32[1, size] numbers the experts of a group."""
    best, at = tl.max(choice, axis=1, return_indices=True)
    if GROUP_SCORE == "top2":
        best += tl.max(tl.where(s == at[:, None], -float("inf"), choice), axis=1)
    return best


@triton.jit
def _near(scores, best, JITTER: tl.constexpr):
    """Sum of exp(score - best) of scores [n] near the best; -inf adds nothing."""
    # The comparison is false of NaN: 0 / 0 where all are 0, inf / inf of experts that are not there.
    far = (best - scores) / tl.maximum(tl.abs(scores), best) > 2 * JITTER
    return tl.sum(tl.where(far, 0.0, tl.exp(scores - best)), axis=0)


@triton.jit
def route(
    logits,
    bias,
    n_rows,
    ids,
    weights,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORING: tl.constexpr,
    NORMALISE: tl.constexpr,
    NORM_EPS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_SCORE: tl.constexpr,
    OUTSIDE: tl.constexpr,
    SCALING: tl.constexpr,
    JITTER: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """logits f32[rows, EXPERTS], or f32[PARTS, ROWS, EXPERTS] to be added up, bias f32[EXPERTS] or None -> ids i32,
    weights f32[rows, TOP_K]. Grid: (rows)."""
    row = tl.program_id(0)
    if beyond(row, n_rows):
        return
    SIZE: tl.constexpr = EXPERTS // GROUPS
    g, s = tl.arange(0, GROUPS_PADDED), tl.arange(0, SIZE_PADDED)
    inside = (g < GROUPS)[:, None] & (s < SIZE)[None, :]
    expert = g[:, None] * SIZE + s[None, :]
    raw = tl.load(logits + row.to(tl.int64) * EXPERTS + expert, mask=inside, other=-float("inf"))
    for part in tl.static_range(1, PARTS):
        raw += tl.load(logits + (part * ROWS + row) * EXPERTS + expert, mask=inside, other=0.0)
    scores = _choice_scores(raw, SCORING, inside)
    choice = scores
    if bias is not None:
        choice += tl.load(bias + expert, mask=inside, other=0.0)
    choice = tl.where(inside, choice, -float("inf"))
    if GROUPS > 1:
        of_group = tl.where(g < GROUPS, _group_scores(choice, s[None, :], GROUP_SCORE), -float("inf"))
        kept = g < 0
        for _ in tl.static_range(TOP_GROUPS):
            best = tl.argmax(of_group, axis=0)
            kept = kept | (g == best)
            of_group = tl.where(g == best, -float("inf"), of_group)
        outside: tl.constexpr = 0.0 if OUTSIDE == "zero" else -float("inf")
        choice = tl.where(inside & ~kept[:, None], outside, choice)
    flat = tl.reshape(choice, (GROUPS_PADDED * SIZE_PADDED,))
    all_scores = tl.reshape(scores, (GROUPS_PADDED * SIZE_PADDED,))
    number = tl.arange(0, GROUPS_PADDED * SIZE_PADDED)
    slot = tl.arange(0, TOP_K_PADDED)
    chosen = tl.zeros((TOP_K_PADDED,), tl.int32)
    picked = tl.full((TOP_K_PADDED,), -float("inf"), tl.float32)
    for k in tl.static_range(TOP_K):
        best = tl.argmax(flat, axis=0)  # the first of equals
        chosen = tl.where(slot == k, best // SIZE_PADDED * SIZE + best % SIZE_PADDED, chosen)
        score = tl.max(tl.where(number == best, all_scores, -float("inf")), axis=0)
        if SCORING == "sparse_mixer":
            score = 1.0 / _near(flat, score, JITTER)
        picked = tl.where(slot == k, score, picked)
        flat = tl.where(number == best, -float("inf"), flat)
    if SCORING == "topk_softmax":
        picked = tl.exp(picked - tl.max(picked, axis=0))
        picked = picked / tl.sum(picked, axis=0)
    picked = tl.where(slot < TOP_K, picked, 0.0)
    if NORMALISE:
        picked = picked / (tl.sum(picked, axis=0) + NORM_EPS)
    at = row * TOP_K + slot
    tl.store(ids + at, chosen, mask=slot < TOP_K)
    tl.store(weights + at, picked * SCALING, mask=slot < TOP_K)

"""Sizes of the attention kernel: how many query rows and keys a thread works on at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hetcomp.ir.ops import Attention

# Floats of queries and of sums that a thread keeps at hand: a quarter of a 1 MB L2 cache.
_TILE_FLOATS = 64 * 1024
_MAX_ROWS = 96
_DECODE_TOKENS = 8


@dataclass(frozen=True)
class AttentionTile:
    """``rows``: query rows (tokens x heads of a kv head); ``keys``: keys a block; ``max_parts``: parts over
    all tokens of a decode step; ``min_part_keys``: fewest keys worth a part; ``decode_tokens``: steps of up
    to so many tokens are split by keys, not tiled by tokens."""

    rows: int
    keys: int
    max_parts: int = 64
    min_part_keys: int = 256
    decode_tokens: int = _DECODE_TOKENS


def attention_tile(attrs: Attention) -> AttentionTile:
    """The tile for an op's head sizes; a thread's scratch stays below 0.6 MB of stack."""
    rows = max(1, min(_MAX_ROWS, _TILE_FLOATS // (attrs.head_dim + attrs.v_head_dim)))
    return AttentionTile(rows=rows, keys=64 if attrs.head_dim <= 256 else 32)


def attention_workspace(attrs: Attention, tile: AttentionTile, dims: Mapping[str, int]) -> int:
    """Bytes for the partial results of a decode step; steps of more than ``max_parts`` tokens have none."""
    padded = -(-attrs.v_head_dim // 16) * 16
    tokens = min(dims["T"], tile.max_parts)
    records = max(t * (tile.max_parts // t) for t in range(1, tokens + 1))
    return records * attrs.heads * (padded + 2) * 4

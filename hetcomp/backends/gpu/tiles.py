"""Sizes that tiles and scratch memory come in."""

from __future__ import annotations


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below ``number`` (at least 1): the side of a Triton tile."""
    return 1 << max(number - 1, 0).bit_length()


def aligned(size: int, alignment: int = 64) -> int:
    """Bytes rounded up to a multiple of ``alignment``."""
    return -(-size // alignment) * alignment

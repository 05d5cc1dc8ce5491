"""Packed weights as words, the units in which kernels load them (codegen_templates/gpu/weights.py)."""

from __future__ import annotations

from hetcomp.backends import packing

# Elements of k in a word of weights.
PER_WORD = {"f32": 1, "bf16": 2, "q8": 4, "q6k": 8, "q5k": 8, "q4z": 8, "q4k": 8, "q4": 8, "mxfp4": 8, "fp8": 2}

# Formats whose words come with more than a scale: minima, high bits.
MORE_THAN_SCALES = ("q6k", "q5k", "q4z", "q4k")

# In the names of launches whose weights have columns in an order of their own.
ORDERED = "_act_order"


def word_type(weight_format: str) -> str:
    """Triton type of a packed weight's pointer."""
    return "*i16" if weight_format == "fp8" else "*i32"


def matrix_words(rows: int, columns: int, weight_format: str, layout: str) -> int:
    """Words of one packed matrix, the order of its columns included."""
    return packing.matrix_bytes(rows, columns, weight_format, layout) // (2 if weight_format == "fp8" else 4)


def words_before_order(rows: int, columns: int, weight_format: str, layout: str) -> int:
    """32-bit words of a packed matrix in front of the order of its columns."""
    size = packing.matrix_bytes(rows, columns, weight_format, layout)
    return (size - packing.order_bytes(columns, layout)) // 4

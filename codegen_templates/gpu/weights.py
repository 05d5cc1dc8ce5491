"""Packed weights in registers: the bytes of hetcomp/backends/packing.py as tiles of words and as numbers.

A tile is [steps, columns]. A column is a row of the matrix, 16 to a panel; a step is the word that a column has every
PER elements of k: 32 bits, in fp8 the 16 bits of two elements. Element o of step s is k = PER * s + o in every format.
"""

import triton
import triton.language as tl

# 2^23 as f32: a whole number below 2^23 in the low bits of its mantissa is that number more (no conversion needed,
# whose rate is a quarter of an addition's or less).
_TWO_23: tl.constexpr = tl.constexpr(0x4B000000)


@triton.jit
def elements_of_word(FORMAT: tl.constexpr) -> tl.constexpr:
    if FORMAT == "f32":
        return 1
    elif FORMAT == "q8":
        return 4
    elif FORMAT == "bf16" or FORMAT == "fp8":
        return 2
    else:
        return 8


@triton.jit
def _steps_of_group(FORMAT: tl.constexpr) -> tl.constexpr:
    """Steps in front of a group's scales; 0: the format has no scales between its elements."""
    if FORMAT == "q8":
        return 8
    elif FORMAT == "q6k":
        return 2
    elif elements_of_word(FORMAT) == 8:
        return 4
    else:
        return 0


@triton.jit
def _behind_group(FORMAT: tl.constexpr) -> tl.constexpr:
    """Words between the last step of a group and the next group: scales, zero points, minima, high bits."""
    if FORMAT == "mxfp4":
        return 4
    elif FORMAT == "q4z":
        return 12
    elif FORMAT == "q5k":
        return 24
    elif FORMAT == "q6k":
        return 20
    else:
        return 8


@triton.jit
def _head(FORMAT: tl.constexpr) -> tl.constexpr:
    """Words in front of the 32 steps of a block of 256 columns."""
    if FORMAT == "q4k" or FORMAT == "q5k":
        return 16
    elif FORMAT == "q6k":
        return 8
    else:
        return 0


@triton.jit
def padded_steps(K: tl.constexpr, FORMAT: tl.constexpr) -> tl.constexpr:
    """Steps of a panel of K columns."""
    PER: tl.constexpr = elements_of_word(FORMAT)
    if PER >= 4:
        return (K + 31) // 32 * (32 // PER)
    else:
        return (K + PER - 1) // PER


@triton.jit
def panel_bytes(K: tl.constexpr, FORMAT: tl.constexpr) -> tl.constexpr:
    """As hetcomp.backends.packing.panel_bytes."""
    if FORMAT == "f32":
        return 64 * K
    elif FORMAT == "bf16":
        return (K + 1) // 2 * 64
    elif FORMAT == "fp8":
        return ((K + 1) // 2 * 32 + 63) // 64 * 64 + ((K + 127) // 128 * 4 + 63) // 64 * 64
    else:
        steps: tl.constexpr = padded_steps(K, FORMAT)
        groups: tl.constexpr = steps // _steps_of_group(FORMAT) * _behind_group(FORMAT)
        return (4 * (16 * steps + groups + (K + 255) // 256 * _head(FORMAT)) + 63) // 64 * 64


@triton.jit
def matrix_words(rows, K: tl.constexpr, FORMAT: tl.constexpr):
    """32-bit words of the panels of a matrix [rows, K], behind which the order of its columns lies if it has one."""
    return (rows + 15) // 16 * (panel_bytes(K, FORMAT) // 4)


@triton.jit
def _words_before(steps, FORMAT: tl.constexpr):
    """Words of a panel in front of those of ``steps``, in formats with scales behind each group."""
    # In this order: with the groups first ptxas takes 171 registers instead of 164 for gate and up of q4 experts in
    # tiles of 64 rows, so that two instead of three programs share a multiprocessor (5 % of a prompt of 512 tokens).
    words = steps * 16 + steps // _steps_of_group(FORMAT) * _behind_group(FORMAT)
    if _head(FORMAT) == 0:
        return words
    else:
        return words + (steps // 32 + 1) * _head(FORMAT)


@triton.jit
def _word_offsets(panels, rows, steps, K: tl.constexpr, FORMAT: tl.constexpr):
    """Where words lie, in words; operands that broadcast."""
    if FORMAT == "fp8":
        return steps * 16 + (panels * (panel_bytes(K, FORMAT) // 2) + rows)
    elif FORMAT == "f32" or FORMAT == "bf16":
        return steps * 16 + (panels * (panel_bytes(K, FORMAT) // 4) + rows)
    else:
        return _words_before(steps, FORMAT) + (panels * (panel_bytes(K, FORMAT) // 4) + rows)


@triton.jit
def _load(w, offsets, mask, TYPE: tl.constexpr, MASKED: tl.constexpr):
    """Numbers of a type, ``offsets`` of them from w on; 0 where not ``mask``."""
    pointers = w.to(tl.pointer_type(TYPE)) + offsets
    if MASKED:
        return tl.load(pointers, mask=mask, other=0)
    else:
        return tl.load(pointers)


@triton.jit
def _words(w, panels, rows, steps, mask, K: tl.constexpr, FORMAT: tl.constexpr, MASKED: tl.constexpr):
    """As load_words, operands that broadcast."""
    offsets = _word_offsets(panels, rows, steps, K, FORMAT)
    words = tl.load(w + offsets, mask=mask, other=0) if MASKED else tl.load(w + offsets)
    if FORMAT == "q5k" or FORMAT == "q6k":
        # Behind the steps of a group lie the high bits of all: those of this step come to the lowest bits of each byte,
        # above the word of its low halves.
        GROUP: tl.constexpr = _steps_of_group(FORMAT)
        step = steps % GROUP
        high = _load(w, offsets + (GROUP - step) * 16, mask, tl.int32, MASKED) >> (step * (8 // GROUP))
        return (high.to(tl.int64) << 32) | (words.to(tl.int64) & 0xFFFFFFFF)
    else:
        return words


@triton.jit
def _scales(w, panels, rows, steps, mask, K: tl.constexpr, FORMAT: tl.constexpr, MASKED: tl.constexpr):
    """As load_scales, operands that broadcast."""
    if FORMAT == "fp8":
        behind: tl.constexpr = ((K + 1) // 2 * 32 + 63) // 64 * 16  # in f32
        offsets = steps // 64 + (panels * (panel_bytes(K, FORMAT) // 4) + behind)
        return _load(w, offsets, mask, tl.float32, MASKED) * 256.0, 0.0
    elif FORMAT == "mxfp4":
        offsets = steps // 4 * 272 + 256 + (panels * panel_bytes(K, FORMAT) + rows)
        exponent = _load(w, offsets, mask, tl.uint8, MASKED).to(tl.int32)
        # 2^-127 is subnormal: the exponent field 0 with the highest bit of the mantissa.
        bits = tl.where(exponent == 0, 1 << 22, exponent << 23)
        return bits.to(tl.float32, bitcast=True) * 16384.0, 0.0
    elif FORMAT == "q4k" or FORMAT == "q5k":
        codes: tl.constexpr = 256 if FORMAT == "q4k" else 320  # bytes of a group, with 32 of scales and minima behind
        heads = steps // 32 * (32 + 4 * (codes + 32)) + (panels * (panel_bytes(K, FORMAT) // 2) + rows)
        groups = steps // 4 * (codes + 32) + (steps // 32 + 1) * 64 + codes + (panels * panel_bytes(K, FORMAT) + rows)
        scales = _load(w, heads, mask, tl.float16, MASKED).to(tl.float32)
        minima = _load(w, heads + 16, mask, tl.float16, MASKED).to(tl.float32)
        scales *= _load(w, groups, mask, tl.uint8, MASKED).to(tl.float32)
        return scales, minima * _load(w, groups + 16, mask, tl.uint8, MASKED).to(tl.float32)
    elif FORMAT == "q6k":
        heads = steps // 32 * 1680 + (panels * (panel_bytes(K, FORMAT) // 2) + rows)
        groups = steps // 2 * 208 + (steps // 32 + 1) * 32 + 192 + (panels * panel_bytes(K, FORMAT) + rows)
        scales = _load(w, heads, mask, tl.float16, MASKED).to(tl.float32)
        return scales * _load(w, groups, mask, tl.int8, MASKED).to(tl.float32), 0.0
    else:
        elements: tl.constexpr = _steps_of_group(FORMAT) * 32  # of a group, in fp16
        group: tl.constexpr = elements + _behind_group(FORMAT) * 2
        along_k = steps // _steps_of_group(FORMAT) * group + elements
        offsets = along_k + (panels * (panel_bytes(K, FORMAT) // 2) + rows)
        scales = _load(w, offsets, mask, tl.float16, MASKED).to(tl.float32)
        if FORMAT == "q4z":
            zeros = _load(w, along_k * 2 + 32 + (panels * panel_bytes(K, FORMAT) + rows), mask, tl.uint8, MASKED)
            return scales, scales * zeros.to(tl.float32)
        else:
            return scales, 0.0


@triton.jit
def load_words(w, panels, rows, steps, mask, K: tl.constexpr, FORMAT: tl.constexpr, MASKED: tl.constexpr):
    """Words [steps, columns] of the columns ``rows`` (0 .. 15) of ``panels``, in q5k and q6k with the codes' high
    bits in a second half; 0 where not ``mask``.

    w: the matrix, as 32-bit words (fp8: 16-bit). panels, rows i32[columns], steps i32[steps], mask [steps, columns].
    """
    return _words(w, panels[None, :], rows[None, :], steps[:, None], mask, K, FORMAT, MASKED)


@triton.jit
def load_scales(w, panels, rows, steps, mask, K: tl.constexpr, FORMAT: tl.constexpr, MASKED: tl.constexpr):
    """What the numbers of :func:`element` must be multiplied by and what must then be subtracted (0.0 unless the
    format has minima), f32 [steps, columns]; 0 where not ``mask``. For the formats with scales only; operands as those
    of :func:`load_words`."""
    return _scales(w, panels[None, :], rows[None, :], steps[:, None], mask, K, FORMAT, MASKED)


@triton.jit
def load_panels(w, panels, steps, mask, K: tl.constexpr, FORMAT: tl.constexpr, MASKED: tl.constexpr):
    """Words [panels, steps, 16] of whole panels, in the order in which they lie in memory, their scales (1 in formats
    without) and minima, 0 in formats without (shapes broadcast); 0 where not ``mask`` [panels, steps, 1]."""
    p, s, r = panels[:, None, None], steps[None, :, None], tl.arange(0, 16)[None, None, :]
    words = _words(w, p, r, s, mask, K, FORMAT, MASKED)
    if not has_scales(FORMAT):
        one = tl.full((1, 1, 1), 1.0, tl.float32)
        return words, one, one * 0.0
    else:
        scales, minima = _scales(w, p, r, s, mask, K, FORMAT, MASKED)
        if has_minima(FORMAT):
            return words, scales, minima
        else:
            return words, scales, tl.zeros((1, 1, 1), tl.float32)


@triton.jit
def has_scales(FORMAT: tl.constexpr) -> tl.constexpr:
    return FORMAT != "f32" and FORMAT != "bf16"


@triton.jit
def has_minima(FORMAT: tl.constexpr) -> tl.constexpr:
    """Whether a weight is an element times its scale less a minimum; in q4z that is scale times zero point."""
    return FORMAT == "q4z" or FORMAT == "q4k" or FORMAT == "q5k"


@triton.jit
def element(words, o, FORMAT: tl.constexpr):
    """Element ``o`` of each word as f32, exactly, but for the factor and the minimum in :func:`load_scales`.

    o: a number known when compiling, or a tensor that broadcasts with ``words``.
    """
    if FORMAT == "f32":
        return words.to(tl.float32, bitcast=True)
    elif FORMAT == "bf16":
        return ((words >> (16 * o)) << 16).to(tl.float32, bitcast=True)
    elif FORMAT == "q8":
        code = (words >> (8 * o)) & 255
        return (code | _TWO_23).to(tl.float32, bitcast=True) - (8388608.0 + 128.0)
    elif FORMAT == "q4":
        code = (words >> (o % 4 * 8 + o // 4 * 4)) & 15
        return (code | _TWO_23).to(tl.float32, bitcast=True) - (8388608.0 + 8.0)
    elif FORMAT == "q4z" or FORMAT == "q4k":
        code = (words >> (o % 4 * 8 + o // 4 * 4)) & 15
        return (code | _TWO_23).to(tl.float32, bitcast=True) - 8388608.0
    elif FORMAT == "q5k":
        code = (words.to(tl.int32) >> (o % 4 * 8 + o // 4 * 4)) & 15
        high = ((words >> 32).to(tl.int32) >> (o % 4 * 8 + o // 4)) & 1
        return (code | (high << 4) | _TWO_23).to(tl.float32, bitcast=True) - 8388608.0
    elif FORMAT == "q6k":
        code = (words.to(tl.int32) >> (o % 4 * 8 + o // 4 * 4)) & 15
        high = ((words >> 32).to(tl.int32) >> (o % 4 * 8 + o // 4 * 2)) & 3
        return (code | (high << 4) | _TWO_23).to(tl.float32, bitcast=True) - (8388608.0 + 32.0)
    elif FORMAT == "mxfp4":
        # e2m1 as f16 / 2^14: the same fields, subnormals included; the exponents' biases are 1 and 15.
        code = (words >> (o % 4 * 8 + o // 4 * 4)) & 15
        bits = ((code & 8) << 12) | ((code & 7) << 9)
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        # e4m3 as f16 / 256: f16 has the same fields a place lower and its exponent's bias is 15 instead of 7.
        code = words.to(tl.int32) >> (8 * o)
        bits = ((code & 128) << 8) | ((code & 127) << 7)
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def scaled_element(words, o: tl.constexpr, scales, minima, FORMAT: tl.constexpr):
    """:func:`element` times its scale, less its minimum, rounded to f32 once: in q4, q4z and q8, where nothing is
    rounded, in one multiplication with an addition."""
    if FORMAT == "q4" or FORMAT == "q4z" or FORMAT == "q8":
        # The code in the highest bits of a mantissa is 1 + code / 16 (256). 24 (384), 16 (256) and 16 + a zero point
        # times an fp16 number are exact, and so is the sum.
        BITS: tl.constexpr = 8 if FORMAT == "q8" else 4
        AT: tl.constexpr = o % 4 * 8 + o // 4 * 4
        UP: tl.constexpr = 23 - BITS
        if AT < UP:
            placed = words << (UP - AT)
        else:
            placed = words >> (AT - UP)
        number = ((placed & (((1 << BITS) - 1) << UP)) | 0x3F800000).to(tl.float32, bitcast=True)
        RANGE: tl.constexpr = 1 << BITS
        if FORMAT == "q4z":
            return tl.fma(number, scales * RANGE, scales * (-1.0 * RANGE) - minima)
        else:
            return tl.fma(number, scales * RANGE, scales * (-1.5 * RANGE))
    elif FORMAT == "bf16":
        return element(words, o, FORMAT)
    elif FORMAT == "q4k" or FORMAT == "q5k":
        # The product is exact.
        return tl.fma(element(words, o, FORMAT), scales, -minima)
    else:
        return element(words, o, FORMAT) * scales

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
    elif FORMAT == "q4" or FORMAT == "mxfp4":
        return 8
    else:
        return 2


@triton.jit
def _steps_of_group(FORMAT: tl.constexpr) -> tl.constexpr:
    """Steps in front of a group's scales; 0: the format has no scales between its elements."""
    if FORMAT == "q8":
        return 8
    elif FORMAT == "q4" or FORMAT == "mxfp4":
        return 4
    else:
        return 0


@triton.jit
def padded_steps(K: tl.constexpr, FORMAT: tl.constexpr) -> tl.constexpr:
    """Steps of a panel of K columns."""
    if FORMAT == "q8" or FORMAT == "q4" or FORMAT == "mxfp4":
        return (K + 31) // 32 * _steps_of_group(FORMAT)
    else:
        return (K + elements_of_word(FORMAT) - 1) // elements_of_word(FORMAT)


@triton.jit
def panel_bytes(K: tl.constexpr, FORMAT: tl.constexpr) -> tl.constexpr:
    """As hetcomp.backends.packing.panel_bytes."""
    if FORMAT == "f32":
        return 64 * K
    elif FORMAT == "bf16":
        return (K + 1) // 2 * 64
    elif FORMAT == "q8":
        return ((K + 31) // 32 * 544 + 63) // 64 * 64
    elif FORMAT == "q4":
        return ((K + 31) // 32 * 288 + 63) // 64 * 64
    elif FORMAT == "mxfp4":
        return ((K + 31) // 32 * 272 + 63) // 64 * 64
    else:
        return ((K + 1) // 2 * 32 + 63) // 64 * 64 + ((K + 127) // 128 * 4 + 63) // 64 * 64


@triton.jit
def _word_offsets(panels, rows, steps, K: tl.constexpr, FORMAT: tl.constexpr):
    """Where words lie, in words; operands that broadcast."""
    if FORMAT == "fp8":
        return steps * 16 + (panels * (panel_bytes(K, FORMAT) // 2) + rows)
    elif FORMAT == "f32" or FORMAT == "bf16":
        return steps * 16 + (panels * (panel_bytes(K, FORMAT) // 4) + rows)
    else:
        # Behind each group the words of its scales: 8 (fp16 [16]) or 4 (e8m0 [16]).
        gap: tl.constexpr = 4 if FORMAT == "mxfp4" else 8
        along_k = steps * 16 + steps // _steps_of_group(FORMAT) * gap
        return along_k + (panels * (panel_bytes(K, FORMAT) // 4) + rows)


@triton.jit
def _scales(w, panels, rows, steps, mask, K: tl.constexpr, FORMAT: tl.constexpr, MASKED: tl.constexpr):
    """As load_scales, operands that broadcast."""
    if FORMAT == "fp8":
        floats = w.to(tl.pointer_type(tl.float32))
        behind: tl.constexpr = ((K + 1) // 2 * 32 + 63) // 64 * 16  # in f32
        offsets = steps // 64 + (panels * (panel_bytes(K, FORMAT) // 4) + behind)
        scales = tl.load(floats + offsets, mask=mask, other=0.0) if MASKED else tl.load(floats + offsets)
        return scales * 256.0
    elif FORMAT == "mxfp4":
        octets = w.to(tl.pointer_type(tl.uint8))
        offsets = steps // 4 * 272 + 256 + (panels * panel_bytes(K, FORMAT) + rows)
        exponent = (tl.load(octets + offsets, mask=mask, other=0) if MASKED else tl.load(octets + offsets)).to(tl.int32)
        # 2^-127 is subnormal: the exponent field 0 with the highest bit of the mantissa.
        bits = tl.where(exponent == 0, 1 << 22, exponent << 23)
        return bits.to(tl.float32, bitcast=True) * 16384.0
    else:
        group: tl.constexpr = 272 if FORMAT == "q8" else 144  # in fp16
        halves = w.to(tl.pointer_type(tl.float16))
        along_k = steps // _steps_of_group(FORMAT) * group + (group - 16)
        offsets = along_k + (panels * (panel_bytes(K, FORMAT) // 2) + rows)
        scales = tl.load(halves + offsets, mask=mask, other=0.0) if MASKED else tl.load(halves + offsets)
        return scales.to(tl.float32)


@triton.jit
def load_words(w, panels, rows, steps, mask, K: tl.constexpr, FORMAT: tl.constexpr, MASKED: tl.constexpr):
    """Words [steps, columns] of the columns ``rows`` (0 .. 15) of ``panels``; 0 where not ``mask``.

    w: the matrix, as 32-bit words (fp8: 16-bit). panels, rows i32[columns], steps i32[steps], mask [steps, columns].
    """
    offsets = _word_offsets(panels[None, :], rows[None, :], steps[:, None], K, FORMAT)
    if MASKED:
        return tl.load(w + offsets, mask=mask, other=0)
    else:
        return tl.load(w + offsets)


@triton.jit
def load_scales(w, panels, rows, steps, mask, K: tl.constexpr, FORMAT: tl.constexpr, MASKED: tl.constexpr):
    """What the numbers of :func:`element` must be multiplied by, f32 [steps, columns]; 0 where not ``mask``. For the
    formats with scales only; operands as those of :func:`load_words`."""
    return _scales(w, panels[None, :], rows[None, :], steps[:, None], mask, K, FORMAT, MASKED)


@triton.jit
def load_panels(w, panels, steps, mask, K: tl.constexpr, FORMAT: tl.constexpr, MASKED: tl.constexpr):
    """Words [panels, steps, 16] of whole panels, in the order in which they lie in memory, and their scales (1 in
    formats without; shapes broadcast); 0 where not ``mask`` [panels, steps, 1]."""
    p, s, r = panels[:, None, None], steps[None, :, None], tl.arange(0, 16)[None, None, :]
    offsets = _word_offsets(p, r, s, K, FORMAT)
    words = tl.load(w + offsets, mask=mask, other=0) if MASKED else tl.load(w + offsets)
    if FORMAT == "f32" or FORMAT == "bf16":
        return words, tl.full((1, 1, 1), 1.0, tl.float32)
    else:
        return words, _scales(w, p, r, s, mask, K, FORMAT, MASKED)


@triton.jit
def has_scales(FORMAT: tl.constexpr) -> tl.constexpr:
    return FORMAT != "f32" and FORMAT != "bf16"


@triton.jit
def element(words, o, FORMAT: tl.constexpr):
    """Element ``o`` of each word as f32, exactly, but for the factor in :func:`load_scales`.

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
def scaled_element(words, o: tl.constexpr, scales, FORMAT: tl.constexpr):
    """:func:`element` times its scale, f32: q4 and q8 in one exact multiplication with an addition."""
    if FORMAT == "q4" or FORMAT == "q8":
        # The code in the highest bits of a mantissa is 1 + code / 16 (256). 24 (384) and 16 (256) times an fp16 number
        # are exact, and so is the sum.
        BITS: tl.constexpr = 4 if FORMAT == "q4" else 8
        AT: tl.constexpr = o % 4 * 8 + o // 4 * 4
        UP: tl.constexpr = 23 - BITS
        if AT < UP:
            placed = words << (UP - AT)
        else:
            placed = words >> (AT - UP)
        number = ((placed & (((1 << BITS) - 1) << UP)) | 0x3F800000).to(tl.float32, bitcast=True)
        RANGE: tl.constexpr = 1 << BITS
        return tl.fma(number, scales * RANGE, scales * (-1.5 * RANGE))
    elif FORMAT == "bf16":
        return element(words, o, FORMAT)
    else:
        return element(words, o, FORMAT) * scales

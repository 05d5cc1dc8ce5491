// One number of each of several rows of a panel: 16 rows where AVX-512 is compiled for, else 8. A row is a
// lane, so that everything a group of columns needs (extremes, sums, scales) is found for all lanes at once
// without shuffles.
//
// Everything compiled for an instruction set lies in a namespace of its own and uses no templates of the
// standard library: the linker would keep one copy of those for both instruction sets.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace hetcomp::quantise::HETCOMP_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

typedef int16_t Shorts __attribute__((vector_size(2 * kLanes)));
typedef int8_t Chars __attribute__((vector_size(kLanes)));

inline Floats load(const float* p) {
  Floats x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

template <class Vector>
inline void store(void* p, Vector x) {
  __builtin_memcpy(p, &x, sizeof x);
}

inline Floats all(float x) { return x - Floats{}; }
inline Ints all(int32_t x) { return x - Ints{}; }

inline Ints bits(Floats x) { return reinterpret_cast<Ints>(x); }
inline Floats from_bits(Ints x) { return reinterpret_cast<Floats>(x); }

inline Floats magnitude(Floats x) { return from_bits(bits(x) & 0x7FFFFFFF); }
inline Ints sign_bit(Floats x) { return (bits(x) >> 31) & 1; }

inline Ints max(Ints a, Ints b) { return a > b ? a : b; }

// 2^x for x from -126 to 127.
inline Floats power_of_two(Ints x) { return from_bits((x + 127) << 23); }

// 1.5 * 2^23: adding it leaves the nearest integer, ties to even, in the low bits of a number within +-2^22.
constexpr float kRound = 12582912.0f;

inline Floats nearest(Floats x) { return (x + kRound) - kRound; }
// Of an integer within +-2^22.
inline Ints to_int(Floats x) { return bits(x + kRound) - bits(all(kRound)); }

inline bool any(Ints mask) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (mask[lane]) return true;
  }
  return false;
}

// min, max: the second number if one is NaN. Halves: fp16 numbers, as many as there are lanes.
#if defined(__AVX512F__)
typedef __m256i Halves;
constexpr __mmask16 kAll = 0xFFFF;  // the forms without a mask make GCC warn falsely (bug 105593)
inline Floats min(Floats a, Floats b) { return _mm512_maskz_min_ps(kAll, a, b); }
inline Floats max(Floats a, Floats b) { return _mm512_maskz_max_ps(kAll, a, b); }
template <int kMode>
inline Halves to_halves(Floats x) {
  return _mm512_maskz_cvtps_ph(kAll, x, kMode);
}
inline Floats from_halves(Halves h) { return _mm512_maskz_cvtph_ps(kAll, h); }
#else
typedef __m128i Halves;
inline Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
template <int kMode>
inline Halves to_halves(Floats x) {
  return _mm256_cvtps_ph(x, kMode);
}
inline Floats from_halves(Halves h) { return _mm256_cvtph_ps(h); }
#endif
constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT;
constexpr int kUp = _MM_FROUND_TO_POS_INF;

inline Floats rounded_to_half(Floats x) { return from_halves(to_halves<kNearest>(x)); }

}  // namespace hetcomp::quantise::HETCOMP_ISA

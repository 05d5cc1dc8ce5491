// Codes of bf16, e4m3fn and e2m1 numbers, rounded to nearest, ties to even.
#pragma once

#include "lanes.h"

namespace hetcomp::quantise::HETCOMP_ISA {

inline Ints bf16_code(Floats x) {
  const Ints b = bits(x);
  const Ints rounded = ((b + 0x7FFF + ((b >> 16) & 1)) >> 16) & 0xFFFF;
  // Rounding a NaN's mantissa may overflow into the exponent or the sign.
  return magnitude(x) <= __builtin_inff() ? rounded : all(0x7FC0);
}

// A binary number of a sign, some exponent bits and kMantissa bits, without infinities in use.
template <int kMantissa, int kBias>
struct SmallFloat {
  // The smallest normal number and the one whose last place is that of the subnormals.
  static constexpr float power(int exponent) {
    return exponent < 0 ? 1.0f / static_cast<float>(1LL << -exponent) : static_cast<float>(1LL << exponent);
  }
  static constexpr float kNormal = power(1 - kBias);
  static constexpr float kSubnormalRound = power(23 + 1 - kBias - kMantissa);
  static constexpr int kDropped = 23 - kMantissa;

  // x: not negative and not above the format's largest number.
  static Ints code(Floats x) {
    const Ints normal = (round_bits(x) >> kDropped) - ((127 - kBias) << kMantissa);
    const Ints subnormal = bits(x + kSubnormalRound) - bits(all(kSubnormalRound));
    return x < kNormal ? subnormal : normal;
  }

  // The number that code(x) stands for.
  static Floats value(Floats x) {
    const Floats normal = from_bits(round_bits(x) & ~((1 << kDropped) - 1));
    return x < kNormal ? (x + kSubnormalRound) - kSubnormalRound : normal;
  }

 private:
  static Ints round_bits(Floats x) {
    const Ints b = bits(x);
    return b + ((1 << (kDropped - 1)) - 1) + ((b >> kDropped) & 1);
  }
};

using E4m3 = SmallFloat<3, 7>;
using E2m1 = SmallFloat<1, 1>;
constexpr float kE4m3Max = 448.0f;
constexpr float kE2m1Max = 6.0f;

}  // namespace hetcomp::quantise::HETCOMP_ISA

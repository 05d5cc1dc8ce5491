// The scale of a group of q4 numbers: the search for the smallest weighted squared error.
//
// For given codes q the scale that minimises sum v (w - s q)^2 is s = sum v w q / sum v q^2, and it takes
// (sum v w q)^2 / sum v q^2 off the error. So codes are tried that come from dividing the group's extreme
// number into more or fewer levels than 8, and those that take off most are refitted: the method of
// make_qx_quants in llama.cpp (ggml-quants.c) with a wider range of levels. The extreme number goes to the
// side that has code -8.
#pragma once

#include "tile.h"

namespace hetcomp::quantise::HETCOMP_ISA {

inline Floats q4_clipped(Floats q) { return max(min(nearest(q), all(7.0f)), all(-8.0f)); }

// The nearest code of each number for a scale that may be zero.
inline Floats q4_code(Floats w, Floats scale) { return q4_clipped(scale != 0.0f ? w / scale : all(0.0f)); }

// Sums over a group that say how good its codes are; v is the weight of a column's error.
struct Fit {
  Floats wq = all(0.0f);  // sum v w q
  Floats qq = all(0.0f);  // sum v q^2

  void add(Floats w, Floats q, float v) {
    const Floats vq = v * q;
    wq += vq * w;
    qq += vq * q;
  }
  // What the best scale for these codes takes off sum v w^2.
  Floats gain() const { return qq > 0.0f ? wq * wq / qq : all(0.0f); }
  Floats scale() const { return qq > 0.0f ? wq / qq : all(0.0f); }
};

inline Floats extreme(const Tile& tile) {
  Floats far = tile.column(0);
  for (int k = 1; k < kGroup; ++k) {
    const Floats w = tile.column(k);
    far = magnitude(w) > magnitude(far) ? w : far;
  }
  return far;
}

// As fp16, but never zero for a scale that is not: small numbers keep what the smallest scale can say.
inline Floats q4_storable(Floats scale) {
  const Floats rounded = rounded_to_half(scale);
  const Floats smallest = from_bits(bits(all(0x1p-24f)) | (bits(scale) & INT32_MIN));
  return (scale != 0.0f) & (rounded == 0.0f) ? smallest : rounded;
}

// The sums for the codes that w * inverse_scale is nearest to.
inline Fit q4_fit(const Tile& tile, Floats inverse_scale, const float* v) {
  Fit fit;
  for (int k = 0; k < kGroup; ++k) fit.add(tile.column(k), q4_clipped(tile.column(k) * inverse_scale), v[k]);
  return fit;
}

inline Floats reciprocal(Floats x) { return x != 0.0f ? 1.0f / x : all(0.0f); }

// sum v (w - s q)^2 for the codes nearest to a scale. The sums of Fit say it too, but not to the last digits,
// which matter to a group that is nearly exact.
inline Floats q4_error(const Tile& tile, Floats scale, const float* v) {
  const Floats inverse_scale = reciprocal(scale);
  Floats error = all(0.0f);
  for (int k = 0; k < kGroup; ++k) {
    const Floats w = tile.column(k);
    const Floats miss = w - scale * q4_clipped(w * inverse_scale);
    error += v[k] * miss * miss;
  }
  return error;
}

// The best scale of those that come from levels, before it is rounded.
inline Floats q4_searched(const Tile& tile, Floats far, const float* v) {
  // Steps of 1/4 from 6 to 9 leave 0.1 % more error than the optimum on normal, Student-t and trained
  // weights.
  constexpr int kCandidates = 13;
  const Floats inverse = 1.0f / far;
  Floats gain = all(0.0f);
  Floats scale = all(0.0f);
  for (int i = 0; i < kCandidates; ++i) {
    const Fit fit = q4_fit(tile, inverse * (-6.0f - 0.25f * static_cast<float>(i)), v);
    scale = fit.gain() > gain ? fit.scale() : scale;
    gain = max(fit.gain(), gain);
  }
  return scale;
}

// Each lane's scale, an fp16 number; infinite where fp16 cannot hold it, zero for a group that is best all
// zeros. v: the weights of the columns' errors, not negative.
inline Floats q4_scale(const Tile& tile, const float* v) {
  // A number up to half of fp16's smallest is nearest to zero whatever the scale. Such groups are left out of
  // the search by a stand-in for their extreme number, whose reciprocal is finite.
  const Floats far = extreme(tile);
  const Ints worth = magnitude(far) > 0x1p-25f;
  const Floats searched = q4_searched(tile, worth ? far : all(1.0f), v);
  Floats best = q4_storable(far * -0.125f);
  Floats error = q4_error(tile, best, v);
  Floats scale = q4_storable(searched);
  constexpr int kRefits = 2;
  for (int i = 0; i < kRefits; ++i) {
    const Floats refitted = q4_error(tile, scale, v);
    best = refitted < error ? scale : best;
    error = min(refitted, error);
    scale = q4_storable(q4_fit(tile, reciprocal(scale), v).scale());
  }
  return from_bits(bits(best) & worth);
}

}  // namespace hetcomp::quantise::HETCOMP_ISA

// Compiled once for each instruction set, with HETCOMP_ISA naming it.
#include "lanes.h"
#include "panel_task.h"
#include "q4_scale.h"
#include "small_floats.h"
#include "tile.h"

namespace hetcomp::quantise::HETCOMP_ISA {
namespace {

// Where the lanes' part of a panel lies: `lane` is the first of their rows in it.
struct Place {
  uint8_t* panel;
  int64_t element_bytes;
  int64_t lane;

  // The 4 bytes of each lane in vector `index`, of 16 rows.
  void put(int64_t index, Ints words) const { store(panel + index * 64 + lane * 4, words); }
  void put(int64_t index, Floats words) const { store(panel + index * 64 + lane * 4, words); }
  // Two bytes of each lane.
  void put_pairs(int64_t index, Ints pairs) const {
    store(panel + index * 32 + lane * 2, __builtin_convertvector(pairs, Shorts));
  }
};

// Where the lanes' part of a group of 32 columns lies: its elements, then its scales.
struct GroupPlace {
  uint8_t* group;
  int64_t elements;
  int64_t lane;

  // The 4 bytes of each lane in vector `index` of the group.
  void put(int64_t index, Ints words) const { store(group + index * 64 + lane * 4, words); }
  // The lanes' scales, of so many bytes each.
  uint8_t* scales(int64_t bytes) const { return group + elements + lane * bytes; }
};

// Four codes of 8 bits as the bytes of a word.
Ints in_bytes(const Ints* codes) { return codes[0] | codes[1] << 8 | codes[2] << 16 | codes[3] << 24; }

// Eight codes of 4 bits: the first four in the low halves of a word's bytes, the others in the high halves.
Ints in_nibbles(const Ints* codes) { return in_bytes(codes) | in_bytes(codes + 4) << 4; }

// Lanes with a number that is NaN or infinite; those numbers become zero.
Ints cleaned(Tile& tile) {
  Ints bad = all(0);
  for (int64_t k = 0; k < kGroup; ++k) {
    const Floats w = tile.column(k);
    const Ints finite = magnitude(w) < __builtin_inff();
    bad |= ~finite;
    store(tile.numbers + k * kLanes, from_bits(bits(w) & finite));
  }
  return bad;
}

Floats largest(const Tile& tile) {
  Floats m = all(0.0f);
  for (int k = 0; k < kGroup; ++k) m = max(magnitude(tile.column(k)), m);
  return m;
}

// `count` columns are inside the panel. Returns the lanes with a number that is not finite.
Ints put_f32(const Tile& tile, int64_t group, int64_t count, const Place& place) {
  Ints bad = all(0);
  for (int64_t k = 0; k < count; ++k) {
    const Floats w = tile.column(k);
    bad |= ~(magnitude(w) < __builtin_inff());
    place.put(group * kGroup + k, w);
  }
  return bad;
}

Ints put_bf16(const Tile& tile, int64_t group, int64_t count, const Place& place) {
  Ints bad = all(0);
  for (int64_t k = 0; k < count; k += 2) {
    const Ints low = bf16_code(tile.column(k));
    const Ints high = bf16_code(tile.column(k + 1));
    bad |= ((low & 0x7F80) == 0x7F80) | ((high & 0x7F80) == 0x7F80);
    place.put((group * kGroup + k) / 2, low | high << 16);
  }
  return bad;
}

Ints put_q8(const Tile& tile, const GroupPlace& place) {
  // Upwards, so that no code exceeds 127.
  const Halves halves = to_halves<kUp>(largest(tile) / 127.0f);
  const Floats scale = from_halves(halves);
  store(place.scales(2), halves);
  // The codes of a group of zeros and of one that fp16 cannot scale are zero.
  const Ints usable = (scale > 0.0f) & (scale < __builtin_inff());
  for (int j = 0; j < 8; ++j) {
    Ints codes[4];
    for (int b = 0; b < 4; ++b)
      codes[b] = to_int(from_bits(bits(tile.column(4 * j + b) / scale) & usable)) + 128;
    place.put(j, in_bytes(codes));
  }
  return ~(scale < __builtin_inff());
}

Ints put_q4(const Tile& tile, const float* v, const GroupPlace& place) {
  const Floats scale = q4_scale(tile, v);
  store(place.scales(2), to_halves<kNearest>(scale));
  for (int j = 0; j < 4; ++j) {
    Ints codes[8];
    for (int b = 0; b < 8; ++b) codes[b] = to_int(q4_code(tile.column(8 * j + b), scale)) + 8;
    place.put(j, in_nibbles(codes));
  }
  return ~(magnitude(scale) < __builtin_inff());
}

// The scale's exponent: the largest power of two not above the group's largest number, less e2m1's own
// largest exponent (OCP Microscaling Formats 1.0, 6.3), or one more where that makes the error smaller:
// numbers between 6 and 8 times the former scale are clipped, the latter halves the resolution.
Ints mxfp4_exponent(const Tile& tile, const float* v) {
  const Ints base = max((bits(largest(tile)) >> 23) - 127 - 2, all(-127));
  const Floats unscale = power_of_two(-base);
  Floats error = all(0.0f);  // of the first, less that of the second
  for (int k = 0; k < kGroup; ++k) {
    const Floats x = magnitude(tile.column(k)) * unscale;
    const Floats first = E2m1::value(min(x, all(kE2m1Max))) - x;
    const Floats second = 2.0f * E2m1::value(0.5f * x) - x;
    error += v[k] * (first * first - second * second);
  }
  return error > 0.0f ? base + 1 : base;
}

void put_mxfp4(const Tile& tile, const float* v, const GroupPlace& place) {
  const Ints exponent = mxfp4_exponent(tile, v);
  const Ints scale_byte = largest(tile) > 0.0f ? exponent + 127 : all(0);
  store(place.scales(1), __builtin_convertvector(scale_byte, Chars));
  const Floats unscale = power_of_two(-exponent);
  for (int j = 0; j < 4; ++j) {
    Ints codes[8];
    for (int b = 0; b < 8; ++b) {
      const Floats w = tile.column(8 * j + b);
      codes[b] = E2m1::code(min(magnitude(w) * unscale, all(kE2m1Max))) | sign_bit(w) << 3;
    }
    place.put(j, in_nibbles(codes));
  }
}

void put_fp8(const Tile& tile, int64_t group, int64_t count, float scale, const Place& place) {
  for (int64_t k = 0; k < count; k += 2) {
    Ints codes[2];
    for (int b = 0; b < 2; ++b) {
      const Floats w = tile.column(k + b);
      const Floats x = scale > 0 ? min(magnitude(w) / scale, all(kE4m3Max)) : all(0.0f);
      codes[b] = E4m3::code(x) | sign_bit(w) << 7;
    }
    place.put_pairs((group * kGroup + k) / 2, codes[0] | codes[1] << 8);
  }
}

Place place_of(const PanelTask& task, int64_t row) {
  return {task.out + row / kPanelRows * task.panel_stride, task.element_bytes, row % kPanelRows};
}

int64_t padded_rows(const PanelTask& task) { return (task.rows + kPanelRows - 1) / kPanelRows * kPanelRows; }

// The scales of 128 columns each, written into every panel of the task.
void put_fp8_scales(const PanelTask& task) {
  for (int64_t column = 0; column < task.columns; column += kBlock) {
    Floats most = all(0.0f);
    for (int64_t row = 0; row < task.rows; row += kLanes) {
      for (int64_t k = column; k < column + kBlock && k < task.columns; k += kGroup) {
        Tile tile;
        read_tile(task, row, k, tile);
        cleaned(tile);
        most = max(largest(tile), most);
      }
    }
    float scale = 0;
    for (int lane = 0; lane < kLanes; ++lane) scale = most[lane] > scale ? most[lane] : scale;
    scale /= kE4m3Max;
    for (int64_t row = 0; row < task.rows; row += kPanelRows) {
      store(place_of(task, row).panel + task.element_bytes + column / kBlock * 4, scale);
    }
  }
}

float fp8_scale(const Place& place, int64_t column) {
  float scale;
  __builtin_memcpy(&scale, place.panel + place.element_bytes + column / kBlock * 4, sizeof scale);
  return scale;
}

// One tile of a format with scales. Returns the lanes whose scale the format cannot hold.
Ints put_quantised(const PanelTask& task, const Tile& tile, int64_t column, const float* v,
                   const Place& place) {
  const int64_t group = column / kGroup;
  const int64_t left = task.columns - column;
  const int64_t elements = group_elements(task.format);
  const GroupPlace in_group{place.panel + group * (elements + group_scales(task.format)), elements,
                            place.lane};
  switch (task.format) {
    case HETCOMP_FORMAT_Q8:
      return put_q8(tile, in_group);
    case HETCOMP_FORMAT_Q4:
      return put_q4(tile, v, in_group);
    case HETCOMP_FORMAT_MXFP4:
      put_mxfp4(tile, v, in_group);
      return all(0);
    default:
      put_fp8(tile, group, left < kGroup ? left : kGroup, fp8_scale(place, column), place);
      return all(0);
  }
}

Ints put_tile(const PanelTask& task, Tile& tile, int64_t column, const Place& place) {
  const int64_t left = task.columns - column;
  const int64_t count = left < kGroup ? left : kGroup;
  if (task.format == HETCOMP_FORMAT_F32) return put_f32(tile, column / kGroup, count, place);
  if (task.format == HETCOMP_FORMAT_BF16) return put_bf16(tile, column / kGroup, count, place);
  float weights[kGroup];
  for (int64_t k = 0; k < kGroup; ++k)
    weights[k] = !task.importance ? 1 : k < left ? task.importance[column + k] : 0;
  const Ints bad = cleaned(tile);
  return bad | put_quantised(task, tile, column, weights, place);
}

}  // namespace

bool pack_panels(const PanelTask& task) {
  // What lies between the last number and the end of the elements or of the scales.
  for (int64_t row = 0; row < task.rows; row += kPanelRows) {
    __builtin_memset(place_of(task, row).panel, 0, task.panel_bytes);
  }
  if (task.format == HETCOMP_FORMAT_FP8) put_fp8_scales(task);
  Ints bad = all(0);
  for (int64_t row = 0; row < padded_rows(task); row += kLanes) {
    const Place place = place_of(task, row);
    for (int64_t column = 0; column < task.columns; column += kGroup) {
      Tile tile;
      read_tile(task, row, column, tile);
      bad |= put_tile(task, tile, column, place);
    }
  }
  return !any(bad);
}

}  // namespace hetcomp::quantise::HETCOMP_ISA

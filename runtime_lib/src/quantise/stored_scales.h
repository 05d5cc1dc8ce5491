// The scales of a row, whatever the file's encoding, as panels have them.
#pragma once

#include <cstdint>

#include "repack_task.h"
#include "row_encoding.h"

namespace hetcomp::quantise::HETCOMP_ISA {

template <class Number>
inline Number loaded(const uint8_t* p) {
  Number x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

// Scale `index` of those apart.
inline float number(const uint8_t* scales, int32_t type, int64_t index) {
  const uint8_t* at = scales + index * scale_bytes(type);
  switch (type) {
    case HETCOMP_SCALES_F16:
      return static_cast<float>(loaded<_Float16>(at));
    case HETCOMP_SCALES_BF16:
      return __builtin_bit_cast(float, static_cast<uint32_t>(loaded<uint16_t>(at)) << 16);
    case HETCOMP_SCALES_E8M0:
      // 2^(s - 127): 0 is the only one that is not normal, 255 is no number.
      if (*at == 255) return __builtin_nanf("");
      return __builtin_bit_cast(float, *at ? static_cast<uint32_t>(*at) << 23 : 0x00400000U);
    default:
      return loaded<float>(at);
  }
}

// Of a group of 32 columns: two bytes of fp16, in mxfp4 the e8m0 byte.
inline void put_scale(const RepackTask& task, int64_t row, int64_t column, uint8_t* out) {
  const int64_t group = column / kGroup;
  switch (task.encoding) {
    case HETCOMP_ROWS_Q8_0:
    case HETCOMP_ROWS_Q5_0:
    case HETCOMP_ROWS_Q4_0:
      __builtin_memcpy(out, task.rows[row] + group * row_encoding(task.encoding).block_bytes, 2);
      return;
    case HETCOMP_ROWS_MXFP4:
      *out = task.rows[row][group * row_encoding(task.encoding).block_bytes];
      return;
    default:
      break;
  }
  const int64_t index = column / task.scale_columns;
  if (task.scale_type == HETCOMP_SCALES_E8M0) {
    *out = task.scales[row][index];
    return;
  }
  const auto scale = static_cast<_Float16>(number(task.scales[row], task.scale_type, index));
  __builtin_memcpy(out, &scale, sizeof scale);
}

// In q4z, of the same group.
inline void put_zero(const RepackTask& task, int64_t row, int64_t column, uint8_t* out) {
  *out = task.scales[row][column / task.scale_columns * scale_bytes(task.scale_type) + 4];
}

// The fp16 numbers of the block of 256 columns that begins at `column`, each of all 16 rows behind the other.
inline void put_head(const RepackTask& task, int64_t row, int64_t column, uint8_t* out) {
  constexpr int64_t kBeside = 2 * kPanelRows;
  switch (task.encoding) {
    case HETCOMP_ROWS_Q4_K:
    case HETCOMP_ROWS_Q5_K: {
      const uint8_t* block = task.rows[row] + column / kKBlock * row_encoding(task.encoding).block_bytes;
      __builtin_memcpy(out, block, 2);
      __builtin_memcpy(out + kBeside, block + 2, 2);
      return;
    }
    case HETCOMP_ROWS_Q6_K:
      __builtin_memcpy(out, task.rows[row] + column / kKBlock * 210 + 208, 2);
      return;
    default:
      break;
  }
  const uint8_t* record =
      task.scales[row] + column / k_bytes(task.format).columns * scale_bytes(task.scale_type);
  __builtin_memcpy(out, record, 2);
  if (task.format != HETCOMP_FORMAT_Q6K) __builtin_memcpy(out + kBeside, record + 2, 2);
}

// The whole numbers of a K block's group that begins at `column`: its scale, but in q6k also its minimum.
inline void put_group_scales(const RepackTask& task, int64_t row, int64_t column, uint8_t* out) {
  if (task.encoding == HETCOMP_ROWS_Q6_K) {
    *out = task.rows[row][column / kKBlock * 210 + 192 + column % kKBlock / kQ6k.columns];
    return;
  }
  if (task.encoding == HETCOMP_ROWS_Q4_K || task.encoding == HETCOMP_ROWS_Q5_K) {
    // 6 bits each, as get_scale_min_k4 has them.
    const uint8_t* packed = task.rows[row] + column / kKBlock * row_encoding(task.encoding).block_bytes + 4;
    const int64_t j = column % kKBlock / kGroup;
    if (j < 4) {
      out[0] = packed[j] & 63;
      out[kPanelRows] = packed[j + 4] & 63;
    } else {
      out[0] = static_cast<uint8_t>((packed[j + 4] & 15) | (packed[j - 4] >> 2 & 48));
      out[kPanelRows] = static_cast<uint8_t>(packed[j + 4] >> 4 | (packed[j] >> 2 & 48));
    }
    return;
  }
  const bool minima = task.format != HETCOMP_FORMAT_Q6K;
  const uint8_t* record =
      task.scales[row] + column / k_bytes(task.format).columns * scale_bytes(task.scale_type);
  out[0] = record[minima ? 4 : 2];
  if (minima) out[kPanelRows] = record[5];
}

}  // namespace hetcomp::quantise::HETCOMP_ISA

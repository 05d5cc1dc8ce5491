// The codes of 32 columns of a row, whatever the file's encoding: a byte each, as those of the weight format
// (hetcomp/quantised_numbers.py). The blocks are those of ggml-common.h, read as ggml-quants.c does.
#pragma once

#include <cstdint>

#include "repack_task.h"
#include "row_encoding.h"

namespace hetcomp::quantise::HETCOMP_ISA {

inline uint32_t word(const uint8_t* p) {
  uint32_t x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

// `count` bytes: their low halves, then their high ones.
inline void halves(const uint8_t* packed, int count, uint8_t* codes) {
  for (int i = 0; i < count; ++i) {
    codes[i] = packed[i] & 15;
    codes[count + i] = packed[i] >> 4;
  }
}

inline void codes_q8_0(const uint8_t* block, uint8_t* codes) {
  for (int i = 0; i < kGroup; ++i) codes[i] = block[2 + i] ^ 128;
}

inline void codes_q5_0(const uint8_t* block, uint8_t* codes) {
  halves(block + 6, 16, codes);
  const uint32_t fifth = word(block + 2);
  for (int i = 0; i < kGroup; ++i)
    codes[i] = static_cast<uint8_t>((codes[i] | (fifth >> i & 1) << 4) + 128 - 16);
}

// Two groups of 32 share 32 bytes of `halves`.
inline void codes_q4_k(const uint8_t* halves, int64_t group, uint8_t* codes) {
  const uint8_t* packed = halves + group / 2 * 32;
  const int shift = group % 2 ? 4 : 0;
  for (int i = 0; i < kGroup; ++i) codes[i] = packed[i] >> shift & 15;
}

// As in Q4_K; the fifth bits of all groups' columns i are in byte i of those in front of the halves.
inline void codes_q5_k(const uint8_t* block, int64_t group, uint8_t* codes) {
  codes_q4_k(block + 48, group, codes);
  for (int i = 0; i < kGroup; ++i) codes[i] |= static_cast<uint8_t>((block[16 + i] >> group & 1) << 4);
}

// Of each half of a block, 128 columns: 64 bytes of low halves, 32 bytes with two high bits of four columns.
inline void codes_q6_k(const uint8_t* block, int64_t group, uint8_t* codes) {
  const int64_t half = group / 4, quarter = group % 4;
  const uint8_t* low = block + half * 64 + quarter % 2 * 32;
  const uint8_t* high = block + 128 + half * 32;
  const int shift = quarter / 2 ? 4 : 0;
  for (int i = 0; i < kGroup; ++i)
    codes[i] = static_cast<uint8_t>((low[i] >> shift & 15) | (high[i] >> 2 * quarter & 3) << 4);
}

class StoredCodes {
 public:
  explicit StoredCodes(const RepackTask& task) : task_(task), zero_(code_of_zero(task.format)) {}

  // Codes of zero where there is no such row or column.
  void read(int64_t row, int64_t column, uint8_t* codes) const {
    const int64_t left = task_.columns - column;
    if (row >= task_.row_count || left < kGroup) __builtin_memset(codes, zero_, kGroup);
    if (row < task_.row_count) read(task_.rows[row], column, left < kGroup ? left : kGroup, codes);
  }

 private:
  static constexpr uint8_t code_of_zero(int32_t format) {
    switch (format) {
      case HETCOMP_FORMAT_Q8:
        return 128;
      case HETCOMP_FORMAT_Q4:
        return 8;
      case HETCOMP_FORMAT_Q6K:
        return 32;
      default:
        return 0;
    }
  }

  void read(const uint8_t* row, int64_t column, int64_t count, uint8_t* codes) const {
    const int64_t group = column / kGroup;
    switch (task_.encoding) {
      case HETCOMP_ROWS_Q8_0:
        return codes_q8_0(row + group * 34, codes);
      case HETCOMP_ROWS_Q5_0:
        return codes_q5_0(row + group * 22, codes);
      case HETCOMP_ROWS_Q4_0:
        return halves(row + group * 18 + 2, 16, codes);
      case HETCOMP_ROWS_MXFP4:
        return halves(row + group * 17 + 1, 16, codes);
      case HETCOMP_ROWS_Q4_K:
        return codes_q4_k(row + column / kKBlock * 144 + 16, group % 8, codes);
      case HETCOMP_ROWS_Q5_K:
        return codes_q5_k(row + column / kKBlock * 176, group % 8, codes);
      case HETCOMP_ROWS_Q6_K:
        return codes_q6_k(row + column / kKBlock * 210, group % 8, codes);
      case HETCOMP_ROWS_NIBBLES:
        for (int64_t k = 0; k < count; ++k) codes[k] = row[(column + k) / 2] >> 4 * (k % 2) & 15;
        return;
      case HETCOMP_ROWS_INT8:
        for (int64_t k = 0; k < count; ++k) codes[k] = row[column + k] ^ 128;
        return;
      default:
        __builtin_memcpy(codes, row + column, static_cast<uint64_t>(count));
        return;
    }
  }

  const RepackTask& task_;
  uint8_t zero_;
};

}  // namespace hetcomp::quantise::HETCOMP_ISA

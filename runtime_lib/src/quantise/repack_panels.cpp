// Compiled once for each instruction set, with HETCOMP_ISA naming it; see lanes.h.
#include "repack_task.h"
#include "row_encoding.h"
#include "stored_codes.h"
#include "stored_scales.h"

namespace hetcomp::quantise::HETCOMP_ISA {
namespace {

// Eight codes of 4 bits: the first four in the low halves of a word's bytes, the others in the high halves.
uint32_t in_nibbles(const uint8_t* codes) {
  return (word(codes) & 0x0F0F0F0F) | (word(codes + 4) & 0x0F0F0F0F) << 4;
}

// The `bits` bits above the fourth of codes, a byte of them for each four columns apart: those of codes 4 s +
// b in bits `bits` * s and up of byte b.
uint32_t high_bits(const uint8_t* codes, int bits) {
  const uint32_t mask = bits == 1 ? 0x01010101 : 0x03030303;
  uint32_t all = 0;
  for (int s = 0; s < 8 / bits; ++s) all |= (word(codes + int64_t{4} * s) >> 4 & mask) << bits * s;
  return all;
}

void put_word(uint8_t* vector, int64_t row, uint32_t word) {
  __builtin_memcpy(vector + row * 4, &word, sizeof word);
}

// Groups of 32 columns, scales behind each: q8, q4, mxfp4; in q4z then zero points.
void put_groups(const RepackTask& task, const StoredCodes& stored) {
  const int64_t elements = group_elements(task.format);
  const bool zeros = task.format == HETCOMP_FORMAT_Q4Z;
  const int64_t bytes = group_scales(task.format) / kPanelRows - (zeros ? 1 : 0);
  uint8_t* group = task.out;
  for (int64_t column = 0; column < task.columns;
       column += kGroup, group += elements + group_scales(task.format)) {
    for (int64_t row = 0; row < kPanelRows; ++row) {
      uint8_t codes[kGroup];
      stored.read(row, column, codes);
      if (task.format == HETCOMP_FORMAT_Q8) {
        for (int64_t j = 0; j < 8; ++j) put_word(group + j * 64, row, word(codes + 4 * j));
      } else {
        for (int64_t j = 0; j < 4; ++j) put_word(group + j * 64, row, in_nibbles(codes + 8 * j));
      }
      if (row >= task.row_count) continue;
      put_scale(task, row, column, group + elements + row * bytes);
      if (zeros) put_zero(task, row, column, group + elements + bytes * kPanelRows + row);
    }
  }
}

void put_fp8(const RepackTask& task, const StoredCodes& stored) {
  for (int64_t column = 0; column < task.columns; column += kGroup) {
    const int64_t left = task.columns - column;
    const int64_t pairs = left < kGroup ? ceil_div(left, 2) : kGroup / 2;
    for (int64_t row = 0; row < kPanelRows; ++row) {
      uint8_t codes[kGroup];
      stored.read(row, column, codes);
      for (int64_t j = 0; j < pairs; ++j)
        __builtin_memcpy(task.out + (column / 2 + j) * 32 + row * 2, codes + 2 * j, 2);
    }
  }
  // The rows of a panel share them.
  for (int64_t column = 0; column < task.columns; column += kBlock) {
    const float scale = number(task.scales[0], task.scale_type, column / task.scale_columns);
    __builtin_memcpy(task.out + task.size.elements + column / kBlock * 4, &scale, sizeof scale);
  }
}

// Blocks of 256 columns: their fp16 numbers in front of the groups, scales behind each group.
void put_k_blocks(const RepackTask& task, const StoredCodes& stored) {
  const KBytes& bytes = k_bytes(task.format);
  const int high = task.format == HETCOMP_FORMAT_Q4K ? 0 : task.format == HETCOMP_FORMAT_Q5K ? 1 : 2;
  uint8_t* group = task.out;
  for (int64_t column = 0; column < task.columns; column += kGroup) {
    if (column % kKBlock == 0) {
      for (int64_t row = 0; row < task.row_count; ++row) put_head(task, row, column, group + row * 2);
      group += bytes.head;
    }
    for (int64_t row = 0; row < kPanelRows; ++row) {
      uint8_t codes[kGroup];
      stored.read(row, column, codes);
      uint8_t* at = group;
      for (int64_t first = 0; first < kGroup; first += bytes.columns, at += bytes.codes + bytes.scales) {
        for (int64_t j = 0; j < bytes.columns / 8; ++j)
          put_word(at + j * 64, row, in_nibbles(codes + first + 8 * j));
        if (high) put_word(at + bytes.columns / 8 * 64, row, high_bits(codes + first, high));
        if (row < task.row_count) put_group_scales(task, row, column + first, at + bytes.codes + row);
      }
    }
    group += kGroup / bytes.columns * (bytes.codes + bytes.scales);
  }
}

}  // namespace

void repack_panel(const RepackTask& task) {
  // What lies between the last group and the end of the panel, and scales of rows that there are not.
  __builtin_memset(task.out, 0, static_cast<uint64_t>(task.size.panel));
  const StoredCodes stored(task);
  switch (task.format) {
    case HETCOMP_FORMAT_FP8:
      return put_fp8(task, stored);
    case HETCOMP_FORMAT_Q4K:
    case HETCOMP_FORMAT_Q5K:
    case HETCOMP_FORMAT_Q6K:
      return put_k_blocks(task, stored);
    default:
      return put_groups(task, stored);
  }
}

}  // namespace hetcomp::quantise::HETCOMP_ISA

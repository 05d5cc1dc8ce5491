// How large a panel of 16 rows is in each weight format: the sizes of hetcomp/backends/packing.py.
#pragma once

#include <cstdint>

#include "panel_task.h"

namespace hetcomp::quantise {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t aligned(int64_t bytes) { return ceil_div(bytes, kAlignment) * kAlignment; }

// Columns that share fp16 numbers in the formats of K blocks.
constexpr int64_t kKBlock = 256;

// Bytes of 16 rows in a format of K blocks: the fp16 numbers in front of a block, and of a group of so many
// columns its codes, then its scales.
struct KBytes {
  int64_t head;
  int64_t columns;
  int64_t codes;
  int64_t scales;
};
constexpr KBytes kQ4k{64, 32, 256, 32};
constexpr KBytes kQ5k{64, 32, 320, 32};
constexpr KBytes kQ6k{32, 16, 192, 16};
constexpr const KBytes& k_bytes(int32_t format) {
  return format == HETCOMP_FORMAT_Q4K ? kQ4k : format == HETCOMP_FORMAT_Q5K ? kQ5k : kQ6k;
}

struct PanelSize {
  int64_t elements;  // bytes before the scales, where those lie behind all elements (fp8)
  int64_t panel;
};

constexpr int64_t k_panel(const KBytes& size, int64_t columns) {
  const int64_t groups = ceil_div(columns, kGroup) * (kGroup / size.columns);
  return aligned(groups * (size.codes + size.scales) + ceil_div(columns, kKBlock) * size.head);
}

constexpr PanelSize panel_size(int32_t format, int64_t columns) {
  const int64_t groups = ceil_div(columns, kGroup);
  const int64_t pairs = ceil_div(columns, 2);
  switch (format) {
    case HETCOMP_FORMAT_F32:
      return {columns * kPanelRows * 4, columns * kPanelRows * 4};
    case HETCOMP_FORMAT_BF16:
      return {pairs * kPanelRows * 4, pairs * kPanelRows * 4};
    case HETCOMP_FORMAT_FP8: {
      const int64_t elements = aligned(pairs * kPanelRows * 2);
      return {elements, aligned(elements + ceil_div(columns, kBlock) * 4)};
    }
    case HETCOMP_FORMAT_Q4K:
    case HETCOMP_FORMAT_Q5K:
    case HETCOMP_FORMAT_Q6K:
      return {0, k_panel(k_bytes(format), columns)};
    default:
      return {0, aligned(groups * (group_elements(format) + group_scales(format)))};
  }
}

// Bytes of a packed matrix; rows must be even if it has gate and up.
constexpr int64_t matrix_bytes(int32_t format, int64_t rows, int64_t columns, bool gate_up) {
  const int64_t halves = gate_up ? 2 : 1;
  return halves * ceil_div(rows / halves, kPanelRows) * panel_size(format, columns).panel;
}

}  // namespace hetcomp::quantise

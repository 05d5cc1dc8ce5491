// A run of panels that one thread packs, and the functions that do it for each instruction set.
#pragma once

#include <cstdint>

#include "quantise.h"

namespace hetcomp::quantise {

constexpr int64_t kPanelRows = 16;
constexpr int64_t kGroup = 32;   // columns that share a scale in q8, q4 and mxfp4
constexpr int64_t kBlock = 128;  // rows and columns that share a scale in fp8
constexpr int64_t kAlignment = 64;

// Bytes of the elements of a group of 32 columns, and of the scales behind them; 0 for formats without
// groups.
constexpr int64_t group_elements(int32_t format) {
  if (format == HETCOMP_FORMAT_Q8) return kGroup * kPanelRows;
  return format == HETCOMP_FORMAT_Q4 || format == HETCOMP_FORMAT_MXFP4 || format == HETCOMP_FORMAT_Q4Z
             ? kGroup * kPanelRows / 2
             : 0;
}
constexpr int64_t group_scales(int32_t format) {
  if (format == HETCOMP_FORMAT_MXFP4) return kPanelRows;
  if (format == HETCOMP_FORMAT_Q4Z) return 3 * kPanelRows;  // a byte of them the zero point
  return group_elements(format) ? 2 * kPanelRows : 0;
}

// Up to kBlock rows of one matrix and where their panels go.
struct PanelTask {
  const void* numbers;  // of the first row
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride;
  const float* importance;
  uint8_t* out;          // the first panel
  int64_t panel_stride;  // bytes from a panel to the next one of this task
  int64_t element_bytes;
  int64_t panel_bytes;
  int32_t number_type;
  int32_t format;
};

// Returns false if a number is NaN or infinite, or too large for the format or its scale.
using PackPanels = bool (*)(const PanelTask&);

namespace avx2 {
bool pack_panels(const PanelTask& task);
}
namespace avx512 {
bool pack_panels(const PanelTask& task);
}

}  // namespace hetcomp::quantise

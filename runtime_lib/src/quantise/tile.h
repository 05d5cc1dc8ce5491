// Reads a group of columns of some rows, whatever the numbers and their order, as one vector of rows a
// column.
#pragma once

#include "lanes.h"
#include "panel_task.h"

namespace hetcomp::quantise::HETCOMP_ISA {

// [column][row] in f32; zero beyond the matrix.
struct Tile {
  alignas(64) float numbers[kGroup * kLanes];
  Floats column(int64_t k) const { return load(numbers + k * kLanes); }
};

inline float widened(float x) { return x; }
inline float widened(_Float16 x) { return static_cast<float>(x); }
struct Bf16 {
  uint16_t raw;
};
inline float widened(Bf16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.raw) << 16); }

template <class Number>
void read_rows_along_columns(const Number* first, int64_t row_stride, Tile& tile) {
  float rows[kLanes][kGroup];
  for (int r = 0; r < kLanes; ++r) {
    for (int k = 0; k < kGroup; ++k) rows[r][k] = widened(first[r * row_stride + k]);
  }
  for (int k = 0; k < kGroup; ++k) {
    for (int r = 0; r < kLanes; ++r) tile.numbers[k * kLanes + r] = rows[r][k];
  }
}

template <class Number>
void read_columns_along_rows(const Number* first, int64_t column_stride, Tile& tile) {
  for (int k = 0; k < kGroup; ++k) {
    for (int r = 0; r < kLanes; ++r) {
      tile.numbers[k * kLanes + r] = widened(first[k * column_stride + r]);
    }
  }
}

template <class Number>
void read_numbers(const PanelTask& task, int64_t row, int64_t column, Tile& tile) {
  const auto* first =
      static_cast<const Number*>(task.numbers) + row * task.row_stride + column * task.column_stride;
  const int64_t rows = task.rows - row;
  const int64_t columns = task.columns - column;
  if (rows >= kLanes && columns >= kGroup) {
    if (task.column_stride == 1) return read_rows_along_columns(first, task.row_stride, tile);
    if (task.row_stride == 1) return read_columns_along_rows(first, task.column_stride, tile);
  }
  for (int k = 0; k < kGroup; ++k) {
    for (int r = 0; r < kLanes; ++r) {
      const bool inside = r < rows && k < columns;
      tile.numbers[k * kLanes + r] =
          inside ? widened(first[r * task.row_stride + k * task.column_stride]) : 0.0f;
    }
  }
}

inline void read_tile(const PanelTask& task, int64_t row, int64_t column, Tile& tile) {
  switch (task.number_type) {
    case HETCOMP_F32:
      return read_numbers<float>(task, row, column, tile);
    case HETCOMP_F16:
      return read_numbers<_Float16>(task, row, column, tile);
    default:
      return read_numbers<Bf16>(task, row, column, tile);
  }
}

}  // namespace hetcomp::quantise::HETCOMP_ISA

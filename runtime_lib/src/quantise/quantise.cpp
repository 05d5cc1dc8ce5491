#include "quantise.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "panel_size.h"
#include "panel_task.h"
#include "parallel.h"

namespace hetcomp::quantise {
namespace {

int64_t number_bytes(int32_t type) { return type == HETCOMP_F32 ? 4 : 2; }

// Splits a matrix, or each half of a gate-and-up matrix, into tasks of `rows_each` rows.
std::vector<PanelTask> split(const hetcomp_quantise_request& r, PanelSize size, int64_t rows_each) {
  std::vector<PanelTask> tasks;
  const int64_t halves = r.gate_up ? 2 : 1;
  const int64_t rows = r.rows / halves;
  const int64_t panel_bytes = size.panel;
  const auto* numbers = static_cast<const uint8_t*>(r.numbers);
  for (int64_t half = 0; half < halves; ++half) {
    for (int64_t first = 0; first < rows; first += rows_each) {
      PanelTask task{};
      task.numbers = numbers + (half * rows + first) * r.row_stride * number_bytes(r.number_type);
      task.rows = std::min(rows_each, rows - first);
      task.columns = r.columns;
      task.row_stride = r.row_stride;
      task.column_stride = r.column_stride;
      task.importance = r.importance;
      task.out = r.out + (first / kPanelRows * halves + half) * panel_bytes;
      task.panel_stride = halves * panel_bytes;
      task.element_bytes = size.elements;
      task.panel_bytes = panel_bytes;
      task.number_type = r.number_type;
      task.format = r.format;
      tasks.push_back(task);
    }
  }
  return tasks;
}

bool valid(const hetcomp_quantise_request& r) {
  if (!r.numbers || !r.out || r.rows < 1 || r.columns < 1 || r.threads < 1) return false;
  if (r.number_type < HETCOMP_F32 || r.number_type > HETCOMP_BF16) return false;
  if (r.format < HETCOMP_FORMAT_F32 || r.format > HETCOMP_FORMAT_MXFP4) return false;
  if (r.gate_up && r.rows % 2) return false;
  return r.out_bytes == matrix_bytes(r.format, r.rows, r.columns, r.gate_up);
}

}  // namespace

int32_t quantise(const hetcomp_quantise_request& request) {
  static const PackPanels pack_panels = best_for_this_cpu(avx512::pack_panels, avx2::pack_panels);
  if (!valid(request)) return HETCOMP_QUANTISE_BAD_REQUEST;
  if (!pack_panels) return HETCOMP_QUANTISE_OLD_CPU;
  const PanelSize size = panel_size(request.format, request.columns);
  const int64_t rows_each = request.format == HETCOMP_FORMAT_FP8 ? kBlock : kPanelRows;
  const std::vector<PanelTask> tasks = split(request, size, rows_each);
  std::atomic<bool> finite{true};
  in_parallel(tasks.size(), request.threads, [&](std::size_t i) {
    if (!pack_panels(tasks[i])) finite = false;
  });
  return finite ? HETCOMP_QUANTISE_OK : HETCOMP_QUANTISE_NOT_FINITE;
}

}  // namespace hetcomp::quantise

#include "quantise.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "panel_task.h"

namespace hetcomp::quantise {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t aligned(int64_t bytes) { return ceil_div(bytes, kAlignment) * kAlignment; }

struct PanelSize {
  int64_t elements;  // bytes before the scales, where those lie behind all elements (fp8)
  int64_t panel;
};

// The same sizes as hetcomp/backends/packing.py; a request that disagrees is refused.
PanelSize panel_size(int32_t format, int64_t columns) {
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
    default:
      return {0, aligned(groups * (group_elements(format) + group_scales(format)))};
  }
}

// What pack_panels.cpp is compiled for: x86-64-v4 and v3.
PackPanels best_for_this_cpu() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return avx512::pack_panels;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2")) {
    return avx2::pack_panels;
  }
  return nullptr;
}

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
  const int64_t halves = r.gate_up ? 2 : 1;
  const PanelSize size = panel_size(r.format, r.columns);
  return r.out_bytes == halves * ceil_div(r.rows / halves, kPanelRows) * size.panel;
}

// False if the system has no more threads: those that run then do the work.
template <class Work>
bool started(std::vector<std::jthread>& threads, const Work& work) {
  try {
    threads.emplace_back(work);
    return true;
  } catch (const std::system_error&) {
    return false;
  }
}

int32_t run(const hetcomp_quantise_request& request) {
  static const PackPanels pack_panels = best_for_this_cpu();
  if (!pack_panels) return HETCOMP_QUANTISE_OLD_CPU;
  const PanelSize size = panel_size(request.format, request.columns);
  const int64_t rows_each = request.format == HETCOMP_FORMAT_FP8 ? kBlock : kPanelRows;
  const std::vector<PanelTask> tasks = split(request, size, rows_each);
  std::atomic<size_t> next{0};
  std::atomic<bool> finite{true};
  const auto work = [&] {
    for (size_t i = next++; i < tasks.size(); i = next++) {
      if (!pack_panels(tasks[i])) finite = false;
    }
  };
  {
    std::vector<std::jthread> others;
    const size_t threads = std::min<size_t>(request.threads, tasks.size());
    for (size_t i = 1; i < threads && started(others, work); ++i) {
    }
    work();
  }
  return finite ? HETCOMP_QUANTISE_OK : HETCOMP_QUANTISE_NOT_FINITE;
}

}  // namespace
}  // namespace hetcomp::quantise

int32_t hetcomp_quantise(const hetcomp_quantise_request* request) {
  if (!request || !hetcomp::quantise::valid(*request)) return HETCOMP_QUANTISE_BAD_REQUEST;
  try {
    return hetcomp::quantise::run(*request);
  } catch (const std::bad_alloc&) {
    return HETCOMP_QUANTISE_NO_MEMORY;
  }
}

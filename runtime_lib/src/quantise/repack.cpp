#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "quantise.h"
#include "repack_task.h"
#include "row_encoding.h"

namespace hetcomp::quantise {
namespace {

bool valid(const hetcomp_repack_request& r) {
  if (!r.rows || !r.out || r.row_count < 1 || r.columns < 1 || r.threads < 1) return false;
  if (!goes_into(r.encoding, r.scale_type, r.format)) return false;
  const RowEncoding encoding = row_encoding(r.encoding);
  if (encoding.scales_apart != (r.scales != nullptr) || (encoding.scales_apart && r.scale_columns < 1))
    return false;
  if (!encoding.scales_apart && r.columns % encoding.block_columns != 0) return false;
  if (r.gate_up && r.row_count % 2) return false;
  return r.out_bytes == matrix_bytes(r.format, r.row_count, r.columns, r.gate_up);
}

}  // namespace

int32_t repack(const hetcomp_repack_request& request) {
  static const RepackPanel repack_panel = best_for_this_cpu(avx512::repack_panel, avx2::repack_panel);
  if (!valid(request)) return HETCOMP_QUANTISE_BAD_REQUEST;
  if (!repack_panel) return HETCOMP_QUANTISE_OLD_CPU;
  const int64_t halves = request.gate_up ? 2 : 1;
  const int64_t rows = request.row_count / halves;
  const PanelSize size = panel_size(request.format, request.columns);
  const auto panels = static_cast<std::size_t>(halves * ceil_div(rows, kPanelRows));
  in_parallel(panels, request.threads, [&](std::size_t i) {
    const auto panel = static_cast<int64_t>(i);
    const int64_t in_half = panel / halves * kPanelRows;
    const int64_t first = panel % halves * rows + in_half;
    repack_panel({request.rows + first, request.scales ? request.scales + first : nullptr,
                  std::min(kPanelRows, rows - in_half), request.columns, request.scale_columns,
                  request.out + panel * size.panel, size, request.encoding, request.scale_type,
                  request.format});
  });
  return HETCOMP_QUANTISE_OK;
}

}  // namespace hetcomp::quantise

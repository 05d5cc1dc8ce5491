// A panel of rows that are taken over as they are, and the functions that write it for each instruction set.
#pragma once

#include <cstdint>

#include "panel_size.h"

namespace hetcomp::quantise {

struct RepackTask {
  const uint8_t* const* rows;
  const uint8_t* const* scales;  // null: none apart
  int64_t row_count;             // at most 16
  int64_t columns;
  int64_t scale_columns;
  uint8_t* out;
  PanelSize size;
  int32_t encoding;
  int32_t scale_type;
  int32_t format;
};

using RepackPanel = void (*)(const RepackTask&);

namespace avx2 {
void repack_panel(const RepackTask& task);
}
namespace avx512 {
void repack_panel(const RepackTask& task);
}

}  // namespace hetcomp::quantise

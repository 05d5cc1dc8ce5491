// How files have the numbers of a row that weight formats take over as they are.
#pragma once

#include <cstdint>

#include "quantise.h"

namespace hetcomp::quantise {

// Columns of a block of a row, and its bytes. Scales: apart from the codes, in a row of their own.
struct RowEncoding {
  int64_t block_columns;
  int64_t block_bytes;
  bool scales_apart;
};

// The blocks are those of ggml-common.h.
constexpr RowEncoding row_encoding(int32_t encoding) {
  switch (encoding) {
    case HETCOMP_ROWS_Q8_0:
      return {32, 34, false};
    case HETCOMP_ROWS_Q5_0:
      return {32, 22, false};
    case HETCOMP_ROWS_Q4_0:
      return {32, 18, false};
    case HETCOMP_ROWS_MXFP4:
      return {32, 17, false};
    case HETCOMP_ROWS_Q4_K:
      return {256, 144, false};
    case HETCOMP_ROWS_Q5_K:
      return {256, 176, false};
    case HETCOMP_ROWS_Q6_K:
      return {256, 210, false};
    case HETCOMP_ROWS_NIBBLES:
      return {2, 1, true};
    default:
      return {1, 1, true};
  }
}

// Bytes of a scale of those apart.
constexpr int64_t scale_bytes(int32_t type) {
  switch (type) {
    case HETCOMP_SCALES_F32:
      return 4;
    case HETCOMP_SCALES_F16:
    case HETCOMP_SCALES_BF16:
      return 2;
    case HETCOMP_SCALES_WITH_MINIMA:
      return 6;
    case HETCOMP_SCALES_WITH_ZEROS:
      return 5;
    case HETCOMP_SCALES_Q6K:
      return 3;
    default:
      return 1;
  }
}

// Whether rows of the encoding can be taken over into the weight format. Scales apart must be of a type that
// the format has a place for.
constexpr bool goes_into(int32_t encoding, int32_t scales, int32_t format) {
  const bool numbers =
      scales == HETCOMP_SCALES_F32 || scales == HETCOMP_SCALES_F16 || scales == HETCOMP_SCALES_BF16;
  switch (encoding) {
    case HETCOMP_ROWS_Q8_0:
    case HETCOMP_ROWS_Q5_0:
      return format == HETCOMP_FORMAT_Q8;
    case HETCOMP_ROWS_Q4_0:
      return format == HETCOMP_FORMAT_Q4;
    case HETCOMP_ROWS_MXFP4:
      return format == HETCOMP_FORMAT_MXFP4;
    case HETCOMP_ROWS_Q4_K:
      return format == HETCOMP_FORMAT_Q4K;
    case HETCOMP_ROWS_Q5_K:
      return format == HETCOMP_FORMAT_Q5K;
    case HETCOMP_ROWS_Q6_K:
      return format == HETCOMP_FORMAT_Q6K;
    case HETCOMP_ROWS_INT8:
      return format == HETCOMP_FORMAT_Q8 && numbers;
    case HETCOMP_ROWS_NIBBLES:
      return (format == HETCOMP_FORMAT_Q4 && numbers) ||
             (format == HETCOMP_FORMAT_MXFP4 && scales == HETCOMP_SCALES_E8M0);
    case HETCOMP_ROWS_CODES:
      switch (format) {
        case HETCOMP_FORMAT_Q8:
        case HETCOMP_FORMAT_Q4:
          return numbers;
        case HETCOMP_FORMAT_FP8:
          return numbers || scales == HETCOMP_SCALES_E8M0;
        case HETCOMP_FORMAT_MXFP4:
          return scales == HETCOMP_SCALES_E8M0;
        case HETCOMP_FORMAT_Q4Z:
          return scales == HETCOMP_SCALES_WITH_ZEROS;
        case HETCOMP_FORMAT_Q4K:
        case HETCOMP_FORMAT_Q5K:
          return scales == HETCOMP_SCALES_WITH_MINIMA;
        case HETCOMP_FORMAT_Q6K:
          return scales == HETCOMP_SCALES_Q6K;
        default:
          return false;
      }
    default:
      return false;
  }
}

}  // namespace hetcomp::quantise

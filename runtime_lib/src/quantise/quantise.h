// C ABI of libhetcomp_quantise.so: packs a weight matrix into the panels of hetcomp/backends/packing.py when
// compiling. Not part of an artifact.
#pragma once

#include <cstdint>

extern "C" {

enum hetcomp_number_type : int32_t { HETCOMP_F32 = 0, HETCOMP_F16 = 1, HETCOMP_BF16 = 2 };

enum hetcomp_weight_format : int32_t {
  HETCOMP_FORMAT_F32 = 0,
  HETCOMP_FORMAT_BF16 = 1,
  HETCOMP_FORMAT_Q8 = 2,
  HETCOMP_FORMAT_FP8 = 3,
  HETCOMP_FORMAT_Q4 = 4,
  HETCOMP_FORMAT_MXFP4 = 5,
};

enum hetcomp_quantise_status : int32_t {
  HETCOMP_QUANTISE_OK = 0,
  // Packed, but a number is NaN or infinite, or too large for the format or its scale.
  HETCOMP_QUANTISE_NOT_FINITE = 1,
  HETCOMP_QUANTISE_BAD_REQUEST = -1,
  HETCOMP_QUANTISE_OLD_CPU = -2,  // lacks x86-64-v3
  HETCOMP_QUANTISE_NO_MEMORY = -3,
};

// A matrix [rows, columns] and how to pack it. Strides count numbers, not bytes.
struct hetcomp_quantise_request {
  const void* numbers;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride;
  const float* importance;  // [columns], not negative; null: all columns weigh the same
  uint8_t* out;
  int64_t out_bytes;    // must be what the layout needs
  int32_t number_type;  // hetcomp_number_type
  int32_t format;       // hetcomp_weight_format
  int32_t gate_up;      // 1: layout panels16_glu, 0: panels16
  int32_t threads;      // at least 1
};

// Returns a hetcomp_quantise_status. Nothing is kept; calls from several threads do not disturb each other.
__attribute__((visibility("default"))) int32_t hetcomp_quantise(const hetcomp_quantise_request* request);
}

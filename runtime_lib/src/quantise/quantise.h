// Packs weight matrices into the panels of hetcomp/backends/packing.py: numbers, and codes and scales that
// are taken over as they are. The C ABI of libhetcomp_quantise.so, which compiling uses; the runtime has the
// same code for weights that it takes out of other files (src/stored_weight.cpp).
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
  // Only taken over.
  HETCOMP_FORMAT_Q4K = 6,
  HETCOMP_FORMAT_Q6K = 7,
  HETCOMP_FORMAT_Q5K = 8,
  HETCOMP_FORMAT_Q4Z = 9,
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

// How the codes of a row are stored.
enum hetcomp_row_encoding : int32_t {
  HETCOMP_ROWS_CODES = 0,    // those of the weight format, a byte each; scales apart
  HETCOMP_ROWS_NIBBLES = 1,  // the same, two a byte, the low half first; scales apart
  HETCOMP_ROWS_INT8 = 2,     // signed whole numbers; scales apart
  // Blocks of GGUF files, scales included.
  HETCOMP_ROWS_Q8_0 = 3,
  HETCOMP_ROWS_Q5_0 = 4,
  HETCOMP_ROWS_Q4_0 = 5,
  HETCOMP_ROWS_MXFP4 = 6,
  HETCOMP_ROWS_Q4_K = 7,
  HETCOMP_ROWS_Q6_K = 8,
  HETCOMP_ROWS_Q5_K = 9,
};

// How scales that lie apart are stored. The last three: the records K_SCALES (of q4k and q5k; of q6k) and
// ZERO_POINTS of hetcomp/quantised_numbers.py.
enum hetcomp_scale_type : int32_t {
  HETCOMP_SCALES_NONE = 0,
  HETCOMP_SCALES_F32 = 1,
  HETCOMP_SCALES_F16 = 2,
  HETCOMP_SCALES_BF16 = 3,
  HETCOMP_SCALES_E8M0 = 4,
  HETCOMP_SCALES_WITH_MINIMA = 5,
  HETCOMP_SCALES_Q6K = 6,
  HETCOMP_SCALES_WITH_ZEROS = 7,
};

// Rows of codes, anywhere in memory, and the panels that they become.
struct hetcomp_repack_request {
  const uint8_t* const* rows;    // of each row its codes
  const uint8_t* const* scales;  // and its scales; null where the codes have theirs among them
  int64_t row_count;
  int64_t columns;
  int64_t scale_columns;  // that share one of the scales apart
  uint8_t* out;
  int64_t out_bytes;   // must be what the layout needs
  int32_t encoding;    // hetcomp_row_encoding
  int32_t scale_type;  // hetcomp_scale_type
  int32_t format;      // hetcomp_weight_format
  int32_t gate_up;     // 1: layout panels16_glu, 0: panels16
  int32_t threads;     // at least 1
};

// Return a hetcomp_quantise_status. Nothing is kept; calls from several threads do not disturb each other. Of
// what is taken over nobody looks whether it is finite.
__attribute__((visibility("default"))) int32_t hetcomp_quantise(const hetcomp_quantise_request* request);
__attribute__((visibility("default"))) int32_t hetcomp_repack(const hetcomp_repack_request* request);
}

namespace hetcomp::quantise {

// The same within the runtime, which exports none of it. Throw std::bad_alloc.
int32_t quantise(const hetcomp_quantise_request& request);
int32_t repack(const hetcomp_repack_request& request);

}  // namespace hetcomp::quantise

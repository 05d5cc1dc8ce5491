// The quantiser's instruction sets against each other, and requests it must refuse. What the bytes mean is
// tested from Python (tests/unit/test_packing.py, test_quantising.py).
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "quantise/panel_task.h"
#include "quantise/quantise.h"
#include "quantise/repack_task.h"
#include "quantise/row_encoding.h"

namespace {

using hetcomp::quantise::PanelTask;

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

TEST(Quantise, BothInstructionSetsGiveTheSameBytes) {
  if (!has_avx512()) GTEST_SKIP() << "this CPU has no AVX-512";
  constexpr int64_t kRows = 77;
  constexpr int64_t kColumns = 171;
  std::mt19937 random(1);
  std::student_t_distribution<float> heavy(3.0f);
  std::vector<float> numbers(kRows * kColumns);
  for (float& x : numbers) x = heavy(random);
  std::vector<float> importance(kColumns);
  for (float& x : importance) x = std::abs(heavy(random));
  for (int32_t format = HETCOMP_FORMAT_F32; format <= HETCOMP_FORMAT_MXFP4; ++format) {
    PanelTask task{};
    task.numbers = numbers.data();
    task.rows = kRows;
    task.columns = kColumns;
    task.row_stride = kColumns;
    task.column_stride = 1;
    task.importance = importance.data();
    // Ample for every format; only that it is the same for both matters here.
    task.element_bytes = kColumns * 64 + 64;
    task.panel_bytes = 2 * task.element_bytes;
    task.panel_stride = task.panel_bytes;
    task.number_type = HETCOMP_F32;
    task.format = format;
    std::vector<uint8_t> narrow(task.panel_bytes * 5, 1);
    std::vector<uint8_t> wide(task.panel_bytes * 5, 2);
    task.out = narrow.data();
    EXPECT_TRUE(hetcomp::quantise::avx2::pack_panels(task));
    task.out = wide.data();
    EXPECT_TRUE(hetcomp::quantise::avx512::pack_panels(task));
    EXPECT_EQ(narrow, wide) << "format " << format;
  }
}

class QuantiseRequest : public ::testing::Test {
 protected:
  QuantiseRequest() : numbers_(16 * 32, 1.0f), out_(16 * 32 * 4) {
    request_.numbers = numbers_.data();
    request_.rows = 16;
    request_.columns = 32;
    request_.row_stride = 32;
    request_.column_stride = 1;
    request_.out = out_.data();
    request_.out_bytes = static_cast<int64_t>(out_.size());
    request_.threads = 1;
  }
  std::vector<float> numbers_;
  std::vector<uint8_t> out_;
  hetcomp_quantise_request request_{};
};

TEST_F(QuantiseRequest, IsServed) { EXPECT_EQ(hetcomp_quantise(&request_), HETCOMP_QUANTISE_OK); }

TEST_F(QuantiseRequest, ReportsWhatIsNotFinite) {
  numbers_[100] = std::nanf("");
  EXPECT_EQ(hetcomp_quantise(&request_), HETCOMP_QUANTISE_NOT_FINITE);
}

TEST_F(QuantiseRequest, IsRefusedIfItDoesNotFit) {
  EXPECT_EQ(hetcomp_quantise(nullptr), HETCOMP_QUANTISE_BAD_REQUEST);
  const auto refused = [&](auto change) {
    hetcomp_quantise_request changed = request_;
    change(changed);
    return hetcomp_quantise(&changed) == HETCOMP_QUANTISE_BAD_REQUEST;
  };
  EXPECT_TRUE(refused([](auto& r) { r.numbers = nullptr; }));
  EXPECT_TRUE(refused([](auto& r) { r.out = nullptr; }));
  EXPECT_TRUE(refused([](auto& r) { r.rows = 0; }));
  EXPECT_TRUE(refused([](auto& r) { r.rows = 17; }));  // needs a second panel
  EXPECT_TRUE(refused([](auto& r) { r.columns = -1; }));
  EXPECT_TRUE(refused([](auto& r) { r.threads = 0; }));
  EXPECT_TRUE(refused([](auto& r) { r.format = 6; }));
  EXPECT_TRUE(refused([](auto& r) { r.number_type = 3; }));
  EXPECT_TRUE(refused([](auto& r) { r.format = HETCOMP_FORMAT_Q4; }));  // needs fewer bytes
  EXPECT_TRUE(refused([](auto& r) {
    r.gate_up = 1;
    r.rows = 15;
  }));
}

struct Taken {
  int32_t encoding;
  int32_t scale_type;
  int32_t format;
};
constexpr Taken kTaken[] = {{HETCOMP_ROWS_Q8_0, HETCOMP_SCALES_NONE, HETCOMP_FORMAT_Q8},
                            {HETCOMP_ROWS_Q5_0, HETCOMP_SCALES_NONE, HETCOMP_FORMAT_Q8},
                            {HETCOMP_ROWS_Q4_0, HETCOMP_SCALES_NONE, HETCOMP_FORMAT_Q4},
                            {HETCOMP_ROWS_MXFP4, HETCOMP_SCALES_NONE, HETCOMP_FORMAT_MXFP4},
                            {HETCOMP_ROWS_Q4_K, HETCOMP_SCALES_NONE, HETCOMP_FORMAT_Q4K},
                            {HETCOMP_ROWS_Q6_K, HETCOMP_SCALES_NONE, HETCOMP_FORMAT_Q6K},
                            {HETCOMP_ROWS_NIBBLES, HETCOMP_SCALES_BF16, HETCOMP_FORMAT_Q4},
                            {HETCOMP_ROWS_INT8, HETCOMP_SCALES_F16, HETCOMP_FORMAT_Q8},
                            {HETCOMP_ROWS_CODES, HETCOMP_SCALES_E8M0, HETCOMP_FORMAT_FP8}};

// Rows of random bytes of one of them.
class Repacked : public ::testing::TestWithParam<Taken> {
 protected:
  static constexpr int64_t kRows = 13;
  static constexpr int64_t kColumns = 512;
  static constexpr int64_t kRowBytes = 544;  // of Q8_0, the longest

  Repacked() : codes_(kRows * kRowBytes), scales_(kRows * kRowBytes) {
    std::mt19937 random(3);
    for (uint8_t& byte : codes_) byte = static_cast<uint8_t>(random() % 120);
    for (uint8_t& byte : scales_) byte = static_cast<uint8_t>(random() % 120);
    for (int64_t row = 0; row < kRows; ++row) {
      code_rows_.push_back(codes_.data() + row * kRowBytes);
      scale_rows_.push_back(scales_.data() + row * kRowBytes);
    }
  }

  hetcomp_repack_request request(std::vector<uint8_t>& out) const {
    const Taken& taken = GetParam();
    out.resize(hetcomp::quantise::matrix_bytes(taken.format, kRows, kColumns, false));
    const bool apart = taken.scale_type != HETCOMP_SCALES_NONE;
    return {code_rows_.data(),
            apart ? scale_rows_.data() : nullptr,
            kRows,
            kColumns,
            apart ? 128 : 0,
            out.data(),
            static_cast<int64_t>(out.size()),
            taken.encoding,
            taken.scale_type,
            taken.format,
            0,
            2};
  }

  std::vector<uint8_t> codes_, scales_;
  std::vector<const uint8_t*> code_rows_, scale_rows_;
};

TEST_P(Repacked, BothInstructionSetsGiveTheSameBytes) {
  if (!has_avx512()) GTEST_SKIP() << "this CPU has no AVX-512";
  std::vector<uint8_t> narrow,
      wide(hetcomp::quantise::matrix_bytes(GetParam().format, kRows, kColumns, false));
  const hetcomp_repack_request r = request(narrow);
  hetcomp::quantise::RepackTask task{r.rows,
                                     r.scales,
                                     kRows,
                                     kColumns,
                                     r.scale_columns,
                                     r.out,
                                     hetcomp::quantise::panel_size(r.format, kColumns),
                                     r.encoding,
                                     r.scale_type,
                                     r.format};
  hetcomp::quantise::avx2::repack_panel(task);
  task.out = wide.data();
  hetcomp::quantise::avx512::repack_panel(task);
  EXPECT_EQ(narrow, wide);
  EXPECT_EQ(hetcomp_repack(&r), HETCOMP_QUANTISE_OK);
  EXPECT_EQ(narrow, wide);
}

TEST_P(Repacked, WhatDoesNotFitIsRefused) {
  EXPECT_EQ(hetcomp_repack(nullptr), HETCOMP_QUANTISE_BAD_REQUEST);
  std::vector<uint8_t> out;
  const hetcomp_repack_request good = request(out);
  const auto refused = [&](auto change) {
    hetcomp_repack_request changed = good;
    change(changed);
    return hetcomp_repack(&changed) == HETCOMP_QUANTISE_BAD_REQUEST;
  };
  EXPECT_FALSE(refused([](auto&) {}));
  EXPECT_TRUE(refused([](auto& r) { r.rows = nullptr; }));
  EXPECT_TRUE(refused([](auto& r) { r.scales = r.scales ? nullptr : r.rows; }));
  EXPECT_TRUE(refused([](auto& r) { r.row_count = 17; }));  // a second panel
  EXPECT_TRUE(refused([](auto& r) { r.columns = 0; }));
  EXPECT_TRUE(refused([](auto& r) { r.format = HETCOMP_FORMAT_BF16; }));
  EXPECT_TRUE(refused([](auto& r) { r.encoding = 9; }));
  EXPECT_TRUE(refused([](auto& r) { r.out_bytes -= 64; }));
  EXPECT_TRUE(refused([](auto& r) { r.gate_up = 1; }));  // 13 rows
  EXPECT_TRUE(refused([](auto& r) { r.threads = 0; }));
}

INSTANTIATE_TEST_SUITE_P(AllEncodings, Repacked, ::testing::ValuesIn(kTaken));

}  // namespace

// The quantiser's instruction sets against each other, and requests it must refuse. What the bytes mean is
// tested from Python (tests/unit/test_packing.py, test_quantising.py).
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "quantise/panel_task.h"
#include "quantise/quantise.h"

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

}  // namespace

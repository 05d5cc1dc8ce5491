// The matrix product: checked against the CPU on small operands, then timed on large ones.
#pragma once

#include <cstring>

#include "gpu_probe_ptx.h"
#include "gpu_probe_session.h"

namespace gpu_probe {

class MatrixProduct {
 public:
  MatrixProduct(const Session& session, bool int8, GemmShape shape)
      : session_(session), int8_(int8), shape_(shape), module_(session, GemmPtx(int8, shape).text()) {
    function_ = module_.function("gemm");
    session.cuda.cuFuncSetAttribute(function_, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                    shape.shared_bytes());
  }

  // ||C - reference|| / ||reference|| on fresh random operands; throws Failure if it is too large.
  double check() {
    const int rows = 2 * shape_.rows(), columns = 2 * shape_.columns(), depth = 512;
    const std::size_t a_bytes = bytes(rows, depth), b_bytes = bytes(columns, depth);
    const PinnedMemory host(session_, a_bytes + b_bytes + std::size_t(rows) * columns * 4);
    auto* a = static_cast<std::uint8_t*>(host.at);
    auto* c = a + a_bytes + b_bytes;
    randomize(a, a_bytes + b_bytes, static_cast<std::uint64_t>(now() * 1e6) | 1);
    const DeviceMemory operands(session_, a_bytes + b_bytes),
        result(session_, std::size_t(rows) * columns * 4);
    session_.cuda.cuMemcpyHtoDAsync(operands.at, a, a_bytes + b_bytes, session_.stream);
    session_.cuda.cuMemsetD32Async(result.at, 0xffffffff, std::size_t(rows) * columns, session_.stream);
    multiply(operands.at, operands.at + a_bytes, result.at, rows, columns, depth);
    session_.cuda.cuMemcpyDtoHAsync(c, result.at, std::size_t(rows) * columns * 4, session_.stream);
    session_.wait();
    const double error =
        distance(widened(a, rows * depth), widened(a + a_bytes, columns * depth), c, rows, columns);
    if (!(error <= (int8_ ? 0 : 1e-4)))
      throw Failure(std::string(int8_ ? "int8" : "bf16") + " products are wrong on this GPU (error " +
                    std::to_string(error) + "); no rate is given.");
    return error;
  }

  // 10^12 operations a second of `repeats` runs of a product of up to 8192 x 4096 x 4096 (int8: twice as
  // deep), each the mean of a few in a row.
  std::vector<double> rates(int repeats) {
    int rows = 8192;
    const int columns = 4096, depth = int8_ ? 8192 : 4096;
    const auto needed = [&] { return bytes(rows + columns, depth) + std::size_t(rows) * columns * 4; };
    const std::size_t free = session_.free_bytes();
    while (rows > shape_.rows() && needed() > free / 2) rows /= 2;
    if (needed() > free / 2) throw Failure("Too little GPU memory is free for a matrix product.");
    const std::size_t block = std::min<std::size_t>(bytes(columns, depth), 8 << 20);
    const PinnedMemory random(session_, block);
    randomize(static_cast<std::uint8_t*>(random.at), block, 88172645463325252ull);
    const DeviceMemory operands(session_, bytes(rows + columns, depth)),
        result(session_, std::size_t(rows) * columns * 4);
    for (std::size_t at = 0; at < bytes(rows + columns, depth); at += block)
      session_.cuda.cuMemcpyHtoDAsync(operands.at + at, random.at,
                                      std::min(block, bytes(rows + columns, depth) - at), session_.stream);
    constexpr int kInARow = 4;
    const double operations = 2.0 * rows * columns * depth * kInARow;
    std::vector<double> rates;
    for (int i = 0; i <= repeats; ++i) {  // the first warms up
      const double us = session_.microseconds([&] {
        for (int j = 0; j < kInARow; ++j)
          multiply(operands.at, operands.at + bytes(rows, depth), result.at, rows, columns, depth);
      });
      if (i) rates.push_back(operations / us * 1e-6);
    }
    return rates;
  }

 private:
  std::size_t bytes(int rows, int depth) const { return std::size_t(rows) * depth * (int8_ ? 1 : 2); }

  void multiply(CUdeviceptr a, CUdeviceptr b, CUdeviceptr c, int rows, int columns, int depth) {
    auto depth_bytes = static_cast<unsigned>(bytes(1, depth)), width = static_cast<unsigned>(columns);
    void* arguments[] = {&a, &b, &c, &depth_bytes, &width};
    session_.launch(function_, width / static_cast<unsigned>(shape_.columns()),
                    static_cast<unsigned>(rows / shape_.rows()), static_cast<unsigned>(shape_.threads()),
                    shape_.shared_bytes(), arguments);
  }

  // Random bytes; as bf16 numbers of magnitude 1/8 to 2.
  void randomize(std::uint8_t* p, std::size_t count, std::uint64_t state) const {
    for (std::size_t i = 0; i + 8 <= count; i += 8) {
      state ^= state << 13;
      state ^= state >> 7;
      state ^= state << 17;
      std::uint64_t word = state;
      if (!int8_) word = (word & 0x81ff81ff81ff81ffull) + 0x3e003e003e003e00ull;
      std::memcpy(p + i, &word, 8);
    }
  }

  std::vector<float> widened(const std::uint8_t* p, int count) const {
    std::vector<float> numbers(static_cast<std::size_t>(count));
    for (std::size_t i = 0; i < numbers.size(); ++i) {
      if (int8_) {
        numbers[i] = static_cast<std::int8_t>(p[i]);
      } else {
        const std::uint32_t word = std::uint32_t(p[2 * i] | p[2 * i + 1] << 8) << 16;
        std::memcpy(&numbers[i], &word, 4);
      }
    }
    return numbers;
  }

  double distance(const std::vector<float>& a, const std::vector<float>& b, const std::uint8_t* c, int rows,
                  int columns) const {
    const std::size_t depth = a.size() / static_cast<std::size_t>(rows);
    double wrong = 0, all = 0;
    for (std::size_t i = 0; i < static_cast<std::size_t>(rows); ++i) {
      for (std::size_t j = 0; j < static_cast<std::size_t>(columns); ++j) {
        double expected = 0;
        for (std::size_t k = 0; k < depth; ++k)
          expected += double(a[i * depth + k]) * double(b[j * depth + k]);
        float real;
        std::int32_t whole;
        std::memcpy(&real, c + (i * static_cast<std::size_t>(columns) + j) * 4, 4);
        std::memcpy(&whole, &real, 4);
        const double difference = (int8_ ? double(whole) : double(real)) - expected;
        wrong += difference * difference;
        all += expected * expected;
      }
    }
    return std::sqrt(wrong / all);
  }

  const Session& session_;
  bool int8_;
  GemmShape shape_;
  Module module_;
  CUfunction function_ = nullptr;
};

}  // namespace gpu_probe

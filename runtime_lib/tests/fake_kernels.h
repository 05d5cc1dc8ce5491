// Kernels that the fake driver knows itself.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "cuda_api.h"

namespace fake_kernels {

using Values = std::vector<std::uint64_t>;
template <class T>
T* pointer(const Values& values, std::size_t i) {
  return reinterpret_cast<T*>(values[i]);
}
// Of memory that another device may be using at the same time: a step that is given up runs on with whatever
// its buffers hold.
inline float load(const Values& values, std::size_t i, std::size_t at) {
  return std::atomic_ref(pointer<float>(values, i)[at]).load(std::memory_order_relaxed);
}
inline void store(const Values& values, std::size_t i, std::size_t at, float value) {
  std::atomic_ref(pointer<float>(values, i)[at]).store(value, std::memory_order_relaxed);
}
inline float real(std::uint64_t value) {
  const auto bits = static_cast<std::uint32_t>(value);
  float result = 0;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

struct FakeKernel {
  std::vector<std::size_t> sizes;  // of the arguments; Triton's two pointers come behind
  std::function<CUresult(const Values&)> run;
};

inline const std::map<std::string, FakeKernel>& kernels() {
  static const std::map<std::string, FakeKernel> kKernels{
      {"add_one",  // y = x + 1
       {{8, 8, 4},
        [](const Values& v) {
          for (std::size_t i = 0; i < v[2]; ++i) store(v, 1, i, load(v, 0, i) + 1);
          return CUDA_SUCCESS;
        }}},
      {"add",  // y = a + b
       {{8, 8, 8, 4},
        [](const Values& v) {
          for (std::size_t i = 0; i < v[3]; ++i) store(v, 2, i, load(v, 0, i) + load(v, 1, i));
          return CUDA_SUCCESS;
        }}},
      {"scale",  // y = factor * x + shift, through the scratch memory
       {{8, 8, 4, 4, 8},
        [](const Values& v) {
          for (std::size_t i = 0; i < v[2]; ++i)
            pointer<float>(v, 5)[i] = real(v[3]) * pointer<float>(v, 0)[i];
          for (std::size_t i = 0; i < v[2]; ++i)
            pointer<float>(v, 1)[i] =
                pointer<float>(v, 5)[i] + static_cast<float>(static_cast<std::int64_t>(v[4]));
          return CUDA_SUCCESS;
        }}},
      {"gather",  // sums[e] += the first number of expert e's slot, for every expert that has one
       {{8, 8, 8, 4, 4},
        [](const Values& v) {
          for (std::size_t e = 0; e < v[3]; ++e)
            if (const std::int32_t slot = pointer<std::int32_t>(v, 0)[e]; slot >= 0)
              pointer<float>(v, 2)[e] += pointer<float>(v, 1)[static_cast<std::size_t>(slot) * v[4]];
          return CUDA_SUCCESS;
        }}},
      {"fault", {{8}, [](const Values&) { return CUDA_ERROR_ILLEGAL_ADDRESS; }}},
  };
  return kKernels;
}

}  // namespace fake_kernels

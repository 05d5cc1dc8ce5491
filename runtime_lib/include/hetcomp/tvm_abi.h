// The part of TVM's calling convention that generated kernels use, so that no TVM header or library is needed
// to build or run a program. Layouts: tvm-ffi 0.1.14 (tvm/ffi/c_api.h) and DLPack 1.x (dlpack.h).
#pragma once

#include <cstdint>

namespace hetcomp::tvm {

// DLDataTypeCode, DLDeviceType and TVMFFITypeIndex of the values used here.
inline constexpr std::uint8_t kInt = 0;
inline constexpr std::uint8_t kUInt = 1;
inline constexpr std::uint8_t kFloat = 2;
inline constexpr std::uint8_t kBool = 6;
inline constexpr std::int32_t kCpu = 1;
inline constexpr std::int32_t kTypeInt = 1;
inline constexpr std::int32_t kTypeTensor = 7;

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Device {
  std::int32_t type;
  std::int32_t id;
};

// DLTensor.
struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; null: compact row-major
  std::uint64_t byte_offset;
};

// TVMFFIAny.
struct Any {
  std::int32_t type_index;
  std::uint32_t zero_padding;
  union {
    std::int64_t v_int64;
    void* v_ptr;
  };
};

static_assert(sizeof(DataType) == 4 && sizeof(Device) == 8);
static_assert(sizeof(Tensor) == 48 && sizeof(Any) == 16, "TVM's calling convention is for 64-bit machines");

// TVM emits a function `f` as the symbol __tvm_ffi_f of this type; non-zero: an argument was refused.
using Function = int(void* self, const Any* args, std::int32_t n_args, Any* result);

inline Tensor tensor(const void* data, DataType dtype, std::int64_t* shape, std::int64_t* strides,
                     std::int32_t ndim) {
  return {const_cast<void*>(data), {kCpu, 0}, ndim, dtype, shape, strides, 0};
}

inline Any argument(Tensor& tensor) {
  Any any{kTypeTensor, 0, {}};
  any.v_ptr = &tensor;
  return any;
}

inline Any argument(std::int64_t value) {
  Any any{kTypeInt, 0, {}};
  any.v_int64 = value;
  return any;
}

}  // namespace hetcomp::tvm

// A libcuda.so.1 without a GPU: device memory is host memory, streams do everything at once, graphs run their
// memory operations when they are launched. Only what the GPU probe calls. The kernels of the probe are known
// by name.
//   FAKE_CUDA_FAIL=NAME     that entry point fails
//   FAKE_CUDA_HANG=1        the stream never becomes idle
//   FAKE_CUDA_DEVICES=N     how many devices there are (default 1)
//   FAKE_CUDA_WRONG=NAME    that kernel does nothing
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda_driver.h"

namespace {

constexpr CUresult kFailure = static_cast<CUresult>(999);
constexpr std::size_t kFree = std::size_t{192} << 20;

const char* setting(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}
CUresult result(const char* entry) {
  return setting("FAKE_CUDA_FAIL") == std::string(entry) ? kFailure : CUDA_SUCCESS;
}

double kernels_seconds = 0;  // on top of the clock: a microsecond for each kernel of a graph

double now() {
  return kernels_seconds +
         std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Event {
  double time = 0;
};
struct FakeGraph {
  std::vector<CUstreamBatchMemOpParams> operations;
  int kernels = 0;
};

template <class T>
T argument(void** arguments, int i) {
  T value;
  std::memcpy(&value, arguments[i], sizeof value);
  return value;
}

template <class T>
T* pointer(void** arguments, int i) {
  return reinterpret_cast<T*>(argument<CUdeviceptr>(arguments, i));
}

float bf16(const std::uint8_t* p) {
  const std::uint32_t word = std::uint32_t(p[0] | p[1] << 8) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

// Which of the two matrix kernels it is, the caller has to say: `int8`.
void gemm(bool int8, unsigned rows, unsigned columns, void** arguments) {
  const auto depth = argument<std::uint32_t>(arguments, 3);
  if (std::size_t(rows) * columns * depth > (std::size_t{1} << 28)) return;  // too much for a test
  const auto *a = pointer<std::uint8_t>(arguments, 0), *b = pointer<std::uint8_t>(arguments, 1);
  for (unsigned i = 0; i < rows; ++i) {
    for (unsigned j = 0; j < columns; ++j) {
      const auto *x = a + std::size_t(i) * depth, *y = b + std::size_t(j) * depth;
      float real = 0;
      std::int32_t whole = 0;
      for (unsigned k = 0; k < depth; k += int8 ? 1 : 2) {
        if (int8) whole += std::int8_t(x[k]) * std::int8_t(y[k]);
        if (!int8) real += bf16(x + k) * bf16(y + k);
      }
      void* to = pointer<std::uint8_t>(arguments, 2) + (std::size_t(i) * columns + j) * 4;
      if (int8) std::memcpy(to, &whole, 4);
      if (!int8) std::memcpy(to, &real, 4);
    }
  }
}

void fill(void** arguments) {
  auto* words = pointer<std::uint32_t>(arguments, 0);
  for (std::uint64_t i = 0; i < argument<std::uint64_t>(arguments, 1); ++i)
    words[i] = static_cast<std::uint32_t>(i) * argument<std::uint32_t>(arguments, 2);
}

void read_sum(std::size_t threads, void** arguments) {
  const auto* words = pointer<std::uint32_t>(arguments, 0);
  std::uint32_t sum = 0;
  for (std::size_t i = 0; i < argument<std::uint32_t>(arguments, 1) * threads * 32; ++i) sum += words[i];
  *pointer<std::uint32_t>(arguments, 2) += sum;
}

}  // namespace

// A kernel is its name, and whether its module multiplies int8.
struct CUfunc_st {
  std::string name;
  bool int8;
};

#define ENTRY extern "C" CUresult

ENTRY cuInit(unsigned) {
  return std::atoi(setting("FAKE_CUDA_DEVICES")) < 0 ? CUDA_ERROR_NO_DEVICE : result("cuInit");
}
ENTRY cuGetErrorName(CUresult, const char** name) {
  *name = "CUDA_ERROR_UNKNOWN";
  return CUDA_SUCCESS;
}
ENTRY cuDriverGetVersion(int* version) { return *version = 12040, result("cuDriverGetVersion"); }
ENTRY cuDeviceGetCount(int* count) {
  *count = *setting("FAKE_CUDA_DEVICES") ? std::atoi(setting("FAKE_CUDA_DEVICES")) : 1;
  return result("cuDeviceGetCount");
}
ENTRY cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, result("cuDeviceGet"); }
ENTRY cuDeviceGetName(char* name, int length, CUdevice device) {
  std::strncpy(name, device ? "Fake GPU 1" : "Fake \"GPU\" 0", static_cast<std::size_t>(length));
  return result("cuDeviceGetName");
}
ENTRY cuDeviceTotalMem_v2(std::size_t* bytes, CUdevice) {
  return *bytes = 2 * kFree, result("cuDeviceTotalMem_v2");
}
ENTRY cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  *value = which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR   ? 8
           : which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? 9
           : which == CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE            ? 1 << 20
                                                                   : 2;
  return result("cuDeviceGetAttribute");
}
ENTRY cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  return *context = reinterpret_cast<CUcontext>(8), result("cuDevicePrimaryCtxRetain");
}
ENTRY cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }
ENTRY cuCtxSetCurrent(CUcontext) { return result("cuCtxSetCurrent"); }
ENTRY cuMemGetInfo_v2(std::size_t* free, std::size_t* total) {
  *free = kFree;
  *total = 2 * kFree;
  return result("cuMemGetInfo_v2");
}
ENTRY cuMemAlloc_v2(CUdeviceptr* at, std::size_t bytes) {
  *at = reinterpret_cast<CUdeviceptr>(std::malloc(bytes));
  return result("cuMemAlloc_v2");
}
ENTRY cuMemFree_v2(CUdeviceptr at) { return std::free(reinterpret_cast<void*>(at)), CUDA_SUCCESS; }
ENTRY cuMemHostAlloc(void** at, std::size_t bytes, unsigned) {
  return *at = std::malloc(bytes), result("cuMemHostAlloc");
}
ENTRY cuMemFreeHost(void* at) { return std::free(at), CUDA_SUCCESS; }
ENTRY cuMemHostGetDevicePointer_v2(CUdeviceptr* device, void* host, unsigned) {
  return *device = reinterpret_cast<CUdeviceptr>(host), result("cuMemHostGetDevicePointer_v2");
}
ENTRY cuMemsetD32Async(CUdeviceptr at, unsigned value, std::size_t count, CUstream) {
  for (std::size_t i = 0; i < count; ++i) reinterpret_cast<unsigned*>(at)[i] = value;
  return result("cuMemsetD32Async");
}
ENTRY cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, std::size_t bytes, CUstream) {
  return std::memcpy(reinterpret_cast<void*>(to), from, bytes), result("cuMemcpyHtoDAsync_v2");
}
ENTRY cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, std::size_t bytes, CUstream) {
  return std::memcpy(to, reinterpret_cast<const void*>(from), bytes), result("cuMemcpyDtoHAsync_v2");
}
ENTRY cuModuleLoadData(CUmodule* module, const void* image) {
  *module = reinterpret_cast<CUmodule>(std::strstr(static_cast<const char*>(image), ".s32.s8") ? 2 : 1);
  return result("cuModuleLoadData");
}
ENTRY cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
ENTRY cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = new CUfunc_st{name, reinterpret_cast<std::size_t>(module) == 2};
  return result("cuModuleGetFunction");
}
ENTRY cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return result("cuFuncSetAttribute"); }
ENTRY cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned, unsigned threads, unsigned,
                     unsigned, unsigned, CUstream, void** arguments, void**) {
  const std::string& name = function->name;
  if (setting("FAKE_CUDA_WRONG") == name) return CUDA_SUCCESS;
  if (name == "fill") fill(arguments);
  if (name == "read_sum") read_sum(std::size_t(x) * threads, arguments);
  if (name == "gemm") gemm(function->int8, y * 128, x * 128, arguments);
  return result("cuLaunchKernel");
}
ENTRY cuStreamCreate(CUstream* stream, unsigned) {
  return *stream = reinterpret_cast<CUstream>(8), result("cuStreamCreate");
}
ENTRY cuStreamDestroy_v2(CUstream) { return CUDA_SUCCESS; }
ENTRY cuStreamQuery(CUstream) {
  return *setting("FAKE_CUDA_HANG") ? CUDA_ERROR_NOT_READY : result("cuStreamQuery");
}
ENTRY cuEventCreate(CUevent* event, unsigned) {
  return *event = reinterpret_cast<CUevent>(new Event), result("cuEventCreate");
}
ENTRY cuEventDestroy_v2(CUevent event) { return delete reinterpret_cast<Event*>(event), CUDA_SUCCESS; }
ENTRY cuEventRecord(CUevent event, CUstream) {
  return reinterpret_cast<Event*>(event)->time = now(), result("cuEventRecord");
}
ENTRY cuEventElapsedTime(float* milliseconds, CUevent begin, CUevent end) {
  const double seconds = reinterpret_cast<Event*>(end)->time - reinterpret_cast<Event*>(begin)->time;
  *milliseconds = static_cast<float>(seconds * 1e3 + 1e-3);
  return result("cuEventElapsedTime");
}
ENTRY cuGraphCreate(CUgraph* graph, unsigned) {
  return *graph = reinterpret_cast<CUgraph>(new FakeGraph), result("cuGraphCreate");
}
ENTRY cuGraphDestroy(CUgraph graph) { return delete reinterpret_cast<FakeGraph*>(graph), CUDA_SUCCESS; }
ENTRY cuGraphAddKernelNode_v2(CUgraphNode* node, CUgraph graph, const CUgraphNode*, std::size_t,
                              const CUDA_KERNEL_NODE_PARAMS*) {
  ++reinterpret_cast<FakeGraph*>(graph)->kernels;
  return *node = reinterpret_cast<CUgraphNode>(8), result("cuGraphAddKernelNode_v2");
}
ENTRY cuGraphAddBatchMemOpNode(CUgraphNode* node, CUgraph graph, const CUgraphNode*, std::size_t,
                               const CUDA_BATCH_MEM_OP_NODE_PARAMS* parameters) {
  auto& operations = reinterpret_cast<FakeGraph*>(graph)->operations;
  operations.insert(operations.end(), parameters->paramArray, parameters->paramArray + parameters->count);
  return *node = reinterpret_cast<CUgraphNode>(8), result("cuGraphAddBatchMemOpNode");
}
ENTRY cuGraphInstantiateWithFlags(CUgraphExec* exec, CUgraph graph, unsigned long long) {
  return *exec = reinterpret_cast<CUgraphExec>(graph), result("cuGraphInstantiateWithFlags");
}
ENTRY cuGraphExecDestroy(CUgraphExec) { return CUDA_SUCCESS; }
ENTRY cuGraphLaunch(CUgraphExec exec, CUstream) {
  kernels_seconds += 1e-6 * reinterpret_cast<FakeGraph*>(exec)->kernels;
  for (const auto& operation : reinterpret_cast<FakeGraph*>(exec)->operations) {
    auto* flag = reinterpret_cast<volatile std::uint32_t*>(operation.writeValue.address);
    const auto value = static_cast<std::uint32_t>(operation.writeValue.value);
    if (operation.operation == CU_STREAM_MEM_OP_WRITE_VALUE_32) *flag = value;
    while (operation.operation == CU_STREAM_MEM_OP_WAIT_VALUE_32 &&
           static_cast<std::int32_t>(*flag - value) < 0) {
    }
  }
  return result("cuGraphLaunch");
}

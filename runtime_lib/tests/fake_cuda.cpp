// A libcuda.so.1 without a GPU, for the tests of the runtime: device memory is host memory, a stream is a
// thread, a graph runs its nodes in the order of their dependencies, memory operations included. Everything
// belongs to the device whose context was current when it was made, and is refused to others but for portable
// host memory. Kernels are known by the names that a fake cubin lists behind its header, or foreign: see
// fake_cuda.h.
#include "fake_cuda.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "cuda_api.h"
#include "fake_graph.h"
#include "fake_kernels.h"
#include "fake_mapped_memory.h"
#include "fake_memory.h"
#include "fake_stream.h"

namespace {

using fake_graph::Node;
using fake_graph::Nodes;
using fake_kernels::kernels;
using fake_kernels::Values;
using namespace fake_memory;

FakeCuda fake;

}  // namespace

// Contexts of the calling thread. A context is 8 more than 8 times its device.
thread_local std::vector<CUcontext> current_contexts;
constexpr auto kInvalidContext = static_cast<CUresult>(201);

int device_of(CUcontext context) {
  return static_cast<int>(reinterpret_cast<std::uintptr_t>(context) / 8) - 1;
}
int current_device() { return device_of(current_contexts.back()); }

using Grid = std::array<unsigned, 3>;
struct CUfunc_st {
  int device = 0;
  std::vector<std::size_t> sizes;  // of the arguments
  std::function<CUresult(const Grid&, const Values&)> run;
};
struct CUmod_st {
  std::map<std::string, CUfunc_st> functions;
};
struct CUevent_st {
  std::atomic<std::int64_t> ns{0};  // 0: never recorded
  std::atomic<int> coming{0};       // records that streams have not come to
  void record() {
    ns = std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
             .count();
  }
};
// A waiting device must not take the core from those it waits for.
void give_way_after(int looks) {
  if (looks < 1000) return std::this_thread::yield();
  std::this_thread::sleep_for(std::chrono::microseconds(50));
}

// A device hangs that is given more, beside hand-overs.
constexpr int kMostGraphEvents = 110;

struct CUgraph_st {
  Nodes nodes;
  int events = 0;
};
struct CUgraphExec_st {
  Nodes nodes;
  int device;
};

namespace {

std::atomic<FakeCudaModuleLoader> module_loader{nullptr};
std::atomic<FakeCudaLauncher> launcher{nullptr};

constexpr std::size_t kHeader = 64;  // of an ELF file

// A module of the text "foreign ENTRY SIZE ...": its kernel's arguments stand in it, as in a real cubin.
CUresult load_foreign(CUmod_st& module, const void* image, const std::string& text) {
  const FakeCudaModuleLoader load = module_loader;
  const int id = load == nullptr ? -1 : load(image, kHeader + text.size() + 1);
  if (id < 0) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  std::istringstream words(text.substr(0, text.find('\n')));
  std::string entry;
  words >> entry >> entry;
  CUfunc_st& function = module.functions[entry];
  for (std::size_t size = 0; words >> size;) function.sizes.push_back(size);
  function.run = [id](const Grid& grid, const Values& values) {
    const FakeCudaLauncher launch = launcher;
    if (launch == nullptr) return CUDA_ERROR_NOT_SUPPORTED;
    return static_cast<CUresult>(launch(id, grid.data(), static_cast<int>(values.size()), values.data()));
  };
  return words.eof() ? CUDA_SUCCESS : CUDA_ERROR_INVALID_IMAGE;
}

void load_known(CUmod_st& module, const std::string& names) {
  std::istringstream words(names);
  for (std::string name; words >> name;)
    if (const auto found = kernels().find(name); found != kernels().end())
      module.functions[name] = {
          0, found->second.sizes,
          [run = found->second.run](const Grid&, const Values& values) { return run(values); }};
}

// Nodes are numbered from 1 in their graph.
CUresult add_node(CUgraphNode* result, CUgraph graph, const CUgraphNode* after, std::size_t count,
                  Node node) {
  for (std::size_t i = 0; i < count; ++i) {
    const auto before = reinterpret_cast<std::size_t>(after[i]);
    if (before == 0 || before > graph->nodes.size()) return CUDA_ERROR_INVALID_VALUE;
    node.after.push_back(before - 1);
  }
  graph->nodes.push_back(std::move(node));
  *result = reinterpret_cast<CUgraphNode>(graph->nodes.size());
  return CUDA_SUCCESS;
}

}  // namespace

CUresult fake_counted() {
  const int call = ++fake.calls;
  return call == fake.fail_call ? static_cast<CUresult>(fake.fail_result.load()) : CUDA_SUCCESS;
}

#define ENTRY extern "C" __attribute__((visibility("default"))) CUresult
#define COUNTED \
  if (const CUresult failed = fake_counted(); failed != CUDA_SUCCESS) return failed

extern "C" __attribute__((visibility("default"))) FakeCuda* fake_cuda() { return &fake; }

extern "C" __attribute__((visibility("default"))) void fake_cuda_set_module_loader(
    FakeCudaModuleLoader loaded) {
  module_loader = loaded;
}
extern "C" __attribute__((visibility("default"))) void fake_cuda_set_launcher(FakeCudaLauncher launch) {
  launcher = launch;
}

ENTRY cuGetErrorString(CUresult result, const char** text) {
  *text = result == CUDA_ERROR_ILLEGAL_ADDRESS ? "an illegal memory access was encountered" : "a fake error";
  return CUDA_SUCCESS;
}
ENTRY cuDriverGetVersion(int* version) { return *version = fake.version, CUDA_SUCCESS; }
ENTRY cuInit(unsigned) { return fake.devices == 0 ? CUDA_ERROR_NO_DEVICE : CUDA_SUCCESS; }
ENTRY cuDeviceGetCount(int* count) { return *count = fake.devices, CUDA_SUCCESS; }
ENTRY cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
ENTRY cuDeviceGetName(char* name, int length, CUdevice device) {
  const std::string text = "Fake GPU" + (device == 0 ? "" : " " + std::to_string(device + 1));
  std::strncpy(name, text.c_str(), static_cast<std::size_t>(length));
  return CUDA_SUCCESS;
}
ENTRY cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  *value = which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR   ? fake.compute_capability / 10
           : which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? fake.compute_capability % 10
           : which == CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
               ? static_cast<int>(fake.memory_mapping)
               : 100 << 10;
  return CUDA_SUCCESS;
}
ENTRY cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  COUNTED;
  return ++fake.contexts, *context = reinterpret_cast<CUcontext>(8 * std::uintptr_t(device + 1)),
                          CUDA_SUCCESS;
}
ENTRY cuDevicePrimaryCtxRelease_v2(CUdevice) { return --fake.contexts, CUDA_SUCCESS; }
ENTRY cuCtxPushCurrent_v2(CUcontext context) { return current_contexts.push_back(context), CUDA_SUCCESS; }
ENTRY cuCtxPopCurrent_v2(CUcontext*) { return current_contexts.pop_back(), CUDA_SUCCESS; }
ENTRY cuMemGetInfo_v2(std::size_t* free, std::size_t* total) {
  COUNTED;
  *free = fake.free_bytes - (current_device() == 0 ? 0 : fake.taken_of_others.load());
  *total = std::size_t{2} << 30;
  return CUDA_SUCCESS;
}
extern "C" __attribute__((visibility("default"))) std::size_t fake_cuda_memory(std::uint64_t address,
                                                                               std::uint64_t* pairs,
                                                                               std::size_t most) {
  std::vector<fake_mapped_memory::Area> found;
  if (!fake_mapped_memory::reservations.areas(address, found)) {
    const std::lock_guard lock(memories_mutex);
    const auto* memory = memory_at(address);
    if (memory == nullptr) return 0;
    found.push_back({memory->first, memory->first + memory->second.bytes});
  }
  for (std::size_t i = 0; i < std::min(most, found.size()); ++i) {
    pairs[2 * i] = found[i].begin;
    pairs[2 * i + 1] = found[i].end;
  }
  return found.size();
}
extern "C" __attribute__((visibility("default"))) void fake_cuda_held(std::uint64_t* objects,
                                                                      std::uint64_t* bytes) {
  *objects = static_cast<std::uint64_t>(fake.live());
  const std::lock_guard lock(memories_mutex);
  *bytes = fake.granules * fake_mapped_memory::kGranule;
  for (const auto& [at, memory] : memories) *bytes += memory.bytes;
}
ENTRY cuMemAlloc_v2(CUdeviceptr* at, std::size_t bytes) {
  COUNTED;
  if (current_contexts.empty()) return kInvalidContext;
  if (fake.out_of_memory) return CUDA_ERROR_OUT_OF_MEMORY;
  void* memory = allocated(256, bytes, current_device());
  std::memset(memory, 0xa5, bytes);  // as memory that others had before
  ++fake.memories;
  fake.device_bytes += bytes;
  return *at = reinterpret_cast<CUdeviceptr>(memory), CUDA_SUCCESS;
}
ENTRY cuMemFree_v2(CUdeviceptr at) {
  if (current_contexts.empty() || !reaches(current_device(), at, true)) return kInvalidContext;
  synchronize_all();
  return --fake.memories, release(reinterpret_cast<void*>(at)), CUDA_SUCCESS;
}
ENTRY cuMemsetD8Async(CUdeviceptr at, unsigned char value, std::size_t bytes, CUstream stream) {
  COUNTED;
  if (!reaches(stream->device, at, true)) return CUDA_ERROR_INVALID_VALUE;
  stream->enqueue([=] { return std::memset(reinterpret_cast<void*>(at), value, bytes), CUDA_SUCCESS; });
  return CUDA_SUCCESS;
}
ENTRY cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, std::size_t bytes, CUstream stream) {
  COUNTED;
  if (!reaches(stream->device, to, true) ||
      !reaches(stream->device, reinterpret_cast<std::uintptr_t>(from), false))
    return CUDA_ERROR_INVALID_VALUE;
  stream->enqueue([=] { return std::memcpy(reinterpret_cast<void*>(to), from, bytes), CUDA_SUCCESS; });
  return CUDA_SUCCESS;
}
ENTRY cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, std::size_t bytes, CUstream stream) {
  COUNTED;
  if (!reaches(stream->device, to, true) || !reaches(stream->device, from, true))
    return CUDA_ERROR_INVALID_VALUE;
  stream->enqueue([=] {
    return std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes), CUDA_SUCCESS;
  });
  return CUDA_SUCCESS;
}
ENTRY cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, std::size_t bytes, CUstream stream) {
  COUNTED;
  if (!reaches(stream->device, from, true)) return CUDA_ERROR_INVALID_VALUE;
  stream->enqueue([=] { return std::memcpy(to, reinterpret_cast<const void*>(from), bytes), CUDA_SUCCESS; });
  return CUDA_SUCCESS;
}
ENTRY cuMemHostAlloc(void** at, std::size_t bytes, unsigned flags) {
  COUNTED;
  if (current_contexts.empty()) return kInvalidContext;
  if (bytes > fake.most_pinned) return CUDA_ERROR_OUT_OF_MEMORY;
  ++fake.host_memories;
  const bool portable = (flags & CU_MEMHOSTALLOC_PORTABLE) != 0;
  return *at = allocated(4096, bytes, portable ? kEveryDevice : current_device()), CUDA_SUCCESS;
}
ENTRY cuMemFreeHost(void* at) {
  if (current_contexts.empty()) return kInvalidContext;
  return synchronize_all(), --fake.host_memories, release(at), CUDA_SUCCESS;
}
ENTRY cuMemHostRegister_v2(void* at, std::size_t bytes, unsigned flags) {
  COUNTED;
  if (current_contexts.empty()) return kInvalidContext;
  if (fake.refuse_pinning) return CUDA_ERROR_NOT_SUPPORTED;
  ++fake.host_memories;
  const std::lock_guard lock(memories_mutex);
  const bool portable = (flags & CU_MEMHOSTREGISTER_PORTABLE) != 0;
  memories[reinterpret_cast<std::uintptr_t>(at)] = {bytes, portable ? kEveryDevice : current_device()};
  return CUDA_SUCCESS;
}
ENTRY cuMemHostUnregister(void* at) {
  if (current_contexts.empty()) return kInvalidContext;
  synchronize_all();
  --fake.host_memories;
  const std::lock_guard lock(memories_mutex);
  return memories.erase(reinterpret_cast<std::uintptr_t>(at)), CUDA_SUCCESS;
}
ENTRY cuMemHostGetDevicePointer_v2(CUdeviceptr* device, void* host, unsigned) {
  COUNTED;
  if (current_contexts.empty() || !reaches(current_device(), reinterpret_cast<std::uintptr_t>(host), true))
    return CUDA_ERROR_INVALID_VALUE;
  return *device = reinterpret_cast<CUdeviceptr>(host), CUDA_SUCCESS;
}
ENTRY cuModuleLoadData(CUmodule* module, const void* image) {
  COUNTED;
  const std::string text = static_cast<const char*>(image) + kHeader;
  if (text.starts_with("other_gpu")) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  auto loaded = std::make_unique<CUmod_st>();
  if (text.starts_with("foreign ")) {
    if (const CUresult result = load_foreign(*loaded, image, text); result != CUDA_SUCCESS) return result;
  } else {
    load_known(*loaded, text);
  }
  for (auto& [name, function] : loaded->functions) function.device = current_device();
  return ++fake.modules, *module = loaded.release(), CUDA_SUCCESS;
}
ENTRY cuModuleUnload(CUmodule module) { return --fake.modules, delete module, CUDA_SUCCESS; }
ENTRY cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  COUNTED;
  const auto found = module->functions.find(name);
  if (found == module->functions.end()) return CUDA_ERROR_NOT_FOUND;
  return *function = &found->second, CUDA_SUCCESS;
}
ENTRY cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) {
  COUNTED;
  return CUDA_SUCCESS;
}
ENTRY cuStreamCreate(CUstream* stream, unsigned) {
  COUNTED;
  return *stream = new CUstream_st(current_device(), fake.streams), CUDA_SUCCESS;
}
ENTRY cuStreamDestroy_v2(CUstream stream) { return delete stream, CUDA_SUCCESS; }
ENTRY cuStreamQuery(CUstream stream) { return current_contexts.empty() ? kInvalidContext : stream->query(); }
ENTRY cuStreamSynchronize(CUstream stream) {
  const CUresult result = stream->synchronize();
  COUNTED;
  return result;
}
ENTRY cuStreamWriteValue32_v2(CUstream stream, CUdeviceptr at, std::uint32_t value, unsigned) {
  COUNTED;
  if (!reaches(stream->device, at, true)) return CUDA_ERROR_INVALID_VALUE;
  stream->enqueue([=] {
    std::atomic_ref(*reinterpret_cast<std::uint32_t*>(at)).store(value, std::memory_order_release);
    return CUDA_SUCCESS;
  });
  return CUDA_SUCCESS;
}
ENTRY cuEventCreate(CUevent* event, unsigned) {
  COUNTED;
  return ++fake.events, *event = new CUevent_st, CUDA_SUCCESS;
}
ENTRY cuEventDestroy_v2(CUevent event) {
  return synchronize_all(), --fake.events, delete event, CUDA_SUCCESS;
}
ENTRY cuEventRecord(CUevent event, CUstream stream) {
  COUNTED;
  ++event->coming;
  stream->enqueue([event] { return event->record(), --event->coming, CUDA_SUCCESS; });
  return CUDA_SUCCESS;
}
ENTRY cuEventSynchronize(CUevent event) {
  COUNTED;
  for (int looks = 0; event->coming > 0; ++looks) give_way_after(looks);
  return CUDA_SUCCESS;
}
ENTRY cuEventElapsedTime(float* milliseconds, CUevent begin, CUevent end) {
  if (begin->ns == 0 || end->ns == 0) return static_cast<CUresult>(400);  // CUDA_ERROR_INVALID_HANDLE
  *milliseconds = static_cast<float>(static_cast<double>(end->ns - begin->ns) / 1e6);
  return CUDA_SUCCESS;
}
ENTRY cuGraphAddEventRecordNode(CUgraphNode* result, CUgraph graph, const CUgraphNode* after,
                                std::size_t count, CUevent event) {
  COUNTED;
  if (++graph->events > kMostGraphEvents) return CUDA_ERROR_NOT_SUPPORTED;
  Node node;
  node.kernel = [event] { return event->record(), CUDA_SUCCESS; };
  return add_node(result, graph, after, count, std::move(node));
}
ENTRY cuStreamWaitValue32_v2(CUstream stream, CUdeviceptr at, std::uint32_t value, unsigned) {
  COUNTED;
  if (!reaches(stream->device, at, true)) return CUDA_ERROR_INVALID_VALUE;
  stream->enqueue([=] {
    const std::atomic_ref flag(*reinterpret_cast<std::uint32_t*>(at));
    for (int looks = 0; static_cast<std::int32_t>(flag.load(std::memory_order_acquire) - value) < 0; ++looks)
      give_way_after(looks);
    return CUDA_SUCCESS;
  });
  return CUDA_SUCCESS;
}
ENTRY cuGraphCreate(CUgraph* graph, unsigned) {
  COUNTED;
  return ++fake.graphs, *graph = new CUgraph_st, CUDA_SUCCESS;
}
ENTRY cuGraphDestroy(CUgraph graph) { return --fake.graphs, delete graph, CUDA_SUCCESS; }
ENTRY cuGraphAddKernelNode_v2(CUgraphNode* result, CUgraph graph, const CUgraphNode* after, std::size_t count,
                              const CUDA_KERNEL_NODE_PARAMS* parameters) {
  COUNTED;
  std::vector<std::size_t> sizes = parameters->func->sizes;
  sizes.insert(sizes.end(), {8, 8});
  Values values(sizes.size());
  if (parameters->func->device != current_device()) return kInvalidContext;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    std::memcpy(&values[i], parameters->kernelParams[i], sizes[i]);
    if (sizes[i] == 8 && !reaches(current_device(), values[i], false)) return CUDA_ERROR_INVALID_VALUE;
  }
  const Grid grid{parameters->gridDimX, parameters->gridDimY, parameters->gridDimZ};
  Node node;
  node.kernel = [run = parameters->func->run, grid, values] { return run(grid, values); };
  return add_node(result, graph, after, count, std::move(node));
}
ENTRY cuGraphAddBatchMemOpNode(CUgraphNode* result, CUgraph graph, const CUgraphNode* after,
                               std::size_t count, const CUDA_BATCH_MEM_OP_NODE_PARAMS* parameters) {
  COUNTED;
  if (!fake.memory_operations) return CUDA_ERROR_NOT_SUPPORTED;
  Node node;
  node.operations.assign(parameters->paramArray, parameters->paramArray + parameters->count);
  for (const CUstreamBatchMemOpParams& operation : node.operations)
    if (!reaches(device_of(parameters->ctx), operation.writeValue.address, true))
      return CUDA_ERROR_INVALID_VALUE;
  return add_node(result, graph, after, count, std::move(node));
}
ENTRY cuGraphInstantiateWithFlags(CUgraphExec* exec, CUgraph graph, unsigned long long) {
  COUNTED;
  fake.nodes = static_cast<int>(graph->nodes.size());
  return ++fake.execs, *exec = new CUgraphExec_st{graph->nodes, current_device()}, CUDA_SUCCESS;
}
ENTRY cuGraphLaunch(CUgraphExec exec, CUstream stream) {
  COUNTED;
  if (exec->device != stream->device) return kInvalidContext;
  ++fake_mapped_memory::graphs_running;
  const std::shared_ptr<void> end(nullptr, [](void*) { --fake_mapped_memory::graphs_running; });
  stream->enqueue([exec, end] { return fake_graph::run_graph(exec->nodes, fake); });
  return CUDA_SUCCESS;
}
ENTRY cuGraphExecDestroy(CUgraphExec exec) { return --fake.execs, delete exec, CUDA_SUCCESS; }

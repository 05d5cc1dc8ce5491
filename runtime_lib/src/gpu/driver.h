// The entry points of the CUDA driver that the runtime calls, found in libcuda.so.1 at run time: the same
// binary runs where there is no GPU.
#pragma once

#include <cstddef>
#include <string>
#include <utility>

#include "cuda_api.h"

namespace hetcomp::gpu {

// A driver's library. It is never closed: the driver keeps threads of its own.
class DriverLibrary {
 public:
  // Throws Error(HETCOMP_MISSING_ISA) if there is no such library.
  explicit DriverLibrary(const std::string& name);

  // Null if the driver lacks it.
  void* symbol(const char* name) const;
  // "out of memory (CUDA error 2)"
  std::string in_words(CUresult result) const;

 private:
  void* handle_;
  CUresult (*error_string_)(CUresult, const char**);
};

[[noreturn]] void refuse_missing_entry(const char* symbol);
[[noreturn]] void report_failed_call(const char* symbol, const std::string& doing, const std::string& reason);

// One entry point. Calling it throws Error(HETCOMP_COMPUTE) unless it returns CUDA_SUCCESS.
template <class... P>
class DriverCall {
 public:
  enum class Need { kAlways, kIfThere };

  DriverCall(const DriverLibrary& library, const char* symbol, Need need = Need::kAlways)
      : library_(library),
        symbol_(symbol),
        call_(reinterpret_cast<CUresult (*)(P...)>(library.symbol(symbol))) {
    if (call_ == nullptr && need == Need::kAlways) refuse_missing_entry(symbol);
  }
  explicit operator bool() const { return call_ != nullptr; }

  CUresult raw(P... arguments) const { return call_(arguments...); }
  void operator()(P... arguments) const { require(raw(arguments...)); }
  // doing: what the call was for, as in "loading x.cubin".
  void require(CUresult result, const std::string& doing = {}) const {
    if (result != CUDA_SUCCESS) report_failed_call(symbol_, doing, library_.in_words(result));
  }

 private:
  const DriverLibrary& library_;
  const char* symbol_;
  CUresult (*call_)(P...);
};

// All entry points, of a driver that is initialised.
class CudaDriver {
 public:
  // cuGraphAddKernelNode_v2 came with CUDA 12.0; the memory operations of that version need no module option.
  static constexpr int kOldestVersion = 12000;

  // Throws Error(HETCOMP_MISSING_ISA) with what to do: no driver, one older than kOldestVersion, no device.
  explicit CudaDriver(const std::string& library = "libcuda.so.1");
  CudaDriver(const CudaDriver&) = delete;
  CudaDriver& operator=(const CudaDriver&) = delete;

  int version() const { return version_; }  // 12040 is CUDA 12.4
  std::string in_words(CUresult result) const { return library_.in_words(result); }

 private:
  DriverLibrary library_;
  int version_;

 public:
  DriverCall<unsigned> init{library_, "cuInit"};
  DriverCall<int*> device_count{library_, "cuDeviceGetCount"};
  DriverCall<CUdevice*, int> device_get{library_, "cuDeviceGet"};
  DriverCall<char*, int, CUdevice> device_name{library_, "cuDeviceGetName"};
  DriverCall<int*, CUdevice_attribute, CUdevice> device_attribute{library_, "cuDeviceGetAttribute"};
  DriverCall<CUcontext*, CUdevice> context_retain{library_, "cuDevicePrimaryCtxRetain"};
  DriverCall<CUdevice> context_release{library_, "cuDevicePrimaryCtxRelease_v2"};
  DriverCall<CUcontext> context_push{library_, "cuCtxPushCurrent_v2"};
  DriverCall<CUcontext*> context_pop{library_, "cuCtxPopCurrent_v2"};
  DriverCall<std::size_t*, std::size_t*> memory_info{library_, "cuMemGetInfo_v2"};
  DriverCall<CUdeviceptr*, std::size_t> memory_allocate{library_, "cuMemAlloc_v2"};
  DriverCall<CUdeviceptr> memory_free{library_, "cuMemFree_v2"};
  // Addresses and memory apart: with CUDA 10.2.
  DriverCall<std::size_t*, const CUmemAllocationProp*, CUmemAllocationGranularity_flags> granularity{
      library_, "cuMemGetAllocationGranularity"};
  DriverCall<CUdeviceptr*, std::size_t, std::size_t, CUdeviceptr, unsigned long long> addresses_reserve{
      library_, "cuMemAddressReserve"};
  DriverCall<CUdeviceptr, std::size_t> addresses_free{library_, "cuMemAddressFree"};
  DriverCall<CUmemGenericAllocationHandle*, std::size_t, const CUmemAllocationProp*, unsigned long long>
      granule_create{library_, "cuMemCreate"};
  DriverCall<CUmemGenericAllocationHandle> granule_release{library_, "cuMemRelease"};
  DriverCall<CUdeviceptr, std::size_t, std::size_t, CUmemGenericAllocationHandle, unsigned long long>
      memory_map{library_, "cuMemMap"};
  DriverCall<CUdeviceptr, std::size_t> memory_unmap{library_, "cuMemUnmap"};
  DriverCall<CUdeviceptr, std::size_t, const CUmemAccessDesc*, std::size_t> memory_allow{library_,
                                                                                         "cuMemSetAccess"};
  DriverCall<CUdeviceptr, unsigned char, std::size_t, CUstream> memory_set{library_, "cuMemsetD8Async"};
  DriverCall<CUdeviceptr, const void*, std::size_t, CUstream> copy_to_device{library_,
                                                                             "cuMemcpyHtoDAsync_v2"};
  DriverCall<CUdeviceptr, CUdeviceptr, std::size_t, CUstream> copy_on_device{library_,
                                                                             "cuMemcpyDtoDAsync_v2"};
  DriverCall<void*, CUdeviceptr, std::size_t, CUstream> copy_to_host{library_, "cuMemcpyDtoHAsync_v2"};
  DriverCall<void**, std::size_t, unsigned> host_allocate{library_, "cuMemHostAlloc"};
  DriverCall<void*> host_free{library_, "cuMemFreeHost"};
  DriverCall<CUdeviceptr*, void*, unsigned> host_device_pointer{library_, "cuMemHostGetDevicePointer_v2"};
  DriverCall<void*, std::size_t, unsigned> host_register{library_, "cuMemHostRegister_v2"};
  DriverCall<void*> host_unregister{library_, "cuMemHostUnregister"};
  DriverCall<CUmodule*, const void*> module_load{library_, "cuModuleLoadData"};
  DriverCall<CUmodule> module_unload{library_, "cuModuleUnload"};
  DriverCall<CUfunction*, CUmodule, const char*> module_function{library_, "cuModuleGetFunction"};
  DriverCall<CUfunction, CUfunction_attribute, int> function_set{library_, "cuFuncSetAttribute"};
  DriverCall<CUstream*, unsigned> stream_create{library_, "cuStreamCreate"};
  DriverCall<CUstream> stream_destroy{library_, "cuStreamDestroy_v2"};
  DriverCall<CUstream> stream_query{library_, "cuStreamQuery"};
  DriverCall<CUstream> stream_synchronize{library_, "cuStreamSynchronize"};
  DriverCall<CUstream, CUdeviceptr, std::uint32_t, unsigned> stream_write{library_,
                                                                          "cuStreamWriteValue32_v2"};
  DriverCall<CUevent*, unsigned> event_create{library_, "cuEventCreate"};
  DriverCall<CUevent> event_destroy{library_, "cuEventDestroy_v2"};
  DriverCall<CUevent, CUstream> event_record{library_, "cuEventRecord"};
  DriverCall<CUevent> event_synchronize{library_, "cuEventSynchronize"};
  DriverCall<float*, CUevent, CUevent> event_elapsed{library_, "cuEventElapsedTime"};  // milliseconds
  DriverCall<CUstream, CUdeviceptr, std::uint32_t, unsigned> stream_wait{library_, "cuStreamWaitValue32_v2"};
  DriverCall<CUgraph*, unsigned> graph_create{library_, "cuGraphCreate"};
  DriverCall<CUgraph> graph_destroy{library_, "cuGraphDestroy"};
  DriverCall<CUgraphNode*, CUgraph, const CUgraphNode*, std::size_t, const CUDA_KERNEL_NODE_PARAMS*>
      graph_add_kernel{library_, "cuGraphAddKernelNode_v2"};
  DriverCall<CUgraphNode*, CUgraph, const CUgraphNode*, std::size_t, const CUDA_BATCH_MEM_OP_NODE_PARAMS*>
      graph_add_memory_operations{library_, "cuGraphAddBatchMemOpNode",
                                  decltype(graph_add_memory_operations)::Need::kIfThere};
  DriverCall<CUgraphNode*, CUgraph, const CUgraphNode*, std::size_t, CUevent> graph_add_event{
      library_, "cuGraphAddEventRecordNode"};
  DriverCall<CUgraphExec*, CUgraph, unsigned long long> graph_instantiate{library_,
                                                                          "cuGraphInstantiateWithFlags"};
  DriverCall<CUgraphExec, CUstream> graph_launch{library_, "cuGraphLaunch"};
  DriverCall<CUgraphExec> graph_exec_destroy{library_, "cuGraphExecDestroy"};
};

// An object of the driver, destroyed with the handle. Errors of the destruction are dropped: after a fault of
// the GPU every call fails, and the context takes all with it.
template <class T, auto Destroy>
class Handle {
 public:
  Handle() = default;
  Handle(const CudaDriver& driver, T value) : driver_(&driver), value_(value) {}
  Handle(Handle&& other) noexcept
      : driver_(std::exchange(other.driver_, nullptr)), value_(std::exchange(other.value_, T{})) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(driver_, other.driver_);
    std::swap(value_, other.value_);
    return *this;
  }
  ~Handle() {
    if (driver_ != nullptr) (driver_->*Destroy).raw(value_);
  }
  T get() const { return value_; }

 private:
  const CudaDriver* driver_ = nullptr;
  T value_{};
};

using StreamHandle = Handle<CUstream, &CudaDriver::stream_destroy>;
using EventHandle = Handle<CUevent, &CudaDriver::event_destroy>;
using ModuleHandle = Handle<CUmodule, &CudaDriver::module_unload>;
using GraphHandle = Handle<CUgraph, &CudaDriver::graph_destroy>;
using GraphExecHandle = Handle<CUgraphExec, &CudaDriver::graph_exec_destroy>;
using MemoryHandle = Handle<CUdeviceptr, &CudaDriver::memory_free>;
using GranuleHandle = Handle<CUmemGenericAllocationHandle, &CudaDriver::granule_release>;
using HostMemoryHandle = Handle<void*, &CudaDriver::host_free>;
using HostPinHandle = Handle<void*, &CudaDriver::host_unregister>;

}  // namespace hetcomp::gpu

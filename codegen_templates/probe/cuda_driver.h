// The entry points of the CUDA driver that the GPU probe calls, found in libcuda.so.1 at run time.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda_api.h"

namespace gpu_probe {

// A step that cannot be measured, and why, in one sentence.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline CUresult (*error_name)(CUresult, const char**) = nullptr;

// An entry point of the driver. Calling it throws Failure unless it returns CUDA_SUCCESS.
template <class... P>
class Entry {
 public:
  Entry(void* library, const char* symbol) : symbol_(symbol) {
    if (library) call_ = reinterpret_cast<CUresult (*)(P...)>(dlsym(library, symbol));
  }
  explicit operator bool() const { return call_ != nullptr; }
  CUresult raw(P... arguments) const {
    if (!call_) throw Failure(std::string("This driver has no ") + symbol_ + ".");
    return call_(arguments...);
  }
  void operator()(P... arguments) const { require(raw(arguments...)); }
  void require(CUresult result) const {
    if (result == CUDA_SUCCESS) return;
    const char* name = nullptr;
    const bool known = error_name && error_name(result, &name) == CUDA_SUCCESS && name;
    throw Failure(std::string(symbol_) + " failed with CUDA error " + std::to_string(result) +
                  (known ? std::string(" (") + name + ")." : "."));
  }

 private:
  const char* symbol_;
  CUresult (*call_)(P...) = nullptr;
};

// All entry points; those that the driver lacks throw when they are called.
struct Driver {
  using Size = std::size_t;
  void* library = dlopen("libcuda.so.1", RTLD_NOW);
  Entry<unsigned> cuInit{library, "cuInit"};
  Entry<int*> cuDriverGetVersion{library, "cuDriverGetVersion"};
  Entry<int*> cuDeviceGetCount{library, "cuDeviceGetCount"};
  Entry<CUdevice*, int> cuDeviceGet{library, "cuDeviceGet"};
  Entry<char*, int, CUdevice> cuDeviceGetName{library, "cuDeviceGetName"};
  Entry<Size*, CUdevice> cuDeviceTotalMem{library, "cuDeviceTotalMem_v2"};
  Entry<int*, CUdevice_attribute, CUdevice> cuDeviceGetAttribute{library, "cuDeviceGetAttribute"};
  Entry<CUcontext*, CUdevice> cuDevicePrimaryCtxRetain{library, "cuDevicePrimaryCtxRetain"};
  Entry<CUdevice> cuDevicePrimaryCtxRelease{library, "cuDevicePrimaryCtxRelease_v2"};
  Entry<CUcontext> cuCtxSetCurrent{library, "cuCtxSetCurrent"};
  Entry<Size*, Size*> cuMemGetInfo{library, "cuMemGetInfo_v2"};
  Entry<CUdeviceptr*, Size> cuMemAlloc{library, "cuMemAlloc_v2"};
  Entry<CUdeviceptr> cuMemFree{library, "cuMemFree_v2"};
  Entry<void**, Size, unsigned> cuMemHostAlloc{library, "cuMemHostAlloc"};
  Entry<void*> cuMemFreeHost{library, "cuMemFreeHost"};
  Entry<CUdeviceptr*, void*, unsigned> cuMemHostGetDevicePointer{library, "cuMemHostGetDevicePointer_v2"};
  Entry<CUdeviceptr, unsigned, Size, CUstream> cuMemsetD32Async{library, "cuMemsetD32Async"};
  Entry<CUdeviceptr, const void*, Size, CUstream> cuMemcpyHtoDAsync{library, "cuMemcpyHtoDAsync_v2"};
  Entry<void*, CUdeviceptr, Size, CUstream> cuMemcpyDtoHAsync{library, "cuMemcpyDtoHAsync_v2"};
  Entry<CUmodule*, const void*> cuModuleLoadData{library, "cuModuleLoadData"};
  Entry<CUmodule> cuModuleUnload{library, "cuModuleUnload"};
  Entry<CUfunction*, CUmodule, const char*> cuModuleGetFunction{library, "cuModuleGetFunction"};
  Entry<CUfunction, CUfunction_attribute, int> cuFuncSetAttribute{library, "cuFuncSetAttribute"};
  Entry<CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void**,
        void**>
      cuLaunchKernel{library, "cuLaunchKernel"};
  Entry<CUstream*, unsigned> cuStreamCreate{library, "cuStreamCreate"};
  Entry<CUstream> cuStreamDestroy{library, "cuStreamDestroy_v2"};
  Entry<CUstream> cuStreamQuery{library, "cuStreamQuery"};
  Entry<CUevent*, unsigned> cuEventCreate{library, "cuEventCreate"};
  Entry<CUevent> cuEventDestroy{library, "cuEventDestroy_v2"};
  Entry<CUevent, CUstream> cuEventRecord{library, "cuEventRecord"};
  Entry<float*, CUevent, CUevent> cuEventElapsedTime{library, "cuEventElapsedTime"};
  Entry<CUgraph*, unsigned> cuGraphCreate{library, "cuGraphCreate"};
  Entry<CUgraph> cuGraphDestroy{library, "cuGraphDestroy"};
  Entry<CUgraphNode*, CUgraph, const CUgraphNode*, Size, const CUDA_KERNEL_NODE_PARAMS*> cuGraphAddKernelNode{
      library, "cuGraphAddKernelNode_v2"};
  Entry<CUgraphNode*, CUgraph, const CUgraphNode*, Size, const CUDA_BATCH_MEM_OP_NODE_PARAMS*>
      cuGraphAddBatchMemOpNode{library, "cuGraphAddBatchMemOpNode"};
  Entry<CUgraphExec*, CUgraph, unsigned long long> cuGraphInstantiate{library, "cuGraphInstantiateWithFlags"};
  Entry<CUgraphExec, CUstream> cuGraphLaunch{library, "cuGraphLaunch"};
  Entry<CUgraphExec> cuGraphExecDestroy{library, "cuGraphExecDestroy"};

  Driver() {
    if (library)
      error_name = reinterpret_cast<CUresult (*)(CUresult, const char**)>(dlsym(library, "cuGetErrorName"));
  }
};

}  // namespace gpu_probe

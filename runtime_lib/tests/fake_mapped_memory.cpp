// The fake driver's entry points for addresses and memory apart.
#include "fake_mapped_memory.h"

#include "cuda_api.h"
#include "fake_cuda.h"

#define ENTRY extern "C" __attribute__((visibility("default"))) CUresult

extern "C" FakeCuda* fake_cuda();

using fake_mapped_memory::graphs_running;
using fake_mapped_memory::reservations;

ENTRY cuMemGetAllocationGranularity(std::size_t* bytes, const CUmemAllocationProp*,
                                    CUmemAllocationGranularity_flags) {
  return *bytes = fake_mapped_memory::kGranule, CUDA_SUCCESS;
}
ENTRY cuMemAddressReserve(CUdeviceptr* at, std::size_t bytes, std::size_t, CUdeviceptr, unsigned long long) {
  if (const CUresult failed = fake_counted(); failed != CUDA_SUCCESS) return failed;
  *at = reservations.reserve(bytes);
  return *at == 0 ? CUDA_ERROR_INVALID_VALUE : (++fake_cuda()->reservations, CUDA_SUCCESS);
}
ENTRY cuMemAddressFree(CUdeviceptr at, std::size_t bytes) {
  return reservations.free(at, bytes) ? (--fake_cuda()->reservations, CUDA_SUCCESS)
                                      : CUDA_ERROR_INVALID_VALUE;
}
ENTRY cuMemCreate(CUmemGenericAllocationHandle* handle, std::size_t bytes, const CUmemAllocationProp* of,
                  unsigned long long) {
  if (const CUresult failed = fake_counted(); failed != CUDA_SUCCESS) return failed;
  if (fake_cuda()->out_of_memory) return CUDA_ERROR_OUT_OF_MEMORY;
  if (of->type != CU_MEM_ALLOCATION_TYPE_PINNED || of->location.type != CU_MEM_LOCATION_TYPE_DEVICE)
    return CUDA_ERROR_INVALID_VALUE;
  *handle = reservations.create(bytes);
  if (*handle == 0) return CUDA_ERROR_INVALID_VALUE;
  fake_cuda()->device_bytes += bytes;
  return ++fake_cuda()->granules, CUDA_SUCCESS;
}
ENTRY cuMemRelease(CUmemGenericAllocationHandle handle) {
  const std::size_t bytes = reservations.release(handle);
  if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  return --fake_cuda()->granules, CUDA_SUCCESS;
}
ENTRY cuMemMap(CUdeviceptr at, std::size_t bytes, std::size_t offset, CUmemGenericAllocationHandle handle,
               unsigned long long) {
  if (const CUresult failed = fake_counted(); failed != CUDA_SUCCESS) return failed;
  ++fake_cuda()->mappings;
  if (graphs_running > 0 || offset != 0 || !reservations.map(at, bytes, handle))
    return CUDA_ERROR_INVALID_VALUE;
  return ++fake_cuda()->mapped, CUDA_SUCCESS;
}
ENTRY cuMemUnmap(CUdeviceptr at, std::size_t bytes) {
  ++fake_cuda()->mappings;
  if (graphs_running > 0 || !reservations.unmap(at, bytes)) return CUDA_ERROR_INVALID_VALUE;
  fake_cuda()->mapped -= static_cast<int>(bytes / fake_mapped_memory::kGranule);
  return CUDA_SUCCESS;
}
ENTRY cuMemSetAccess(CUdeviceptr at, std::size_t bytes, const CUmemAccessDesc* access, std::size_t count) {
  if (const CUresult failed = fake_counted(); failed != CUDA_SUCCESS) return failed;
  if (count != 1 || access->flags != CU_MEM_ACCESS_FLAGS_PROT_READWRITE) return CUDA_ERROR_INVALID_VALUE;
  return reservations.allow(at, bytes) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

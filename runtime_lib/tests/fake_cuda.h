// What the tests set and read of the fake driver (fake_cuda.cpp).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

// The memory of the device or of the pinned host that an address belongs to, as pairs of first and last + 1
// address: one pair, or where addresses were reserved, those with memory behind them. Returns the number of
// pairs, of which `most` are written.
extern "C" std::size_t fake_cuda_memory(std::uint64_t address, std::uint64_t* pairs, std::size_t most);

// Objects that live (FakeCuda::live), and the bytes of the memory among them that a device may use.
extern "C" void fake_cuda_held(std::uint64_t* objects, std::uint64_t* bytes);

struct FakeCuda {
  // The machine.
  std::atomic<int> version{12040};
  std::atomic<int> devices{1};
  std::atomic<int> compute_capability{90};
  std::atomic<std::size_t> free_bytes{std::size_t{1} << 30};
  std::atomic<std::size_t> taken_of_others{0};  // of free_bytes, of all devices but the first
  std::atomic<bool> out_of_memory{false};       // in spite of free_bytes
  std::atomic<bool> memory_operations{true};
  std::atomic<bool> refuse_pinning{false};  // of memory that others have allocated
  std::atomic<bool> memory_mapping{true};
  std::atomic<std::size_t> most_pinned{SIZE_MAX};  // bytes of one allocation of pinned memory

  // The call with this number, counted from 1, returns fail_result instead of doing anything; calls that only
  // ask or destroy are not counted. 0: none.
  std::atomic<int> fail_call{0};
  std::atomic<int> fail_result{999};
  std::atomic<int> calls{0};
  // Kernels do not come to an end while it is set.
  std::atomic<bool> hang{false};
  // Of nodes that may run in any order, the last goes first.
  std::atomic<bool> reverse{false};

  // Objects that live.
  std::atomic<int> contexts{0}, streams{0}, modules{0}, memories{0}, host_memories{0}, graphs{0}, execs{0};
  std::atomic<int> granules{0}, reservations{0}, events{0};
  std::atomic<std::size_t> device_bytes{0};
  int live() const {
    return contexts + streams + modules + memories + host_memories + graphs + execs + granules +
           reservations + events;
  }
  // Granules that are mapped, and calls that mapped or unmapped.
  std::atomic<int> mapped{0}, mappings{0};
  // Nodes of the graph that was instantiated last.
  std::atomic<int> nodes{0};
};

// Foreign kernels: a test brings their code. A stand-in for a cubin has, behind its 64-byte ELF header, the
// NUL-terminated text "foreign ENTRY SIZE ...": the kernel's name and the bytes of its arguments, without
// Triton's two pointers; more text may follow behind a newline. The loader is asked for every such image (all
// of `bytes`) and answers an id >= 0, or -1: the image is refused. The launcher runs a kernel on the stream's
// thread: 3 numbers of blocks, n arguments as 64-bit words, Triton's two pointers included; it returns a
// CUresult, or kFakeGraphEnds: the graph has no more nodes, which is no failure of the device.
constexpr int kFakeGraphEnds = -1;
extern "C" {
using FakeCudaModuleLoader = int (*)(const void* image, std::size_t bytes);
using FakeCudaLauncher = int (*)(int id, const unsigned* grid, int n, const std::uint64_t* values);
void fake_cuda_set_module_loader(FakeCudaModuleLoader loaded);
void fake_cuda_set_launcher(FakeCudaLauncher launch);
}

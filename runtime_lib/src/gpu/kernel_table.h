// gpu/kernels.json of an artifact: the GPU kernels that were compiled ahead of time, checked.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace hetcomp::gpu {

enum class ArgumentType { kPointer, kInt32, kInt64, kFloat32 };

struct KernelArgument {
  std::string name;
  ArgumentType type;
};

struct KernelRecord {
  std::string name;
  std::string entry;
  int compute_capability;  // 90 is 9.0
  std::string file;        // relative to gpu/
  std::string sha256;
  std::uint32_t num_warps;
  std::uint32_t shared_bytes;          // dynamic, a block
  std::uint64_t global_scratch_bytes;  // a block
  std::vector<KernelArgument> arguments;
};

using KernelsByName = std::map<std::string, KernelRecord, std::less<>>;

struct KernelTable {
  static constexpr int kSchemaMajor = 1;

  // Throws Error. where: the file's name, for messages.
  static KernelTable parse(std::string_view json, const std::string& where);

  // The kernels for a device: those of its compute capability, or of the nearest smaller minor version, whose
  // code it runs too (CUDA C++ Programming Guide, "Binary Compatibility"). Throws Error(HETCOMP_MISSING_ISA)
  // if there are none.
  KernelsByName choose(int compute_capability, const std::string& device) const;

  std::vector<KernelRecord> kernels;
};

}  // namespace hetcomp::gpu

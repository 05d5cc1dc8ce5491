#include "kernel_table.h"

#include <algorithm>
#include <set>

#include "../checked_json.h"
#include "../status.h"

namespace hetcomp::gpu {
namespace {

constexpr std::int32_t kLargestComputeCapability = 999;
constexpr std::uint64_t kMostWarps = 32;  // 1024 threads, the largest block of any device
constexpr std::uint64_t kMostSharedBytes =
    1U << 20;  // beyond any device; the device's own limit is checked later
constexpr std::uint64_t kMostScratchBytes = 1ULL << 32;  // a block
constexpr std::size_t kMostArguments = 256;

ArgumentType argument_type(const CheckedJson& node) {
  const std::string type = node.text();
  if (type == "ptr") return ArgumentType::kPointer;
  if (type == "i32") return ArgumentType::kInt32;
  if (type == "i64") return ArgumentType::kInt64;
  if (type == "f32") return ArgumentType::kFloat32;
  node.refuse("ptr, i32, i64 or f32");
}

KernelRecord kernel_record(const CheckedJson& node) {
  KernelRecord kernel;
  kernel.name = node["name"].text();
  kernel.entry = node["entry"].text();
  if (kernel.entry.empty() || kernel.entry.find('\0') != std::string::npos)
    node["entry"].refuse("the name of a symbol");
  kernel.compute_capability = node["cc"].count(10, kLargestComputeCapability);
  kernel.file = node["file"].inner_path();
  kernel.sha256 = node["sha256"].hex(64);
  kernel.num_warps = static_cast<std::uint32_t>(node["num_warps"].number(1, kMostWarps));
  kernel.shared_bytes = static_cast<std::uint32_t>(node["shared_bytes"].number(0, kMostSharedBytes));
  kernel.global_scratch_bytes = node["global_scratch_bytes"].number(0, kMostScratchBytes);
  for (const CheckedJson& argument : node["arguments"].elements())
    kernel.arguments.push_back({argument["name"].text(), argument_type(argument["type"])});
  if (kernel.arguments.size() > kMostArguments)
    node["arguments"].refuse("a list of at most " + std::to_string(kMostArguments) + " arguments");
  return kernel;
}

std::string in_words(int compute_capability) {
  return std::to_string(compute_capability / 10) + "." + std::to_string(compute_capability % 10);
}

}  // namespace

KernelTable KernelTable::parse(std::string_view text, const std::string& where) {
  const nlohmann::json json = parse_json(text, where);
  const CheckedJson root(json, "", where);
  check_schema(root, kSchemaMajor, where);
  KernelTable table;
  std::set<std::pair<int, std::string>> seen;
  for (const CheckedJson& node : root["kernels"].elements()) {
    table.kernels.push_back(kernel_record(node));
    if (!seen.emplace(table.kernels.back().compute_capability, table.kernels.back().name).second)
      node["name"].refuse("the only one of its name and cc");
  }
  return table;
}

KernelsByName KernelTable::choose(int compute_capability, const std::string& device) const {
  std::set<int> offered;
  for (const KernelRecord& kernel : kernels) offered.insert(kernel.compute_capability);
  const auto above = offered.upper_bound(compute_capability);
  const int chosen = above == offered.begin() ? 0 : *std::prev(above);
  if (chosen / 10 != compute_capability / 10) {
    std::string names;
    for (const int cc : offered) names += (names.empty() ? "" : ", ") + in_words(cc);
    throw Error(HETCOMP_MISSING_ISA, device + " has compute capability " + in_words(compute_capability) +
                                         ", the artifact has GPU kernels for " +
                                         (names.empty() ? "none" : names) + ": compile the model with --cc " +
                                         std::to_string(compute_capability) + ".");
  }
  KernelsByName result;
  for (const KernelRecord& kernel : kernels)
    if (kernel.compute_capability == chosen) result.emplace(kernel.name, kernel);
  return result;
}

}  // namespace hetcomp::gpu

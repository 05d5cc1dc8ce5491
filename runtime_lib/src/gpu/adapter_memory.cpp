#include "adapter_memory.h"

#include <bit>

namespace hetcomp::gpu {

AdapterMemory::AdapterMemory(const CudaDriver& driver, const GpuProgramRecord& program,
                             const ProgramBuffers& buffers, CUstream stream)
    : driver_(driver),
      record_(*program.adapters),
      pairs_(buffers.address({record_.pairs, 0})),
      table_address_(buffers.address({record_.table, 0})),
      stream_(stream),
      table_((record_.weights.size() + 1) * static_cast<std::size_t>(record_.slots) * AdapterRecord::kWords) {
}

std::uint64_t AdapterMemory::bytes(std::span<const GpuPair> pairs) {
  std::uint64_t sum = 0;
  for (const GpuPair& pair : pairs) sum += pair.a_bytes + pair.b_bytes;
  return sum;
}

void AdapterMemory::put(std::int32_t slot, std::uint64_t begin, std::span<const GpuPair> pairs) {
  const auto entry = [&](std::size_t weight) {
    const std::size_t row = weight * static_cast<std::size_t>(record_.slots);
    return std::span(table_).subspan((row + static_cast<std::size_t>(slot)) * AdapterRecord::kWords,
                                     AdapterRecord::kWords);
  };
  for (std::size_t weight = 0; weight < record_.weights.size(); ++weight)
    std::ranges::fill(entry(weight), std::int64_t{0});
  std::uint64_t at = begin;
  for (const GpuPair& pair : pairs) {
    const auto number = static_cast<std::uint64_t>(record_.weights[pair.weight].shape.number_bytes);
    const auto in_numbers = [&](std::uint64_t bytes) { return static_cast<std::int64_t>(bytes / number); };
    const std::span<std::int64_t> words = entry(pair.weight);
    words[0] = in_numbers(at);
    driver_.copy_to_device(pairs_ + at, pair.pair.a, pair.a_bytes, stream_);
    at += pair.a_bytes;
    words[1] = in_numbers(at);
    driver_.copy_to_device(pairs_ + at, pair.pair.b, pair.b_bytes, stream_);
    at += pair.b_bytes;
    words[2] = pair.pair.rank;
    words[3] = std::bit_cast<std::int32_t>(pair.pair.scale);
  }
  driver_.copy_to_device(table_address_, table_.data(), table_.size() * sizeof(std::int64_t), stream_);
  driver_.stream_synchronize(stream_);
}

}  // namespace hetcomp::gpu

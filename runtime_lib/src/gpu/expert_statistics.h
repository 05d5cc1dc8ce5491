// How often the experts of each layer were chosen, and the file of it that the compiler reads.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace hetcomp::gpu {

struct LayerCounts {
  std::uint32_t hand_over;  // of the layer
  std::int32_t top_k;
  std::int64_t tokens;                   // that the layer has seen
  std::span<const std::int64_t> chosen;  // by expert
};

// The text of a file for `hetcomp plan --stats`. layers: at least one, in any order.
std::string expert_statistics_json(std::vector<LayerCounts> layers);

}  // namespace hetcomp::gpu

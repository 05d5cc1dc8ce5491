#include "expert_statistics.h"

#include <algorithm>
#include <nlohmann/json.hpp>

namespace hetcomp::gpu {

std::string expert_statistics_json(std::vector<LayerCounts> layers) {
  // Hand-overs are counted in the order of the step, over all GPUs.
  std::ranges::sort(layers, {}, &LayerCounts::hand_over);
  nlohmann::ordered_json frequency = nlohmann::ordered_json::array();
  for (const LayerCounts& layer : layers) frequency.push_back(layer.chosen);
  const LayerCounts& first = layers.front();
  const nlohmann::ordered_json json{{"top_k", first.top_k},
                                    {"experts", first.chosen.size()},
                                    {"layers", layers.size()},
                                    {"tokens", first.tokens},
                                    {"frequency", frequency}};
  return json.dump();
}

}  // namespace hetcomp::gpu

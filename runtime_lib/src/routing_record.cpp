#include "routing_record.h"

#include <utility>

#include "status.h"

namespace hetcomp {

void RoutingRecord::replay(Routing routing, std::int64_t tokens) {
  const auto choices = static_cast<std::size_t>(tokens * routing.layers * routing.top_k);
  if (tokens < 0 || (tokens > 0 && (routing.layers < 1 || routing.top_k < 1)) ||
      routing.experts.size() != choices || routing.weights.size() != choices)
    throw Error(HETCOMP_INVALID_ARGUMENT, "A routing of " + std::to_string(tokens) + " tokens, " +
                                              std::to_string(routing.layers) + " layers and " +
                                              std::to_string(routing.top_k) + " choices cannot be replayed.");
  replayed_ = std::move(routing);
  replayed_tokens_ = tokens;
}

const hetcomp_routing_hook* RoutingRecord::begin(std::span<const std::int32_t> positions) {
  positions_ = positions;
  routing_.experts.clear();
  routing_.weights.clear();
  routing_.sizes.clear();
  routing_.layers = routing_.top_k = 0;
  refused_.clear();
  out_of_memory_ = false;
  flag_ = HETCOMP_NO_FLAG;
  hook_.host = this;
  hook_.routed = [](void* host, std::uint32_t flag, std::int32_t experts, std::int32_t top_k,
                    std::int32_t* ids, float* weights) {
    auto& self = *static_cast<RoutingRecord*>(host);
    const Shown layer{experts, top_k, ids, weights};
    if (flag == HETCOMP_NO_FLAG) return self.came(layer, false);
    self.flag_ = flag;
    self.awaited_ = layer;
  };
  hook_.came = [](void* host, std::uint32_t flag) {
    auto& self = *static_cast<RoutingRecord*>(host);
    if (flag == self.flag_) self.came(self.awaited_, true);
  };
  return &hook_;
}

void RoutingRecord::came(const Shown& layer, bool from_gpu) noexcept {
  try {
    if (replays()) give(layer, from_gpu);
    add(layer);
  } catch (const std::exception&) {
    out_of_memory_ = true;
  }
}

// All of a layer or nothing: the experts' kernels trust these numbers.
void RoutingRecord::give(const Shown& layer, bool from_gpu) {
  const std::int32_t number = routing_.layers;
  if (from_gpu) refused_ = "the model's routers run on a GPU, where it cannot be replaced";
  if (number >= replayed_.layers) refused_ = "it has fewer layers than the model";
  if (layer.top_k != replayed_.top_k)
    refused_ = "it has " + std::to_string(replayed_.top_k) + " choices of a token, the model " +
               std::to_string(layer.top_k);
  if (!refused_.empty()) return;
  const auto row = [&](std::size_t token) {
    return (number * replayed_tokens_ + positions_[token] % replayed_tokens_) * layer.top_k;
  };
  for (std::size_t t = 0; t < positions_.size(); ++t)
    for (std::int64_t k = 0; k < layer.top_k; ++k) {
      const std::int32_t expert = replayed_.experts[static_cast<std::size_t>(row(t) + k)];
      if (expert >= 0 && expert < layer.experts) continue;
      refused_ =
          "it names expert " + std::to_string(expert) + ", and layers have " + std::to_string(layer.experts);
      return;
    }
  for (std::size_t t = 0; t < positions_.size(); ++t)
    for (std::int64_t k = 0; k < layer.top_k; ++k) {
      const auto to = static_cast<std::int64_t>(t) * layer.top_k + k;
      layer.ids[to] = replayed_.experts[static_cast<std::size_t>(row(t) + k)];
      layer.weights[to] = replayed_.weights[static_cast<std::size_t>(row(t) + k)];
    }
}

void RoutingRecord::add(const Shown& layer) {
  if (routing_.layers++ == 0) routing_.top_k = layer.top_k;
  if (layer.top_k != routing_.top_k) refused_ = "the model's layers choose different numbers of experts";
  routing_.sizes.push_back(layer.experts);
  const auto n = static_cast<std::ptrdiff_t>(positions_.size()) * layer.top_k;
  routing_.experts.insert(routing_.experts.end(), layer.ids, layer.ids + n);
  routing_.weights.insert(routing_.weights.end(), layer.weights, layer.weights + n);
}

const Routing& RoutingRecord::finish() const {
  if (out_of_memory_)
    throw Error(HETCOMP_OUT_OF_MEMORY, "There is no memory left for the routing of a step of " +
                                           std::to_string(positions_.size()) +
                                           " tokens: give fewer at once.");
  std::string why = refused_;
  if (why.empty() && replays() && routing_.layers < replayed_.layers)
    why = "it has " + std::to_string(replayed_.layers) + " layers, the model " +
          std::to_string(routing_.layers);
  if (why.empty()) return routing_;
  throw Error(HETCOMP_INVALID_ARGUMENT,
              std::string(replays() ? "The routing cannot be replayed: " : "The routing cannot be given: ") +
                  why + ".");
}

}  // namespace hetcomp

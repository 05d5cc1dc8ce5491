// How a step routes its tokens, noted as its MoE layers come; or said instead by somebody who replays it.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "hetcomp/hetcomp.h"
#include "hetcomp/program.h"

namespace hetcomp {

struct Routing {
  // By layer, token and choice.
  std::vector<std::int32_t> experts;
  std::vector<float> weights;
  std::int32_t layers = 0;
  std::int32_t top_k = 0;
  std::vector<std::int32_t> sizes;  // experts of each layer of a step
};

// One step at a time; its hook is called by one thread at a time.
class RoutingRecord {
 public:
  RoutingRecord() = default;
  RoutingRecord(const RoutingRecord&) = delete;
  RoutingRecord& operator=(const RoutingRecord&) = delete;

  // In steps from the next one on the experts get this routing, a token that of its position modulo the
  // number of tokens (none: the router's again). Throws Error if its sizes are not those of so many.
  void replay(Routing routing, std::int64_t tokens);
  bool replays() const { return replayed_tokens_ > 0; }

  // For hetcomp_step::routing of a step of tokens at these positions, which must live until finish().
  const hetcomp_routing_hook* begin(std::span<const std::int32_t> positions);
  // What the step's layers chose, or were given. Throws Error where it could not be noted (a step of layers
  // that choose different numbers of experts, or no memory) or given (the routing is of another shape, or
  // a GPU's).
  const Routing& finish() const;

 private:
  // A MoE layer of the step as the hook tells it.
  struct Shown {
    std::int32_t experts = 0;
    std::int32_t top_k = 0;
    std::int32_t* ids = nullptr;
    float* weights = nullptr;
  };

  void came(const Shown& layer, bool from_gpu) noexcept;
  void give(const Shown& layer, bool from_gpu);
  void add(const Shown& layer);

  hetcomp_routing_hook hook_{};
  std::span<const std::int32_t> positions_;
  Routing routing_;
  std::string refused_;  // why the step's routing is not what it should be
  bool out_of_memory_ = false;
  std::uint32_t flag_ = HETCOMP_NO_FLAG;  // of the hand-over that brings awaited_
  Shown awaited_;
  Routing replayed_;
  std::int64_t replayed_tokens_ = 0;
};

}  // namespace hetcomp

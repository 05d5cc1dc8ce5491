// How a step routes its tokens, noted as its MoE layers come; or said instead by somebody who replays it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "hetcomp/hetcomp.h"
#include "hetcomp/program.h"

namespace hetcomp {

// By layer, token and choice.
struct Routing {
  std::vector<std::int32_t> experts;
  std::vector<float> weights;
  std::int32_t layers = 0;
  std::int32_t top_k = 0;
};

// One step at a time; its hook is called by one thread at a time.
class RoutingRecord {
 public:
  RoutingRecord() = default;
  RoutingRecord(const RoutingRecord&) = delete;
  RoutingRecord& operator=(const RoutingRecord&) = delete;

  // For hetcomp_step::routing of a step of so many tokens.
  const hetcomp_routing_hook* begin(std::int64_t tokens);
  // What the step's layers chose. Throws Error where it could not be noted: a step of layers that choose
  // different numbers of experts, or no memory.
  const Routing& finish() const;

 private:
  void add(std::int32_t top_k, const std::int32_t* ids, const float* weights) noexcept;

  hetcomp_routing_hook hook_{};
  Routing routing_;
  std::int64_t tokens_ = 0;
  bool out_of_memory_ = false;
  bool uneven_ = false;
  // Of the layer whose hand-over is awaited.
  std::uint32_t flag_ = HETCOMP_NO_FLAG;
  std::int32_t top_k_ = 0;
  const std::int32_t* ids_ = nullptr;
  const float* weights_ = nullptr;
};

}  // namespace hetcomp

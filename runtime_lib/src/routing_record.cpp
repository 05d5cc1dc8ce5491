#include "routing_record.h"

#include "status.h"

namespace hetcomp {

const hetcomp_routing_hook* RoutingRecord::begin(std::int64_t tokens) {
  tokens_ = tokens;
  routing_.experts.clear();
  routing_.weights.clear();
  routing_.layers = routing_.top_k = 0;
  out_of_memory_ = uneven_ = false;
  flag_ = HETCOMP_NO_FLAG;
  hook_.host = this;
  hook_.routed = [](void* host, std::uint32_t flag, std::int32_t top_k, std::int32_t* ids, float* weights) {
    auto& self = *static_cast<RoutingRecord*>(host);
    if (flag == HETCOMP_NO_FLAG) return self.add(top_k, ids, weights);
    self.flag_ = flag;
    self.top_k_ = top_k;
    self.ids_ = ids;
    self.weights_ = weights;
  };
  hook_.came = [](void* host, std::uint32_t flag) {
    auto& self = *static_cast<RoutingRecord*>(host);
    if (flag == self.flag_) self.add(self.top_k_, self.ids_, self.weights_);
  };
  return &hook_;
}

void RoutingRecord::add(std::int32_t top_k, const std::int32_t* ids, const float* weights) noexcept {
  if (routing_.layers++ == 0) routing_.top_k = top_k;
  uneven_ |= top_k != routing_.top_k;
  const auto n = tokens_ * top_k;
  try {
    routing_.experts.insert(routing_.experts.end(), ids, ids + n);
    routing_.weights.insert(routing_.weights.end(), weights, weights + n);
  } catch (const std::exception&) {
    out_of_memory_ = true;
  }
}

const Routing& RoutingRecord::finish() const {
  if (out_of_memory_)
    throw Error(HETCOMP_OUT_OF_MEMORY, "There is no memory left for the routing of a step of " +
                                           std::to_string(tokens_) + " tokens: give fewer at once.");
  if (uneven_)
    throw Error(HETCOMP_INVALID_ARGUMENT,
                "The routing cannot be given: the model's layers choose different numbers of experts.");
  return routing_;
}

}  // namespace hetcomp

#include "expert_sources.h"

#include "../status.h"

namespace hetcomp::gpu {
namespace {

ExpertAddresses addresses(const StreamOperand& operand, std::int32_t experts, const HostWeights& weights) {
  ExpertAddresses found(static_cast<std::size_t>(experts));
  for (const ExpertSource& source : operand.sources) {
    if (source.weight >= weights.weights.size() ||
        source.experts.size() > weights.weights[source.weight].size() / operand.expert_bytes)
      throw Error(HETCOMP_BAD_ARTIFACT, "gpu/program.json streams experts of weight " +
                                            std::to_string(source.weight) +
                                            " that it has not got: compile the model again.");
    for (std::size_t place = 0; place < source.experts.size(); ++place)
      found[static_cast<std::size_t>(source.experts[place])] =
          weights.weights[source.weight].data() + place * operand.expert_bytes;
  }
  return found;
}

}  // namespace

std::vector<std::vector<ExpertAddresses>> expert_sources(const StreamRecord& record,
                                                         const HostWeights& weights) {
  std::vector<std::vector<ExpertAddresses>> layers;
  for (const StreamLayer& layer : record.layers) {
    std::vector<ExpertAddresses>& operands = layers.emplace_back();
    for (const StreamOperand& operand : layer.operands)
      operands.push_back(addresses(operand, layer.experts, weights));
  }
  return layers;
}

}  // namespace hetcomp::gpu

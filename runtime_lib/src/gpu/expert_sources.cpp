#include "expert_sources.h"

#include "../status.h"

namespace hetcomp::gpu {
namespace {

using Weights = std::span<const std::span<const std::uint8_t>>;

ExpertAddresses addresses(const GpuProgramRecord& program, const StreamOperand& operand, std::int32_t experts,
                          Weights weights) {
  ExpertAddresses found(static_cast<std::size_t>(experts));
  for (const ExpertSource& source : operand.sources) {
    if (source.weight >= weights.size() ||
        source.experts.size() > weights[source.weight].size() / operand.expert_bytes)
      throw Error(HETCOMP_BAD_ARTIFACT, "The program for " + program.device + " streams experts of weight " +
                                            std::to_string(source.weight) +
                                            " that it has not got: compile the model again.");
    for (std::size_t place = 0; place < source.experts.size(); ++place)
      found[static_cast<std::size_t>(source.experts[place])] =
          weights[source.weight].data() + place * operand.expert_bytes;
  }
  return found;
}

}  // namespace

std::vector<std::vector<ExpertAddresses>> expert_sources(const GpuProgramRecord& program, Weights weights) {
  std::vector<std::vector<ExpertAddresses>> layers;
  for (const StreamLayer& layer : program.stream->layers) {
    std::vector<ExpertAddresses>& operands = layers.emplace_back();
    for (const StreamOperand& operand : layer.operands)
      operands.push_back(addresses(program, operand, layer.experts, weights));
  }
  return layers;
}

}  // namespace hetcomp::gpu

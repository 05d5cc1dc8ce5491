#include "weight_stream.h"

#include <utility>

#include "../status.h"

namespace hetcomp::gpu {

WeightStream::WeightStream(const CudaDriver& driver, const DeviceContext& context,
                           const GpuProgramRecord& program, const ProgramBuffers& buffers,
                           const SharedMemory& shared)
    : program_(program), buffers_(buffers), shared_(shared), copies_(driver, context) {}

void WeightStream::attach(std::span<const std::span<const std::uint8_t>> weights,
                          std::function<bool()> good) {
  for (const GraphRecord& graph : program_.graphs)
    for (const WeightPortion& portion : graph.portions)
      for (const WeightCopy& copy : portion.copies)
        if (copy.weight >= weights.size() || copy.bytes > weights[copy.weight].size())
          throw Error(HETCOMP_BAD_ARTIFACT,
                      "The program for " + program_.device + " streams weight " +
                          std::to_string(copy.weight) +
                          ", which is smaller or is not there: compile the model again.");
  weights_.clear();
  for (const std::span<const std::uint8_t> weight : weights) weights_.push_back(weight.data());
  copies_.check_by(std::move(good));
}

void WeightStream::begin(const GraphRecord& graph) {
  if (graph.portions.empty()) return;
  running_ = &graph;
  const HandShake& hand_shake = shared_.hand_shake();
  for (const WeightPortion& portion : graph.portions) {
    if (portion.after) copies_.await(hand_shake.to_cpu_address(*portion.after));
    for (const WeightCopy& copy : portion.copies) {
      copies_.copy(buffers_.address({program_.weight_stream->ring, copy.to}), weights_[copy.weight],
                   copy.bytes);
      bytes_ += copy.bytes;
    }
    copies_.raise(hand_shake.to_gpu_address(portion.flag));
  }
}

// What waits for a GPU that was given up goes on, to its end.
bool WeightStream::end() noexcept {
  if (running_ == nullptr) return true;
  for (const WeightPortion& portion : running_->portions) shared_.hand_shake().raise_to_cpu(portion.flag);
  running_ = nullptr;
  return copies_.finish();
}

}  // namespace hetcomp::gpu

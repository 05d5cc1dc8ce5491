#include "expert_stream.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

namespace hetcomp::gpu {
namespace {

// An expert that is needed with less than this probability is not copied before it is known to be.
constexpr double kLikely = 0.5;

std::vector<std::int32_t> tokens_of_experts(std::span<const std::int32_t> ids, std::int32_t experts) {
  std::vector<std::int32_t> count(static_cast<std::size_t>(experts));
  for (const std::int32_t e : ids)
    if (e >= 0 && e < experts) ++count[static_cast<std::size_t>(e)];
  return count;
}

}  // namespace

ExpertStream::ExpertStream(const CudaDriver& driver, const DeviceContext& context,
                           const GpuProgramRecord& program, const ProgramBuffers& buffers,
                           const SharedMemory& shared, CUstream step_stream, ExpertCopies& copies,
                           const ExpertCache* cache)
    : driver_(driver),
      context_(context),
      program_(program),
      record_(*program.stream),
      buffers_(buffers),
      shared_(shared),
      step_stream_(step_stream),
      copies_(copies),
      cache_(cache),
      rows_(driver, (record_.layers.size() + 1) * record_.row_bytes, "the tables of streamed experts"),
      layers_(record_.layers.size()) {}

void ExpertStream::attach(std::span<const std::span<const std::uint8_t>> weights) {
  std::vector<std::vector<ExpertAddresses>> sources = expert_sources(program_, weights);
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    Layer& layer = layers_[i];
    for (std::size_t o = 0; o < record_.layers[i].operands.size(); ++o) {
      const StreamOperand& operand = record_.layers[i].operands[o];
      layer.operands.push_back({buffers_.address({operand.buffer, operand.offset}), operand.expert_bytes,
                                std::move(sources[i][o])});
      layer.expert_bytes += operand.expert_bytes;
    }
    for (std::int32_t e = 0; e < record_.layers[i].experts; ++e)
      if (layer.operands.front().sources[static_cast<std::size_t>(e)] != nullptr)
        layer.cpu_experts.push_back(e);
  }
  attached_ = true;
}

std::span<std::int32_t> ExpertStream::row(std::size_t index) const {
  return {&word(index, 0), record_.part_offset / sizeof(std::int32_t)};
}

std::int32_t& ExpertStream::word(std::size_t row, std::uint64_t offset) const {
  return *reinterpret_cast<std::int32_t*>(rows_.bytes().data() + row * record_.row_bytes + offset);
}

BufferAddress ExpertStream::place_of(std::size_t row) const {
  return {record_.tables, row * record_.row_bytes};
}

// Of the tables the first rows, before the graph that reads them.
void ExpertStream::send_with_step(std::size_t rows) {
  driver_.copy_to_device(buffers_.address(place_of(0)), rows_.bytes().data(), rows * record_.row_bytes,
                         step_stream_);
}

void ExpertStream::begin(std::int64_t tokens) {
  if (!attached_ || tokens == 0) {
    for (std::size_t i = 0; i <= layers_.size(); ++i) {
      std::ranges::fill(row(i), -1);
      word(i, record_.part_offset) = word(i, record_.ask_offset) = 1;
    }
    send_with_step(layers_.size() + 1);
    for (std::size_t i = 0; i < layers_.size(); ++i)
      shared_.hand_shake().answer(record_.first_flag + static_cast<std::uint32_t>(i));
    return;
  }
  tokens_ = tokens;
  const std::size_t first = expect(0);
  send_with_step(1);
  copy(layers_[0], first);
}

// A copy that failed has failed the graph as well, which has said so.
void ExpertStream::end() noexcept {
  if (tokens_ == 0) return;
  tokens_ = 0;
  for (const StreamLayer& layer : record_.layers) shared_.skip()[layer.hand_over] = 0;
  copies_.finish();
}

// How many of the layer's experts are worth copying before its routing is known, and whether the CPU will
// have a part in it: taking each expert to be as likely as the others.
std::size_t ExpertStream::expect(std::size_t index) {
  Layer& layer = layers_[index];
  const StreamLayer& record = record_.layers[index];
  layer.streamable = layer.cpu_experts;
  if (cache_ != nullptr)
    std::erase_if(layer.streamable, [&](std::int32_t e) { return cache_->holds(index, e); });
  layer.order = layer.streamable;
  layer.copied = 0;
  const double share = std::min(1.0, static_cast<double>(record.top_k) / record.experts);
  const auto tokens = static_cast<double>(tokens_);
  std::size_t wanted = 0;
  if (1.0 - std::pow(1.0 - share, tokens) > kLikely) {
    const double each = std::max(1.0, tokens * share);
    const std::vector expected(layer.order.size(), static_cast<std::int32_t>(each));
    const auto resident = static_cast<double>(record.experts) - static_cast<double>(expected.size());
    wanted = split(layer, expected, record, resident * record_.rates.gpu_expert_us.at(each));
  }
  layer.asked = wanted < layer.order.size();
  word(index, record_.ask_offset) = layer.asked ? 1 : 0;
  return wanted;
}

std::size_t ExpertStream::split(const Layer& layer, std::span<const std::int32_t> tokens,
                                const StreamLayer& record, double resident_us) const {
  return split_experts({.tokens = tokens,
                        .copied = layer.copied,
                        .slots = record_.slots,
                        .step_tokens = tokens_,
                        .resident_us = resident_us,
                        .expert_bytes = static_cast<double>(layer.expert_bytes),
                        .activation_bytes = 4.0 * record.hidden},
                       record_.rates);
}

// Copies experts of the order until `to` of them are on their way; neighbours in memory together.
void ExpertStream::copy(Layer& layer, std::size_t to) {
  const std::size_t bytes = (to - layer.copied) * layer.expert_bytes;
  if (bytes == 0) return;
  copies_.begin_batch(bytes);
  for (const Operand& operand : layer.operands) {
    const auto source = [&](std::size_t slot) {
      return operand.sources[static_cast<std::size_t>(layer.order[slot])];
    };
    for (std::size_t first = layer.copied; first < to;) {
      std::size_t end = first + 1;
      while (end < to && source(end) == source(end - 1) + operand.expert_bytes) ++end;
      copies_.copy(operand.slots + first * operand.expert_bytes, source(first),
                   (end - first) * operand.expert_bytes);
      first = end;
    }
  }
  copies_.end_batch();
  statistics_.experts_copied += static_cast<std::int64_t>(to - layer.copied);
  statistics_.bytes += static_cast<std::int64_t>(bytes);
  layer.copied = to;
}

void ExpertStream::route(std::uint32_t flag) {
  if (tokens_ == 0) return;
  const auto found = std::ranges::find(record_.layers, flag, &StreamLayer::hand_over);
  if (found == record_.layers.end()) return;
  const auto index = static_cast<std::size_t>(found - record_.layers.begin());
  const CurrentContext current(driver_, context_);
  const std::span<std::int32_t> ids = choices(*found);
  const std::size_t streamed = decide(index, tokens_of_experts(ids, found->experts));
  copy(layers_[index], streamed);
  leave_to_cpu(index, ids, streamed);
  const bool last = index + 1 == layers_.size();
  // The row also says whether the next layer's input is wanted.
  const std::size_t ahead = last ? 0 : expect(index + 1);
  copies_.send(buffers_.address(place_of(index + 1)), rows_.bytes().data() + place_of(index + 1).offset,
               record_.row_bytes);
  const auto raised = record_.first_flag + static_cast<std::uint32_t>(index);
  copies_.raise(shared_.hand_shake().to_gpu_address(raised));
  if (!last) copy(layers_[index + 1], ahead);
}

// The layer's routing: experts of the step's tokens.
std::span<std::int32_t> ExpertStream::choices(const StreamLayer& record) const {
  const std::span<std::byte> host = shared_.host(program_.buffers[record.ids].name);
  const auto wanted = static_cast<std::size_t>(tokens_ * record.top_k);
  return {reinterpret_cast<std::int32_t*>(host.data()), std::min(wanted, host.size() / sizeof(std::int32_t))};
}

// Puts the layer's order right and says how many experts of it the GPU computes.
std::size_t ExpertStream::decide(std::size_t index, const std::vector<std::int32_t>& count) {
  Layer& layer = layers_[index];
  const StreamLayer& record = record_.layers[index];
  const auto tokens_of = [&](std::int32_t e) { return count[static_cast<std::size_t>(e)]; };
  // Behind those that are on their way: the others that are needed, those of most tokens first.
  std::stable_sort(layer.order.begin() + static_cast<std::ptrdiff_t>(layer.copied), layer.order.end(),
                   [&](std::int32_t a, std::int32_t b) { return tokens_of(a) > tokens_of(b); });
  while (layer.order.size() > layer.copied && tokens_of(layer.order.back()) == 0) layer.order.pop_back();
  std::vector<std::int32_t> tokens(layer.order.size());
  std::ranges::transform(layer.order, tokens.begin(), tokens_of);
  statistics_.experts_wanted += std::ranges::count_if(tokens, [](std::int32_t n) { return n > 0; });
  std::vector<std::int32_t> others = count;  // of experts that the GPU has
  for (const std::int32_t e : layer.streamable) others[static_cast<std::size_t>(e)] = 0;
  double resident_us = 0;
  for (const std::int32_t n : others)
    if (n > 0) resident_us += record_.rates.gpu_expert_us.at(n);
  return layer.asked ? split(layer, tokens, record, resident_us) : layer.order.size();
}

// Tells the GPU the slots of the first `streamed` experts of the order, and takes their tokens from the CPU.
void ExpertStream::leave_to_cpu(std::size_t index, std::span<std::int32_t> ids, std::size_t streamed) {
  const Layer& layer = layers_[index];
  const std::span<std::int32_t> slots = row(index + 1);
  std::ranges::fill(slots, -1);
  for (std::size_t slot = 0; slot < streamed; ++slot)
    slots[static_cast<std::size_t>(layer.order[slot])] = static_cast<std::int32_t>(slot);
  const bool cpu = streamed < layer.order.size();
  word(index + 1, record_.part_offset) = cpu ? 1 : 0;
  shared_.skip()[record_.layers[index].hand_over] = cpu ? 0 : 1;
  statistics_.layers += streamed > 0 ? 1 : 0;
  if (!cpu) return;
  for (std::int32_t& e : ids)
    if (e >= 0 && e < record_.layers[index].experts && slots[static_cast<std::size_t>(e)] >= 0) e = -1;
}

}  // namespace hetcomp::gpu

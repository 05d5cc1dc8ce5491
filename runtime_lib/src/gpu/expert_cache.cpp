#include "expert_cache.h"

#include <algorithm>
#include <cstring>

#include "../status.h"

namespace hetcomp::gpu {
namespace {

std::vector<CachedLayer> shapes(const StreamRecord& record) {
  std::vector<CachedLayer> layers;
  for (const StreamLayer& layer : record.layers) {
    std::uint64_t bytes = 0;
    for (const StreamOperand& operand : layer.operands) bytes += operand.expert_bytes;
    layers.push_back({layer.experts, layer.top_k, bytes});
  }
  return layers;
}

}  // namespace

ExpertCache::ExpertCache(const CudaDriver& driver, const GpuProgramRecord& program,
                         const ProgramBuffers& buffers, const SharedMemory& shared, CUstream step_stream,
                         ExpertCopies& copies)
    : driver_(driver),
      program_(program),
      stream_record_(*program.stream),
      record_(*program.expert_cache),
      buffers_(buffers),
      shared_(shared),
      step_stream_(step_stream),
      copies_(copies),
      table_(driver, record_.layers.size() * record_.row_bytes, "the table of cached experts"),
      policy_(record_.rule, shapes(stream_record_), record_.slots, record_.bytes_per_step),
      layer_of_(program.flags, kNoLayer) {
  for (std::size_t i = 0; i < stream_record_.layers.size(); ++i) {
    layer_of_[stream_record_.layers[i].hand_over] = i;
    exchanged_.push_back({shared.host(program.buffers[stream_record_.layers[i].ids].name),
                          shared.host(program.buffers[record_.layers[i].sum].name)});
  }
}

void ExpertCache::fill(std::span<const std::span<const std::uint8_t>> weights, bool swaps) {
  sources_ = expert_sources(program_, weights);
  for (std::size_t i = 0; i < record_.layers.size(); ++i) {
    const std::vector<std::int32_t>& first = record_.layers[i].first;
    for (std::size_t slot = 0; slot < first.size(); ++slot) {
      copy({i, first[slot], static_cast<std::int32_t>(slot)});
      policy_.place(i, first[slot], static_cast<std::int32_t>(slot));
    }
  }
  if (!copies_.finish())
    throw Error(HETCOMP_COMPUTE, "The experts for the slots of " + program_.device +
                                     " could not be copied to it; nvidia-smi shows the state of the GPU.");
  swaps_ = swaps;
}

CUdeviceptr ExpertCache::slot(const CacheArrival& arrival, std::size_t operand) const {
  const std::uint64_t bytes = stream_record_.layers[arrival.layer].operands[operand].expert_bytes;
  const CacheOperand& slots = record_.layers[arrival.layer].operands[operand];
  return buffers_.address({slots.buffer, slots.offset + static_cast<std::uint64_t>(arrival.slot) * bytes});
}

void ExpertCache::copy(const CacheArrival& arrival) {
  const StreamLayer& layer = stream_record_.layers[arrival.layer];
  for (std::size_t o = 0; o < layer.operands.size(); ++o)
    copies_.copy(slot(arrival, o), sources_[arrival.layer][o][static_cast<std::size_t>(arrival.expert)],
                 layer.operands[o].expert_bytes);
}

std::vector<CacheArrival> ExpertCache::keep(std::size_t layer, std::span<const std::int32_t> streamed) {
  std::vector<CacheArrival> kept = policy_.keep(layer, streamed);
  coming_.insert(coming_.end(), kept.begin(), kept.end());
  return kept;
}

void ExpertCache::take(const CacheArrival& arrival, std::span<const CUdeviceptr> from) {
  const StreamLayer& layer = stream_record_.layers[arrival.layer];
  for (std::size_t o = 0; o < layer.operands.size(); ++o)
    copies_.copy_on_device(slot(arrival, o), from[o], layer.operands[o].expert_bytes);
  ++taken_;
}

void ExpertCache::send_table() {
  for (std::size_t i = 0; i < policy_.layers(); ++i)
    std::memcpy(table_.bytes().data() + i * record_.row_bytes, policy_.slots(i).data(),
                policy_.slots(i).size_bytes());
  driver_.copy_to_device(buffers_.address({record_.table, 0}), table_.bytes().data(), table_.bytes().size(),
                         step_stream_);
  table_is_old_ = false;
}

void ExpertCache::begin(std::int64_t tokens, bool decode) {
  tokens_ = tokens;
  decode_ = decode;
  begun_ = 0;
  taken_ = 0;
  if (swaps_ && decode) coming_ = policy_.choose();
  if (!coming_.empty()) table_is_old_ = true;
  policy_.begin_step(tokens, decode);
  if (table_is_old_) send_table();
}

void ExpertCache::copy_next() {
  if (all_begun()) return;
  copy(coming_[begun_]);
  copies_.end_batch();
  ++begun_;
}

std::span<std::int32_t> ExpertCache::choices(std::size_t layer) const {
  const std::span<std::byte> host = exchanged_[layer].ids;
  const auto wanted = static_cast<std::size_t>(tokens_ * stream_record_.layers[layer].top_k);
  return {reinterpret_cast<std::int32_t*>(host.data()), std::min(wanted, host.size() / sizeof(std::int32_t))};
}

void ExpertCache::count(std::uint32_t flag) {
  const std::size_t layer = layer_of_[flag];
  if (layer == kNoLayer) return;
  policy_.count(layer, choices(layer));
}

void ExpertCache::leave_to_cpu(std::uint32_t flag) {
  const std::size_t layer = layer_of_[flag];
  if (layer == kNoLayer) return;
  const std::span<const std::int32_t> slots = policy_.slots(layer);
  std::int64_t hits = 0, misses = 0;
  for (std::int32_t& e : choices(layer)) {
    if (e < 0 || e >= static_cast<std::int32_t>(slots.size())) continue;
    if (slots[static_cast<std::size_t>(e)] == CachePolicy::kNone) {
      ++misses;
      continue;
    }
    ++hits;
    e = -1;
  }
  if (!decode_) return;
  statistics_.hits += hits;
  statistics_.misses += misses;
  if (misses > 0) return;
  shared_.skip()[flag] = 1;
  const std::span<std::byte> sum = exchanged_[layer].sum;
  const auto row = static_cast<std::size_t>(stream_record_.layers[layer].hidden) * sizeof(float);
  std::ranges::fill(sum.first(std::min(sum.size(), static_cast<std::size_t>(tokens_) * row)), std::byte{0});
}

// False: not all of them are there.
bool ExpertCache::copy_rest() noexcept {
  try {
    while (!all_begun()) copy_next();
  } catch (const Error&) {
    copies_.finish();
    return false;
  }
  return copies_.finish();
}

void ExpertCache::settle(bool streamed) noexcept {
  if (coming_.empty()) return;
  const bool all = decode_ ? copy_rest() : streamed && taken_ == coming_.size();
  policy_.arrived(all);
  const auto arrived = static_cast<std::int64_t>(all ? coming_.size() : 0);
  (decode_ ? statistics_.swaps : statistics_.kept) += arrived;
  for (const CacheArrival& arrival : coming_)
    if (decode_) statistics_.bytes += static_cast<std::int64_t>(policy_.shape(arrival.layer).expert_bytes);
  coming_.clear();
  begun_ = 0;
  table_is_old_ = true;
}

void ExpertCache::look_ahead() {
  if (tokens_ == 0 || !decode_ || !swaps_) return;
  settle(false);
  policy_.look_ahead();
}

void ExpertCache::end(bool streamed) noexcept {
  if (tokens_ == 0) return;
  tokens_ = 0;
  for (const StreamLayer& layer : stream_record_.layers) shared_.skip()[layer.hand_over] = 0;
  settle(streamed);
}

void ExpertCache::reset_statistics() { statistics_ = {}; }

}  // namespace hetcomp::gpu

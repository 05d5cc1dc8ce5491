#include "expert_cache.h"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>

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

ExpertCache::ExpertCache(const CudaDriver& driver, const DeviceContext& context,
                         const GpuProgramRecord& program, const ProgramBuffers& buffers, CUstream step_stream)
    : driver_(driver),
      context_(context),
      stream_record_(*program.stream),
      record_(*program.expert_cache),
      buffers_(buffers),
      step_stream_(step_stream),
      copies_(create_stream(driver)),
      table_(driver, record_.layers.size() * record_.row_bytes, "the table of cached experts"),
      policy_(record_.rule, shapes(stream_record_), record_.slots, record_.bytes_per_step),
      layer_of_(program.flags, kNoLayer),
      skip_(program.flags) {
  for (std::size_t i = 0; i < stream_record_.layers.size(); ++i)
    layer_of_[stream_record_.layers[i].hand_over] = i;
}

void ExpertCache::fill(const HostWeights& weights, bool swaps) {
  sources_ = expert_sources(stream_record_, weights);
  for (std::size_t i = 0; i < record_.layers.size(); ++i) {
    const std::vector<std::int32_t>& first = record_.layers[i].first;
    for (std::size_t slot = 0; slot < first.size(); ++slot) {
      copy({i, first[slot], static_cast<std::int32_t>(slot)}, step_stream_);
      policy_.place(i, first[slot], static_cast<std::int32_t>(slot));
    }
  }
  driver_.stream_synchronize(step_stream_);
  swaps_ = swaps;
}

void ExpertCache::copy(const CacheArrival& arrival, CUstream stream) {
  const StreamLayer& layer = stream_record_.layers[arrival.layer];
  for (std::size_t o = 0; o < layer.operands.size(); ++o) {
    const std::uint64_t bytes = layer.operands[o].expert_bytes;
    const CacheOperand& slots = record_.layers[arrival.layer].operands[o];
    const auto to = slots.offset + static_cast<std::uint64_t>(arrival.slot) * bytes;
    driver_.copy_to_device(buffers_.address({slots.buffer, to}),
                           sources_[arrival.layer][o][static_cast<std::size_t>(arrival.expert)], bytes,
                           stream);
  }
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
  std::ranges::fill(skip_, std::uint8_t{0});
  all_begun_ = false;
  if (swaps_ && decode) coming_ = policy_.choose();
  if (!coming_.empty()) table_is_old_ = true;
  policy_.begin_step(tokens, decode);
  if (table_is_old_) send_table();
  for (const CacheArrival& arrival : coming_) copy(arrival, copies_.get());
  all_begun_ = true;
}

std::span<std::int32_t> ExpertCache::choices(std::size_t layer) const {
  const StreamLayer& record = stream_record_.layers[layer];
  const std::span<std::byte> host = buffers_.host(record.ids);
  const auto wanted = static_cast<std::size_t>(tokens_ * record.top_k);
  return {reinterpret_cast<std::int32_t*>(host.data()), std::min(wanted, host.size() / sizeof(std::int32_t))};
}

void ExpertCache::count(std::uint32_t flag) {
  const std::size_t layer = layer_of_[flag];
  if (layer == kNoLayer) return;
  policy_.count(layer, choices(layer));
  tokens_seen_ += layer == 0 ? tokens_ : 0;
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
  skip_[flag] = 1;
  const std::span<std::byte> sum = buffers_.host(record_.layers[layer].sum);
  const auto row = static_cast<std::size_t>(stream_record_.layers[layer].hidden) * sizeof(float);
  std::ranges::fill(sum.first(std::min(sum.size(), static_cast<std::size_t>(tokens_) * row)), std::byte{0});
}

void ExpertCache::end() noexcept {
  tokens_ = 0;
  if (coming_.empty()) return;
  const bool all = driver_.stream_synchronize.raw(copies_.get()) == CUDA_SUCCESS && all_begun_;
  policy_.arrived(all);
  for (const CacheArrival& arrival : coming_) {
    statistics_.swaps += all ? 1 : 0;
    statistics_.bytes += static_cast<std::int64_t>(policy_.shape(arrival.layer).expert_bytes);
  }
  coming_.clear();
  table_is_old_ = true;
}

void ExpertCache::reset_statistics() {
  statistics_ = {};
  tokens_seen_ = 0;
  policy_.reset_chosen();
}

std::string ExpertCache::expert_statistics_json() const {
  nlohmann::ordered_json frequency = nlohmann::ordered_json::array();
  for (std::size_t i = 0; i < policy_.layers(); ++i) frequency.push_back(policy_.chosen(i));
  const nlohmann::ordered_json json{{"top_k", policy_.shape(0).top_k},
                                    {"experts", policy_.shape(0).experts},
                                    {"layers", policy_.layers()},
                                    {"tokens", tokens_seen_},
                                    {"frequency", frequency}};
  return json.dump();
}

}  // namespace hetcomp::gpu

#include "expert_stream.h"

#include <algorithm>
#include <cmath>

#include "../status.h"

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
                           ExpertCache* cache)
    : driver_(driver),
      context_(context),
      program_(program),
      record_(*program.stream),
      buffers_(buffers),
      shared_(shared),
      step_stream_(step_stream),
      copies_(copies),
      cache_(cache),
      rows_(driver, record_.rows() * record_.row_bytes, "the tables of streamed experts"),
      layers_(record_.layers.size()),
      slots_(record_.slots) {}

void ExpertStream::attach(std::span<const std::span<const std::uint8_t>> weights) {
  std::vector<std::vector<ExpertAddresses>> sources = expert_sources(program_, weights);
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    Layer& layer = layers_[i];
    for (std::size_t o = 0; o < record_.layers[i].operands.size(); ++o) {
      const StreamOperand& operand = record_.layers[i].operands[o];
      layer.operands.push_back(
          {buffers_.address({operand.buffer, 0}), operand.expert_bytes, std::move(sources[i][o])});
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

CUdeviceptr ExpertStream::table(std::size_t row) const {
  return buffers_.address({record_.tables, row * record_.row_bytes});
}

// Of the tables the first rows, before the graph that reads them.
void ExpertStream::send_with_step(std::size_t rows) {
  driver_.copy_to_device(table(0), rows_.bytes().data(), rows * record_.row_bytes, step_stream_);
}

void ExpertStream::begin(std::int64_t tokens) {
  if (!attached_ || tokens == 0) {
    for (std::size_t i = 0; i < record_.rows(); ++i) {
      std::ranges::fill(row(i), -1);
      word(i, record_.part_offset) = word(i, record_.ask_offset) = 1;
    }
    send_with_step(record_.rows());
    for (std::uint32_t wave = 0; wave < record_.waves(); ++wave)
      shared_.hand_shake().answer(record_.first_flag + wave);
    return;
  }
  tokens_ = tokens;
  computed_ = kNobody;
  std::ranges::fill(slots_, Slot{});
  layers_[0].first_slot = 0;
  layers_[0].lead_us = record_.layers[0].spine_us.at(static_cast<double>(tokens));
  const std::size_t first = expect(0);
  send_with_step(1);
  copy_ahead(0, first);
}

// A copy that failed has failed the graph as well, which has said so. What waits for a GPU that was given up
// goes on, to its end.
bool ExpertStream::end() noexcept {
  if (tokens_ == 0) return true;
  tokens_ = 0;
  for (const StreamLayer& layer : record_.layers) shared_.skip()[layer.hand_over] = 0;
  for (std::uint32_t wave = 0; wave < record_.waves(); ++wave)
    shared_.hand_shake().raise_to_cpu(record_.first_flag + wave);
  bool good = true;
  try {
    for (std::size_t i = 0; i < slots_.size(); ++i) stay(slots_[i], i);
  } catch (const Error&) {
    good = false;
  }
  return copies_.finish() && good;
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
  layer.cache_slot.assign(static_cast<std::size_t>(record.experts), CachePolicy::kNone);
  const double share = std::min(1.0, static_cast<double>(record.top_k) / record.experts);
  const auto tokens = static_cast<double>(tokens_);
  const double each = std::max(1.0, tokens * share);
  layer.most_ahead =
      record_.slots - slots_left(record_.wave, each, static_cast<double>(layer.expert_bytes), record_.rates);
  std::size_t wanted = 0;
  if (1.0 - std::pow(1.0 - share, tokens) > kLikely) {
    const std::vector expected(layer.order.size(), static_cast<std::int32_t>(each));
    const auto resident = static_cast<double>(record.experts) - static_cast<double>(expected.size());
    const double resident_us = resident * record_.rates.gpu_expert_us.at(each);
    wanted = split(index, expected, 0, layer.most_ahead, resident_us).copied;
  }
  layer.asked = wanted < layer.order.size();
  word(record.row - 1, record_.ask_offset) = layer.asked ? 1 : 0;
  return wanted;
}

// ahead: copies that are made before the routing is known.
Split ExpertStream::split(std::size_t index, std::span<const std::int32_t> tokens, std::size_t copied,
                          std::size_t ahead, double resident_us) const {
  const Layer& layer = layers_[index];
  const StreamLayer& record = record_.layers[index];
  const auto expert_bytes = static_cast<double>(layer.expert_bytes);
  const double ahead_us = static_cast<double>(ahead) * expert_bytes / record_.rates.link_bytes_per_us;
  return split_experts({.tokens = tokens,
                        .copied = copied,
                        .most = most_of(record),
                        .slots = record_.slots,
                        .step_tokens = tokens_,
                        .lead_us = std::min(layer.lead_us, ahead_us),
                        .resident_us = resident_us,
                        .expert_bytes = expert_bytes,
                        .activation_bytes = 4.0 * record.hidden},
                       record_.rates);
}

// Copies experts of the order until `to` of them are on their way; neighbours in memory together.
void ExpertStream::copy(std::size_t index, std::size_t to) {
  Layer& layer = layers_[index];
  while (layer.copied < to) {
    make_room(slot_of(layer, layer.copied));
    std::size_t end = layer.copied + 1;
    while (end < to && adjoins(index, end)) ++end;
    copy_run(index, end);
  }
  copies_.end_batch();
}

// Whether the expert at place `next` of the order is copied together with the one before it: it lies behind
// it, in memory and in slots, and its slot needs nothing done before.
bool ExpertStream::adjoins(std::size_t index, std::size_t next) const {
  const Layer& layer = layers_[index];
  const std::size_t at = slot_of(layer, next);
  if (at == 0 || slots_[at].reader > computed_ || slots_[at].stays) return false;
  return std::ranges::all_of(layer.operands, [&](const Operand& operand) {
    const auto source = [&](std::size_t place) {
      return operand.sources[static_cast<std::size_t>(layer.order[place])];
    };
    return source(next) == source(next - 1) + operand.expert_bytes;
  });
}

// Before a slot is overwritten: the copies wait until the GPU has computed what it holds, which may stay.
void ExpertStream::make_room(std::size_t number) {
  Slot& slot = slots_[number];
  if (slot.reader > computed_) {
    const auto flag = record_.first_flag + static_cast<std::uint32_t>(slot.reader);
    copies_.await(shared_.hand_shake().to_cpu_address(flag));
    computed_ = slot.reader;
  }
  stay(slot, number);
}

void ExpertStream::stay(Slot& slot, std::size_t number) {
  if (!slot.stays) return;
  std::vector<CUdeviceptr> from;
  for (const Operand& operand : layers_[slot.stays->layer].operands)
    from.push_back(operand.slots + number * operand.expert_bytes);
  cache_->take(*slot.stays, from);
  slot.stays.reset();
}

void ExpertStream::copy_run(std::size_t index, std::size_t end) {
  Layer& layer = layers_[index];
  const std::size_t first = layer.copied, count = end - first;
  for (const Operand& operand : layer.operands)
    copies_.copy(operand.slots + slot_of(layer, first) * operand.expert_bytes,
                 operand.sources[static_cast<std::size_t>(layer.order[first])], count * operand.expert_bytes);
  for (std::size_t place = first; place < end; ++place) fill_slot(index, place);
  statistics_.experts_copied += static_cast<std::int64_t>(count);
  statistics_.bytes += static_cast<std::int64_t>(count * layer.expert_bytes);
  layer.copied = end;
}

// The expert at that place of the order is in its slot from now on.
void ExpertStream::fill_slot(std::size_t index, std::size_t place) {
  const Layer& layer = layers_[index];
  Slot& slot = slots_[slot_of(layer, place)];
  slot.reader = wave_of(index, place);
  const std::int32_t expert = layer.order[place];
  if (const std::int32_t to = layer.cache_slot[static_cast<std::size_t>(expert)]; to != CachePolicy::kNone)
    slot.stays = {index, expert, to};
}

// Before the layer's routing is known. What is decided then comes behind it, and so the layer's first wave.
void ExpertStream::copy_ahead(std::size_t index, std::size_t wanted) {
  copy(index, std::min(wanted, layers_[index].most_ahead));
}

void ExpertStream::route(std::uint32_t flag) {
  if (tokens_ == 0) return;
  const auto found = std::ranges::find(record_.layers, flag, &StreamLayer::hand_over);
  if (found == record_.layers.end()) return;
  const auto index = static_cast<std::size_t>(found - record_.layers.begin());
  const CurrentContext current(driver_, context_);
  // The GPU has handed the routing out when it was done with the layer before.
  computed_ = std::max(computed_, static_cast<std::int64_t>(found->first_wave) - 1);
  const std::span<std::int32_t> ids = choices(*found);
  const std::size_t streamed = decide(index, tokens_of_experts(ids, found->experts));
  keep(index, streamed);
  leave_to_cpu(index, ids, streamed);
  const bool last = index + 1 == layers_.size();
  // The layer's last row also says whether the next layer's input is wanted.
  const std::size_t ahead = last ? 0 : expect(index + 1);
  send_waves(index, streamed);
  if (last) return;
  layers_[index + 1].first_slot = slot_of(layers_[index], streamed);
  copy_ahead(index + 1, ahead);
}

// The layer's rows of the tables, then its experts, wave by wave.
void ExpertStream::send_waves(std::size_t index, std::size_t streamed) {
  const StreamLayer& record = record_.layers[index];
  copies_.send(table(record.row), rows_.bytes().data() + record.row * record_.row_bytes,
               (record.waves + 1) * record_.row_bytes);
  for (std::uint32_t wave = 0; wave < record.waves; ++wave) {
    const std::uint32_t raised = record_.first_flag + record.first_wave + wave;
    const std::size_t first = wave * record_.wave;
    // The GPU comes to it behind the wave before, and so behind the rows.
    if (wave > 0 && first >= streamed) {
      shared_.hand_shake().answer(raised);
      continue;
    }
    copy(index, std::min(streamed, first + record_.wave));
    copies_.raise(shared_.hand_shake().to_gpu_address(raised));
  }
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
  const std::size_t least = layer.asked ? layer.copied : layer.order.size();
  const auto [streamed, link_free_us] = split(index, tokens, least, layer.copied, resident_us);
  if (index + 1 < layers_.size())
    layers_[index + 1].lead_us =
        link_free_us + record_.layers[index + 1].spine_us.at(static_cast<double>(tokens_));
  // Which come first is all the same to the GPU; neighbours in memory are copied together.
  std::sort(layer.order.begin() + static_cast<std::ptrdiff_t>(layer.copied),
            layer.order.begin() + static_cast<std::ptrdiff_t>(streamed));
  return streamed;
}

// Some of those that are streamed stay in slots of the cache.
void ExpertStream::keep(std::size_t index, std::size_t streamed) {
  if (cache_ == nullptr) return;
  Layer& layer = layers_[index];
  for (const CacheArrival& arrival : cache_->keep(index, std::span(layer.order).first(streamed)))
    layer.cache_slot[static_cast<std::size_t>(arrival.expert)] = arrival.slot;
  for (std::size_t place = 0; place < layer.copied; ++place) fill_slot(index, place);
}

// Tells the GPU the slots of the first `streamed` experts of the order, and takes their tokens from the CPU.
void ExpertStream::leave_to_cpu(std::size_t index, std::span<std::int32_t> ids, std::size_t streamed) {
  const Layer& layer = layers_[index];
  const StreamLayer& record = record_.layers[index];
  const std::size_t whole = record.row + record.waves;
  for (std::size_t i = record.row; i <= whole; ++i) std::ranges::fill(row(i), -1);
  for (std::size_t place = 0; place < streamed; ++place) {
    const auto expert = static_cast<std::size_t>(layer.order[place]);
    const auto slot = static_cast<std::int32_t>(slot_of(layer, place));
    row(record.row + place / record_.wave)[expert] = row(whole)[expert] = slot;
  }
  const bool cpu = streamed < layer.order.size();
  word(whole, record_.part_offset) = cpu ? 1 : 0;
  shared_.skip()[record.hand_over] = cpu ? 0 : 1;
  statistics_.layers += streamed > 0 ? 1 : 0;
  if (!cpu) return;
  const std::span<const std::int32_t> slots = row(whole);
  for (std::int32_t& e : ids)
    if (e >= 0 && e < record.experts && slots[static_cast<std::size_t>(e)] >= 0) e = -1;
}

}  // namespace hetcomp::gpu

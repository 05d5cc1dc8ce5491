#include "cache_policy.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace hetcomp::gpu {
namespace {

constexpr double kEmpty = -std::numeric_limits<double>::infinity();  // an empty slot is colder than any
// Half-lives after which the units of uses start anew; 2^512 is far from overflow.
constexpr double kRescaleAfter = 512;

}  // namespace

CachePolicy::CachePolicy(CacheRule rule, const std::vector<CachedLayer>& layers, std::int32_t slots,
                         std::uint64_t bytes_per_step)
    : rule_(rule), bytes_per_step_(bytes_per_step), most_credit_(bytes_per_step) {
  for (const CachedLayer& shape : layers) {
    const auto experts = static_cast<std::size_t>(shape.experts);
    layers_.push_back({shape, std::vector(experts, kNone),
                       std::vector(static_cast<std::size_t>(std::min(slots, shape.experts)), kNone),
                       std::vector<std::int64_t>(experts), std::vector<double>(experts)});
    most_credit_ = std::max(most_credit_, shape.expert_bytes);
  }
}

void CachePolicy::place(std::size_t layer, std::int32_t expert, std::int32_t slot) {
  ahead_.reset();
  layers_[layer].slot_of[static_cast<std::size_t>(expert)] = slot;
  layers_[layer].held[static_cast<std::size_t>(slot)] = expert;
}

double CachePolicy::unit(std::int64_t tick) const {
  return std::exp2(static_cast<double>(tick - base_) / kHalfLife);
}

void CachePolicy::rescale() {
  const double factor = 1 / unit(now_);
  for (Layer& layer : layers_)
    for (double& uses : layer.uses) uses *= factor;
  base_ = now_;
}

void CachePolicy::begin_step(std::int64_t tokens, bool decode) {
  ahead_.reset();
  decode_ = decode;
  first_ = now_ + 1;
  now_ += decode ? 1 : tokens;
  if (static_cast<double>(now_ - base_) > kRescaleAfter * kHalfLife) rescale();
}

void CachePolicy::count(std::size_t layer, std::span<const std::int32_t> ids) {
  ahead_.reset();
  Layer& l = layers_[layer];
  const auto top_k = static_cast<std::size_t>(l.shape.top_k);
  double use = 0;
  std::int64_t tick = now_;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (i % top_k == 0) {
      if (!decode_) tick = std::min(now_, first_ + static_cast<std::int64_t>(i / top_k));
      if (i == 0 || !decode_) use = unit(tick);
    }
    if (ids[i] < 0 || ids[i] >= l.shape.experts) continue;
    const auto e = static_cast<std::size_t>(ids[i]);
    l.used[e] = tick;
    l.uses[e] += use;
  }
}

double CachePolicy::heat(const Layer& layer, std::int32_t expert) const {
  const auto e = static_cast<std::size_t>(expert);
  return rule_ == CacheRule::kLru ? static_cast<double>(layer.used[e]) : layer.uses[e];
}

bool CachePolicy::may_leave(const Layer& layer, std::int32_t slot) const {
  const std::int32_t e = layer.held[static_cast<std::size_t>(slot)];
  return e == kNone || layer.used[static_cast<std::size_t>(e)] != now_;
}

bool CachePolicy::hotter(double newcomer, double victim) const {
  const bool lru = rule_ == CacheRule::kLru;
  const double margin = lru ? static_cast<double>(kLruMargin) : kLfuMargin * unit(now_);
  return newcomer > 0 && newcomer >= (lru ? 1.0 : kLfuFactor) * victim + margin;
}

// The layer's best swaps, each of the hottest expert outside against the coldest inside that are left.
void CachePolicy::find_swaps(std::size_t index, std::vector<Swap>& found) const {
  const Layer& layer = layers_[index];
  std::vector<std::int32_t> in, out;
  while (in.size() < static_cast<std::size_t>(kMostOfLayer)) {
    std::int32_t victim = kNone;
    double coldest = std::numeric_limits<double>::infinity();
    for (std::int32_t slot = 0; slot < static_cast<std::int32_t>(layer.held.size()); ++slot) {
      if (std::ranges::count(out, slot) || !may_leave(layer, slot)) continue;
      const std::int32_t e = layer.held[static_cast<std::size_t>(slot)];
      if (const double h = e == kNone ? kEmpty : heat(layer, e); victim == kNone || h < coldest) {
        victim = slot;
        coldest = h;
      }
    }
    std::int32_t newcomer = kNone;
    double hottest = 0;
    for (std::int32_t e = 0; e < layer.shape.experts; ++e) {
      if (layer.slot_of[static_cast<std::size_t>(e)] != kNone || std::ranges::count(in, e)) continue;
      if (const double h = heat(layer, e); h > hottest) {
        newcomer = e;
        hottest = h;
      }
    }
    if (victim == kNone || newcomer == kNone || !hotter(hottest, coldest)) return;
    found.push_back({{index, newcomer, victim}, hottest - coldest});
    in.push_back(newcomer);
    out.push_back(victim);
  }
}

std::vector<CachePolicy::Swap> CachePolicy::all_swaps() const {
  std::vector<Swap> swaps;
  for (std::size_t i = 0; i < layers_.size(); ++i) find_swaps(i, swaps);
  std::ranges::stable_sort(swaps, [](const Swap& a, const Swap& b) { return a.gain > b.gain; });
  return swaps;
}

void CachePolicy::look_ahead() { ahead_ = all_swaps(); }

std::vector<CacheArrival> CachePolicy::choose() {
  credit_ = std::min(credit_ + bytes_per_step_, most_credit_);
  const std::vector<Swap> swaps = ahead_ ? std::move(*ahead_) : all_swaps();
  ahead_.reset();
  for (const Swap& swap : swaps) {
    Layer& layer = layers_[swap.arrival.layer];
    if (layer.shape.expert_bytes > credit_) break;
    credit_ -= layer.shape.expert_bytes;
    std::int32_t& held = layer.held[static_cast<std::size_t>(swap.arrival.slot)];
    if (held != kNone) layer.slot_of[static_cast<std::size_t>(held)] = kNone;
    held = swap.arrival.expert;
    coming_.push_back(swap.arrival);
  }
  return coming_;
}

std::vector<CacheArrival> CachePolicy::keep(std::size_t index, std::span<const std::int32_t> passing) {
  ahead_.reset();
  Layer& layer = layers_[index];
  const auto heat_in = [&](std::int32_t slot) {
    const std::int32_t e = layer.held[static_cast<std::size_t>(slot)];
    return e == kNone ? kEmpty : heat(layer, e);
  };
  std::vector<std::int32_t> newcomers(passing.begin(), passing.end()), victims;
  for (std::int32_t slot = 0; slot < static_cast<std::int32_t>(layer.held.size()); ++slot)
    if (may_leave(layer, slot)) victims.push_back(slot);
  std::ranges::sort(newcomers);
  std::ranges::stable_sort(newcomers,
                           [&](std::int32_t a, std::int32_t b) { return heat(layer, a) > heat(layer, b); });
  std::ranges::stable_sort(victims, [&](std::int32_t a, std::int32_t b) { return heat_in(a) < heat_in(b); });
  std::vector<CacheArrival> kept;
  for (std::size_t i = 0; i < std::min(newcomers.size(), victims.size()); ++i) {
    if (!hotter(heat(layer, newcomers[i]), heat_in(victims[i]))) break;
    std::int32_t& held = layer.held[static_cast<std::size_t>(victims[i])];
    if (held != kNone) leaving_.emplace_back(index, held);
    held = newcomers[i];
    kept.push_back({index, newcomers[i], victims[i]});
  }
  coming_.insert(coming_.end(), kept.begin(), kept.end());
  return kept;
}

void CachePolicy::arrived(bool all) {
  ahead_.reset();
  for (const auto& [layer, expert] : leaving_)
    layers_[layer].slot_of[static_cast<std::size_t>(expert)] = kNone;
  leaving_.clear();
  for (const CacheArrival& arrival : coming_) {
    Layer& layer = layers_[arrival.layer];
    if (all) {
      layer.slot_of[static_cast<std::size_t>(arrival.expert)] = arrival.slot;
    } else {
      layer.held[static_cast<std::size_t>(arrival.slot)] = kNone;
    }
  }
  coming_.clear();
}

}  // namespace hetcomp::gpu

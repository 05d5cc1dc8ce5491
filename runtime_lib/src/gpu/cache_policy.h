// Which experts of each layer are in slots of the GPU, and which come into them between two steps:
// bookkeeping alone. See docs/decisions/expert-cache.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

namespace hetcomp::gpu {

enum class CacheRule {
  kLru,  // what was used last is the hottest
  kLfu,  // what was used most, where a use counts half after 256 ticks
};

struct CachedLayer {
  std::int32_t experts;
  std::int32_t top_k;
  std::uint64_t expert_bytes;
};

// An expert that is to be copied to a slot.
struct CacheArrival {
  std::size_t layer;
  std::int32_t expert;
  std::int32_t slot;
};

// Time is counted in ticks: a step of decoding is one, a step of a prompt one for each token. The same calls
// give the same results.
class CachePolicy {
 public:
  static constexpr std::int32_t kNone = -1;
  static constexpr double kHalfLife = 256;  // ticks
  // An expert takes the place of another only if that was used so many ticks before it (LRU), or if it was
  // used so many times as often and so many uses more (LFU).
  static constexpr std::int64_t kLruMargin = 16;
  static constexpr double kLfuFactor = 1.25;
  static constexpr double kLfuMargin = 1.0;
  // So few of a layer at once that a step goes on with nearly all the experts that it had.
  static constexpr int kMostOfLayer = 4;

  // Each layer has so many slots, all empty; bytes_per_step: what may be copied under a step of decoding.
  CachePolicy(CacheRule rule, const std::vector<CachedLayer>& layers, std::int32_t slots,
              std::uint64_t bytes_per_step);

  // Before the first step: the expert lies in that slot, which is empty.
  void place(std::size_t layer, std::int32_t expert, std::int32_t slot);

  // A step begins: of one tick with all its tokens (decoding), or with a tick for each.
  void begin_step(std::int64_t tokens, bool decode);
  // The layer's experts in this step, top_k of each token. Others than 0 .. experts - 1 are left out.
  void count(std::size_t layer, std::span<const std::int32_t> ids);

  // Between steps: what to copy under the next step of decoding. Those that lay in these slots are no longer
  // in the tables; an expert that the last step has used stays. arrived() must come before the next call.
  std::vector<CacheArrival> choose();
  // When all that a step uses was counted and nothing is on its way: looks for what choose() will choose,
  // which is most of its work. The next call of any other function forgets it.
  void look_ahead();
  // In a step of a prompt, whose experts of the layer were counted: which of those that pass through the
  // GPU's memory anyway are so much hotter than what is in slots that they stay in their place, the same
  // margins taken. No budget counts. The tables remain as they are until arrived().
  std::vector<CacheArrival> keep(std::size_t layer, std::span<const std::int32_t> passing);
  // When the copies are over: those experts are in the tables now, or else their slots are empty.
  void arrived(bool all);

  std::size_t layers() const { return layers_.size(); }
  const CachedLayer& shape(std::size_t layer) const { return layers_[layer].shape; }
  // By expert: its slot, or kNone.
  std::span<const std::int32_t> slots(std::size_t layer) const { return layers_[layer].slot_of; }

 private:
  struct Layer {
    CachedLayer shape;
    std::vector<std::int32_t> slot_of;  // by expert
    std::vector<std::int32_t> held;     // by slot: an expert, also one that is on its way; or kNone
    std::vector<std::int64_t> used;     // by expert: tick of its last use
    std::vector<double> uses;           // by expert: decayed, in units that grow with time
  };
  struct Swap {
    CacheArrival arrival;
    double gain;
  };

  double heat(const Layer& layer, std::int32_t expert) const;  // ticks, or units of uses
  bool may_leave(const Layer& layer, std::int32_t slot) const;
  bool hotter(double newcomer, double victim) const;  // by the margins
  void find_swaps(std::size_t index, std::vector<Swap>& found) const;
  std::vector<Swap> all_swaps() const;   // the best first
  double unit(std::int64_t tick) const;  // what a use at that tick counts
  void rescale();

  CacheRule rule_;
  std::vector<Layer> layers_;
  std::uint64_t bytes_per_step_;
  std::uint64_t most_credit_ = 0;
  std::uint64_t credit_ = 0;  // bytes; an expert of more than a step's comes after several
  std::int64_t now_ = 0;      // tick of the last step's last token
  std::int64_t first_ = 1;    // of its first
  std::int64_t base_ = 0;     // tick at which a use counts 1
  bool decode_ = false;
  std::optional<std::vector<Swap>> ahead_;
  std::vector<CacheArrival> coming_;
  std::vector<std::pair<std::size_t, std::int32_t>> leaving_;  // layer and expert: in tables until arrived()
};

}  // namespace hetcomp::gpu

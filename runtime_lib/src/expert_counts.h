// How often the experts of each MoE layer are chosen, of all sequences and of each.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "routing_record.h"

namespace hetcomp {

// For several threads at once.
class ExpertCounts {
 public:
  // From now on, with nothing counted yet; a choice counts half of a new one once half_life more tokens were
  // counted (0: as much as a new one, always), of those of its sequence for the sequence's counts.
  void begin(std::int64_t half_life);
  void stop();
  bool counting() const;
  // Nothing is counted any more, or of the sequence in that slot.
  void reset();
  void forget(std::int32_t slot);

  // A step's routing; slots: of its tokens.
  void add(const Routing& routing, std::span<const std::int32_t> slots);

  // The text of a file for `hetcomp plan --stats`, of the sequence in that slot or of all. Throws Error where
  // no token was counted.
  std::string json(std::optional<std::int32_t> slot = std::nullopt) const;

 private:
  // In units that grow with every token, so that what is old need not be touched.
  struct Table {
    std::vector<std::vector<double>> chosen;  // by layer and expert
    std::int64_t tokens = 0;
    double unit = 1;

    void fade(std::int64_t newer, std::int64_t half_life);
  };

  static void count(Table& table, const Routing& routing, std::size_t token, std::size_t tokens);

  mutable std::mutex mutex_;
  bool counting_ = false;
  std::int64_t half_life_ = 0;
  std::int32_t top_k_ = 0;
  Table all_;
  std::map<std::int32_t, Table> by_slot_;
};

}  // namespace hetcomp

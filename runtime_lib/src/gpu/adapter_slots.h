// Which slots of the GPUs' tables, and which parts of their memory for pairs, adapters have.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

namespace hetcomp::gpu {

// What an adapter has of the GPUs until its last owner goes.
struct AdapterPlace {
  std::int32_t slot;
  std::vector<std::uint64_t> begin;  // by GPU: where its pairs begin
};

// Thread safe; places may outlive it.
class AdapterSlots {
 public:
  // bytes: of each GPU's memory for pairs.
  AdapterSlots(std::int32_t slots, std::vector<std::uint64_t> bytes);

  // Whether there could be room at all for pairs of so many bytes by GPU.
  bool possible(const std::vector<std::uint64_t>& bytes) const;
  // Null: there is no room at the moment.
  std::shared_ptr<const AdapterPlace> take(const std::vector<std::uint64_t>& bytes);
  std::int32_t slots() const;

 private:
  struct State {
    std::mutex mutex;
    std::vector<std::uint64_t> bytes;
    std::vector<bool> used;                                     // by slot
    std::vector<std::map<std::uint64_t, std::uint64_t>> parts;  // by GPU: begin and end, ascending
    std::optional<std::uint64_t> find(std::size_t gpu, std::uint64_t bytes) const;
  };
  std::shared_ptr<State> state_;
};

}  // namespace hetcomp::gpu

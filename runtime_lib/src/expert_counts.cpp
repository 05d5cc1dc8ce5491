#include "expert_counts.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "status.h"

namespace hetcomp {
namespace {

constexpr double kLargestUnit = 1e200;

}  // namespace

void ExpertCounts::begin(std::int64_t half_life) {
  const std::lock_guard lock(mutex_);
  counting_ = true;
  half_life_ = half_life;
  all_ = {};
  by_slot_.clear();
}

void ExpertCounts::stop() {
  const std::lock_guard lock(mutex_);
  counting_ = false;
}

bool ExpertCounts::counting() const {
  const std::lock_guard lock(mutex_);
  return counting_;
}

void ExpertCounts::reset() {
  const std::lock_guard lock(mutex_);
  all_ = {};
  by_slot_.clear();
}

void ExpertCounts::forget(std::int32_t slot) {
  const std::lock_guard lock(mutex_);
  by_slot_.erase(slot);
}

void ExpertCounts::Table::fade(std::int64_t newer, std::int64_t half_life) {
  tokens += newer;
  if (half_life == 0) return;
  unit *= std::exp2(static_cast<double>(newer) / static_cast<double>(half_life));
  if (unit < kLargestUnit) return;
  for (std::vector<double>& layer : chosen)
    for (double& count : layer) count /= unit;
  unit = 1;
}

void ExpertCounts::count(Table& table, const Routing& routing, std::size_t token, std::size_t tokens) {
  table.chosen.resize(routing.sizes.size());
  const auto top_k = static_cast<std::size_t>(routing.top_k);
  for (std::size_t layer = 0; layer < routing.sizes.size(); ++layer) {
    table.chosen[layer].resize(static_cast<std::size_t>(routing.sizes[layer]));
    const std::int32_t* const choices = routing.experts.data() + (layer * tokens + token) * top_k;
    for (std::size_t k = 0; k < top_k; ++k)
      if (choices[k] >= 0 && choices[k] < routing.sizes[layer])
        table.chosen[layer][static_cast<std::size_t>(choices[k])] += table.unit;
  }
}

void ExpertCounts::add(const Routing& routing, std::span<const std::int32_t> slots) {
  const std::lock_guard lock(mutex_);
  if (!counting_ || routing.sizes.empty()) return;
  top_k_ = routing.top_k;
  for (std::size_t token = 0; token < slots.size(); ++token)
    for (Table* const table : {&all_, &by_slot_[slots[token]]}) {
      table->fade(1, half_life_);
      count(*table, routing, token, slots.size());
    }
}

std::string ExpertCounts::json(std::optional<std::int32_t> slot) const {
  const std::lock_guard lock(mutex_);
  const auto found = slot ? by_slot_.find(*slot) : by_slot_.end();
  const Table* const table = !slot ? &all_ : found == by_slot_.end() ? nullptr : &found->second;
  if (table == nullptr || table->tokens == 0)
    throw Error(HETCOMP_INVALID_ARGUMENT,
                std::string("No token's experts were counted") + (slot ? " in this session" : "") +
                    ": begin to count (hetcomp_model_count_experts) before the steps that are wanted.");
  nlohmann::ordered_json frequency = nlohmann::ordered_json::array();
  for (const std::vector<double>& layer : table->chosen) {
    frequency.push_back(layer);
    for (nlohmann::ordered_json& count : frequency.back()) count = count.get<double>() / table->unit;
  }
  return nlohmann::ordered_json{{"top_k", top_k_},
                                {"experts", table->chosen.front().size()},
                                {"layers", table->chosen.size()},
                                {"tokens", table->tokens},
                                {"half_life", half_life_},
                                {"frequency", frequency}}
      .dump();
}

}  // namespace hetcomp

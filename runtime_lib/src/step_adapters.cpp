#include "step_adapters.h"

#include <algorithm>

namespace hetcomp {

void StepAdapters::reserve(const hetcomp_program& program, std::int64_t rank) {
  if (rank <= rank_) return;
  const std::int64_t numbers = program.adapter_floats + program.adapter_rows * rank;
  scratch_ = Memory(static_cast<std::size_t>(numbers) * sizeof(float), "what adapters add");
  rank_ = rank;
}

const hetcomp_adapters* StepAdapters::fill(std::span<const Adapter* const> adapters,
                                           std::span<const std::int32_t> logit_rows) {
  different_.clear();
  tables_.clear();
  of_token_.clear();
  of_logit_row_.clear();
  std::int64_t rank = 0;
  for (const Adapter* adapter : adapters) {
    std::int32_t index = -1;
    if (adapter != nullptr) {
      const auto found = std::ranges::find(different_, adapter);
      index = static_cast<std::int32_t>(found - different_.begin());
      if (found == different_.end()) {
        different_.push_back(adapter);
        tables_.push_back(adapter->table());
        rank = std::max(rank, adapter->rank());
      }
    }
    of_token_.push_back(index);
  }
  if (different_.empty()) return nullptr;
  for (const std::int32_t row : logit_rows) of_logit_row_.push_back(of_token_[static_cast<std::size_t>(row)]);
  told_ = {
      .of_token = of_token_.data(),
      .of_logit_row = of_logit_row_.data(),
      .n = static_cast<std::int64_t>(tables_.size()),
      .tables = tables_.data(),
      .rank = rank,
      .scratch = reinterpret_cast<float*>(scratch_.data()),
  };
  return &told_;
}

}  // namespace hetcomp

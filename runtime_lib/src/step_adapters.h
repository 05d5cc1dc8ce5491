// What a step is told of its tokens' adapters.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "adapter.h"
#include "hetcomp/program.h"
#include "memory.h"

namespace hetcomp {

// For one thread at a time.
class StepAdapters {
 public:
  // Takes the memory that `program` needs for adapters of this rank. Throws Error if there is none.
  void reserve(const hetcomp_program& program, std::int64_t rank);

  // adapters: by token, null where it has none; empty: no token has. All of a rank that was reserved. Valid
  // until the next call; null: no token has one.
  const hetcomp_adapters* fill(std::span<const Adapter* const> adapters,
                               std::span<const std::int32_t> logit_rows);

 private:
  std::int64_t rank_ = 0;
  Memory scratch_;
  std::vector<const Adapter*> different_;
  std::vector<const hetcomp_pair* const*> tables_;
  std::vector<std::int32_t> of_token_;
  std::vector<std::int32_t> of_logit_row_;
  hetcomp_adapters told_{};
};

}  // namespace hetcomp

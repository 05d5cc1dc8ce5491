// Limits of the control groups (v1 and v2) that this process is in.
#pragma once

#include <cstdint>
#include <optional>

namespace hetcomp {

// CPUs' worth of time per period (1.5: one and a half cores), the smallest over all enclosing groups.
std::optional<double> cgroup_cpu_quota();

// Bytes until the tightest memory limit, page cache counted as free; the largest number if there is no limit.
std::uint64_t cgroup_memory_left();

}  // namespace hetcomp

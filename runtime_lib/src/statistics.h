// What the runtime measured.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "gpu/expert_stream.h"
#include "numa.h"

namespace hetcomp {

// decode: every sequence of the step gets one token.
enum class Phase { kPrefill, kDecode };

struct PhaseStatistics {
  std::int64_t steps = 0;
  std::int64_t tokens = 0;
  double seconds = 0;
  std::vector<std::int64_t> timer_ns;
};

// One of the artifact's NUMA nodes here.
struct NodeStatistics {
  int node;
  int machine_node;  // kNoNode: not bound
  int threads;
  std::uint64_t weight_bytes;
};

// A GPU that runs a program of the artifact.
struct GpuUse {
  std::string name;
  int ordinal;          // as the driver counts
  std::uint64_t bytes;  // of its memory
};

struct GpuStatistics {
  std::vector<GpuUse> devices;
  std::map<std::int32_t, std::int64_t> steps;   // by the batch size of the graph that was run
  std::optional<gpu::StreamStatistics> stream;  // of experts that were copied to GPUs in prompts
  std::optional<gpu::CacheStatistics> cache;    // of experts that they keep
  std::optional<std::uint64_t> weight_bytes;    // copied to GPUs in prompts, of other weights
};

struct Statistics {
  double load_seconds = 0;
  std::uint64_t weight_bytes = 0;
  std::uint64_t state_bytes = 0;
  std::uint64_t arena_bytes = 0;
  std::vector<NodeStatistics> nodes;
  std::optional<GpuStatistics> gpu;
  std::vector<std::string> notes;  // a sentence each: what makes it slower than it could be
  std::array<PhaseStatistics, 2> phases;

  PhaseStatistics& phase(Phase phase) { return phases[phase == Phase::kPrefill ? 0 : 1]; }
};

// timer_names may be shorter than the timers; the rest is numbered.
std::string to_json(const Statistics& statistics, const std::vector<std::string>& timer_names, int threads,
                    const std::string& isa, const std::string& weights);

}  // namespace hetcomp

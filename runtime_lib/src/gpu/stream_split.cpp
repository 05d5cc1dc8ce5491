#include "stream_split.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace hetcomp::gpu {
namespace {

// How much longer the CPU's experts and the copies take for each other's sake, as in the planner's
// simulation: passes/memory_contention.py says by what measurements.
struct BothAtOnce {
  double cpu_us = 0;
  double copies_us = 0;
};

// While the CPU computes experts that take it cpu_us alone, of `read` bytes, and `copied` bytes are copied
// beside them or behind.
BothAtOnce beside_copies(double cpu_us, double copied, double read, const StreamRates& rates) {
  if (cpu_us == 0 || copied == 0) return {};
  constexpr double kReads = 0.5, kCopies = 1.05;
  const double joint = rates.joint_bytes_per_us, reads = read / cpu_us;
  const double both_us = std::min(cpu_us, copied / rates.link_bytes_per_us);
  const double part = std::min(1.0, reads / joint);
  const double least = (reads + rates.link_bytes_per_us) / joint;
  return {(std::max(1.0 + kReads * part * (1.0 - part), least) - 1.0) * both_us,
          (std::max(reads > 0 ? kCopies : 1.0, least) - 1.0) * both_us};
}

}  // namespace

double TimeCurve::at(double tokens) const {
  if (points_.size() == 1) return points_.front().second;
  std::size_t i = 1;
  while (i + 1 < points_.size() && static_cast<double>(points_[i].first) < tokens) ++i;
  const auto [x0, y0] = points_[i - 1];
  const auto [x1, y1] = points_[i];
  const double slope = (y1 - y0) / static_cast<double>(x1 - x0);
  return std::max(0.0, y0 + slope * (tokens - static_cast<double>(x0)));
}

Split split_experts(const SplitInput& input, const StreamRates& rates) {
  const std::size_t most = std::min(input.tokens.size(), input.most);
  // One direction of what a layer's experts on the CPU cost beside their work: their input, or their sum.
  const double exchange =
      static_cast<double>(input.step_tokens) * input.activation_bytes / rates.link_bytes_per_us;
  const double copy = input.expert_bytes / rates.link_bytes_per_us;
  std::vector<double> cpu_us(input.tokens.size() + 1);  // of the experts from i on
  std::vector<double> read(input.tokens.size() + 1);    // of their weights
  for (std::size_t i = input.tokens.size(); i-- > 0;) {
    const std::int32_t tokens = input.tokens[i];
    cpu_us[i] = cpu_us[i + 1] + (tokens > 0 ? rates.cpu_expert_us.at(tokens) : 0.0);
    read[i] = read[i + 1] + (tokens > 0 ? input.expert_bytes : 0.0);
  }
  double gpu = input.resident_us;
  double best_us = std::numeric_limits<double>::infinity();
  Split best{input.copied, 0.0};
  for (std::size_t n = 0; n <= most; ++n) {
    if (n > 0 && input.tokens[n - 1] > 0) gpu += rates.gpu_expert_us.at(input.tokens[n - 1]);
    if (n < std::min(input.copied, most)) continue;
    const double shared = cpu_us[n] > 0 ? exchange : 0.0;
    const BothAtOnce beside =
        beside_copies(cpu_us[n], static_cast<double>(n) * input.expert_bytes, read[n], rates);
    const double copies =
        std::max(0.0, static_cast<double>(n) * copy - input.lead_us) + shared + beside.copies_us;
    // What has no slot is copied when the GPU has come to those that have: the layer's first slots are free.
    const double late =
        n > input.slots ? input.resident_us + static_cast<double>(n - input.slots) * copy : 0.0;
    const double link = std::max(copies, late);
    // The sum comes over half of the link where copies have the other.
    const double compute = (n > 0 ? 3 : 2) * shared + std::max(gpu, cpu_us[n] + beside.cpu_us);
    // Of equals the one that copies most: the CPU is free for others.
    if (const double us = std::max(link, compute); us <= best_us) {
      best_us = us;
      best = {n, us - link};
    }
  }
  return best;
}

std::size_t slots_left(std::size_t wave, double each, double expert_bytes, const StreamRates& rates) {
  const double computing = static_cast<double>(wave) * rates.gpu_expert_us.at(each);
  // One more: the GPU has to hear of its first wave.
  const double left = std::ceil(computing * rates.link_bytes_per_us / expert_bytes) + 1;
  const std::size_t most = wave / 2;
  return static_cast<std::size_t>(std::min(left, static_cast<double>(most)));
}

}  // namespace hetcomp::gpu

#include "stream_split.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace hetcomp::gpu {
namespace {

// The CPU's experts take so much longer beside copies: while both want more than the memory gives, each gets
// its part in proportion, as in the planner's simulation (passes/lane_engine.py). copied, read: bytes of
// experts.
double shared_memory_us(double cpu_us, double copied, double read, const StreamRates& rates) {
  const double beside = std::min(copied, cpu_us * rates.link_bytes_per_us);
  return std::max(0.0, (read + beside) / rates.joint_bytes_per_us - cpu_us);
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
  const double spine = rates.spine_us.at(static_cast<double>(input.step_tokens));
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
  Split best{input.copied, spine};
  for (std::size_t n = 0; n <= most; ++n) {
    if (n > 0 && input.tokens[n - 1] > 0) gpu += rates.gpu_expert_us.at(input.tokens[n - 1]);
    if (n < std::min(input.copied, most)) continue;
    const double shared = cpu_us[n] > 0 ? exchange : 0.0;
    const double slowed =
        shared_memory_us(cpu_us[n], static_cast<double>(n) * input.expert_bytes, read[n], rates);
    const double copies =
        std::max(0.0, static_cast<double>(n) * copy - input.lead_us) + shared + (n > 0 ? slowed : 0.0);
    // What has no slot is copied when the GPU has come to those that have: the layer's first slots are free.
    const double late =
        n > input.slots ? input.resident_us + static_cast<double>(n - input.slots) * copy : 0.0;
    const double link = std::max(copies, late);
    const double compute = 2 * shared + std::max(gpu, cpu_us[n] + slowed);
    // Of equals the one that copies most: the CPU is free for others.
    if (const double us = std::max(link, compute); us <= best_us) {
      best_us = us;
      best = {n, us - link + spine};
    }
  }
  return best;
}

std::size_t slots_left(std::size_t wave, double each, double expert_bytes, const StreamRates& rates) {
  const double computing = static_cast<double>(wave) * rates.gpu_expert_us.at(each);
  // One more: the GPU has to hear of its first wave.
  const double left = std::ceil(computing * rates.link_bytes_per_us / expert_bytes) + 1;
  return static_cast<std::size_t>(std::min(left, static_cast<double>(wave / 2)));
}

}  // namespace hetcomp::gpu

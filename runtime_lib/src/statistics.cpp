#include "statistics.h"

#include <nlohmann/json.hpp>

namespace hetcomp {
namespace {

nlohmann::ordered_json phase_json(const PhaseStatistics& phase, const std::vector<std::string>& names) {
  nlohmann::ordered_json timers = nlohmann::ordered_json::object();
  for (std::size_t i = 0; i < phase.timer_ns.size(); ++i) {
    const std::string name = i < names.size() ? names[i] : "timer " + std::to_string(i);
    timers[name] = static_cast<double>(phase.timer_ns[i]) / 1e6;
  }
  return {{"tokens", phase.tokens},
          {"steps", phase.steps},
          {"seconds", phase.seconds},
          {"tokens_per_second", phase.seconds > 0 ? static_cast<double>(phase.tokens) / phase.seconds : 0.0},
          {"timers_ms", timers}};
}

nlohmann::ordered_json node_json(const NodeStatistics& node) {
  nlohmann::ordered_json json{{"node", node.node}, {"machine_node", nullptr}};
  if (node.machine_node != kNoNode) json["machine_node"] = node.machine_node;
  json["threads"] = node.threads;
  json["weight_bytes"] = node.weight_bytes;
  return json;
}

nlohmann::ordered_json gpu_json(const GpuStatistics& gpu) {
  std::int64_t steps = 0;
  nlohmann::ordered_json by_batch = nlohmann::ordered_json::object();
  for (const auto& [batch, count] : gpu.steps) {
    by_batch[std::to_string(batch)] = count;
    steps += count;
  }
  nlohmann::ordered_json devices = nlohmann::ordered_json::array();
  for (const GpuUse& device : gpu.devices)
    devices.push_back({{"name", device.name}, {"number", device.ordinal}, {"bytes", device.bytes}});
  nlohmann::ordered_json json{{"devices", devices}, {"steps", steps}, {"steps_by_batch", by_batch}};
  if (gpu.stream) {
    json["streamed"] = {{"layers", gpu.stream->layers},
                        {"experts_wanted", gpu.stream->experts_wanted},
                        {"experts_copied", gpu.stream->experts_copied},
                        {"bytes", gpu.stream->bytes}};
  }
  if (gpu.weight_bytes) json["streamed_weight_bytes"] = *gpu.weight_bytes;
  if (gpu.cache) {
    const std::int64_t wanted = gpu.cache->hits + gpu.cache->misses;
    const double rate = static_cast<double>(gpu.cache->hits) / static_cast<double>(wanted);
    json["cache"] = {{"hits", gpu.cache->hits},
                     {"misses", gpu.cache->misses},
                     {"hit_rate", wanted > 0 ? nlohmann::json(rate) : nlohmann::json()},
                     {"swaps", gpu.cache->swaps},
                     {"bytes", gpu.cache->bytes},
                     {"kept", gpu.cache->kept}};
  }
  return json;
}

}  // namespace

std::string to_json(const Statistics& statistics, const std::vector<std::string>& timer_names, int threads,
                    const std::string& isa, const std::string& weights) {
  nlohmann::ordered_json nodes = nlohmann::ordered_json::array();
  for (const NodeStatistics& node : statistics.nodes) nodes.push_back(node_json(node));
  nlohmann::ordered_json json = {{"load_seconds", statistics.load_seconds},
                                 {"threads", threads},
                                 {"isa", isa},
                                 {"weights", weights},
                                 {"weight_bytes", statistics.weight_bytes},
                                 {"kv_cache_bytes", statistics.state_bytes},
                                 {"arena_bytes", statistics.arena_bytes},
                                 {"nodes", nodes},
                                 {"notes", statistics.notes},
                                 {"prefill", phase_json(statistics.phases[0], timer_names)},
                                 {"decode", phase_json(statistics.phases[1], timer_names)}};
  if (statistics.gpu) json["gpu"] = gpu_json(*statistics.gpu);
  return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace hetcomp

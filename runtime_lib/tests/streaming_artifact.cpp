#include "streaming_artifact.h"

#include <algorithm>
#include <memory>

namespace hetcomp::fake {
namespace {

using Json = nlohmann::json;

constexpr int kLayers = StreamingArtifact::kLayers;
constexpr int kNumbers = 16;  // of an expert
constexpr std::uint64_t kExpertBytes = kNumbers * sizeof(float);

// Of every table a row is as long as that of all experts and two numbers.
struct Rows {
  explicit Rows(const Streaming& streaming)
      : part(static_cast<std::uint64_t>(4 * streaming.experts + 15) / 16 * 16), bytes(part + 32) {}
  std::uint64_t part, bytes;
};

// Nodes one after the other.
class Line {
 public:
  void kernel(const std::string& name, const Json& arguments) {
    add({{"kernel", name}, {"grid", {1, 1, 1}}, {"arguments", arguments}});
  }
  void raise(int flag) { add({{"hand_over", {{"flag", flag}, {"from", "gpu:0"}, {"to", "cpu"}}}}); }
  void await(int flag) { add({{"hand_over", {{"flag", flag}, {"from", "cpu"}, {"to", "gpu:0"}}}}); }
  const Json& nodes() const { return nodes_; }

 private:
  void add(Json node) {
    node["after"] = nodes_.empty() ? Json::array() : Json::array({nodes_.size() - 1});
    nodes_.push_back(std::move(node));
  }
  Json nodes_ = Json::array();
};

Json place(const std::string& buffer, std::uint64_t offset) {
  return {{"buffer", buffer}, {"offset", offset}};
}

std::uint64_t sums_offset(int experts, int layer) {
  return static_cast<std::uint64_t>(layer) * static_cast<std::uint64_t>((4 * experts + 15) / 16 * 16);
}

Json nodes(const Streaming& streaming, bool prompt) {
  const Rows rows(streaming);
  Line line;
  const auto gather = [&](const Json& table, const Json& slots, int layer) {
    line.kernel("gather", {table,
                           slots,
                           place("sums", sums_offset(streaming.experts, layer)),
                           {{"i32", streaming.experts}},
                           {{"i32", kNumbers}}});
  };
  for (int layer = 0; layer < kLayers; ++layer) {
    line.raise(layer);
    if (streaming.cached > 0)
      gather(place("cached", layer * rows.bytes),
             place("cache_slots", static_cast<std::uint64_t>(layer * streaming.cached) * kExpertBytes),
             layer);
    for (int wave = 0; prompt && wave < streaming.waves; ++wave) {
      const int number = layer * streaming.waves + wave;
      line.await(kLayers + number);
      // Behind row 0 and, for each layer before, its waves' and one more.
      gather(place("tables", static_cast<std::uint64_t>(1 + number + layer) * rows.bytes), place("slots", 0),
             layer);
      line.raise(kLayers + number);
    }
    line.await(layer);
  }
  return line.nodes();
}

Json stream(const Streaming& streaming) {
  const Rows rows(streaming);
  const Json none = Json::array({Json::array({1, 0.0})});
  Json layers = Json::array();
  for (int i = 0; i < kLayers; ++i)
    layers.push_back({{"hand_over", i},
                      {"experts", streaming.experts},
                      {"top_k", StreamingArtifact::kTopK},
                      {"hidden", 1},
                      {"ids", "routing"},
                      {"waves", streaming.waves},
                      {"spine_us", none},
                      {"operands",
                       {{{"buffer", "slots"},
                         {"expert_bytes", kExpertBytes},
                         {"sources", {{{"weight", i}, {"experts", {{0, streaming.experts}}}}}}}}}});
  return {{"slots", streaming.slots},
          {"wave", streaming.wave},
          {"first_flag", kLayers},
          {"tables",
           {{"buffer", "tables"},
            {"row_bytes", rows.bytes},
            {"part_offset", rows.part},
            {"ask_offset", rows.part + 16}}},
          {"rates",
           {{"link_gb_per_s", kExpertBytes / 256.0},
            {"joint_gb_per_s", 1e5},
            {"cpu_expert_us", Json::array({Json::array({1, streaming.cpu_us})})},
            {"gpu_expert_us", none}}},
          {"layers", layers}};
}

Json cache(const Streaming& streaming) {
  Json layers = Json::array(), first = Json::array();
  for (int slot = 0; slot < streaming.cached; ++slot) first.push_back(slot);
  for (int i = 0; i < kLayers; ++i)
    layers.push_back(
        {{"sum", "in"},
         {"first", first},
         {"operands",
          {place("cache_slots", static_cast<std::uint64_t>(i * streaming.cached) * kExpertBytes)}}});
  return {{"policy", "lru"},
          {"slots", streaming.cached},
          {"bytes_per_step", 1},  // of decoding: hardly ever one
          {"table", {{"buffer", "cached"}, {"row_bytes", Rows(streaming).bytes}}},
          {"layers", layers}};
}

}  // namespace

void StreamingArtifact::write(const Streaming& streaming) {
  experts_ = streaming.experts;
  weights_.clear();
  for (int layer = 0; layer < kLayers; ++layer) {
    std::vector<float>& weight = weights_.emplace_back(experts_ * kNumbers);
    for (int e = 0; e < experts_; ++e) std::fill_n(weight.begin() + e * kNumbers, kNumbers, value(layer, e));
  }
  Json program = pristine_;
  const auto buffer = [&](const std::string& name, std::uint64_t bytes, const std::string& kind) {
    program["buffers"].push_back({{"name", name}, {"bytes", bytes}, {"kind", kind}});
  };
  const Rows rows(streaming);
  buffer("slots", static_cast<std::uint64_t>(streaming.slots) * kExpertBytes, "stream");
  buffer("tables", static_cast<std::uint64_t>(1 + kLayers * (streaming.waves + 1)) * rows.bytes, "stream");
  buffer("routing", 4 * kTokens * kTopK, "pinned_out");
  buffer("sums", sums_offset(experts_, kLayers), "pinned_out");
  program["stream"] = stream(streaming);
  if (streaming.cached > 0) {
    buffer("cache_slots", static_cast<std::uint64_t>(kLayers * streaming.cached) * kExpertBytes, "stream");
    buffer("cached", kLayers * rows.bytes, "stream");
    program["expert_cache"] = cache(streaming);
  }
  program["graphs"] = {{{"batch", 1}, {"exact", false}, {"nodes", nodes(streaming, true)}},
                       {{"batch", 2}, {"exact", true}, {"nodes", nodes(streaming, false)}}};
  artifact_.write("program.json", program);
}

gpu::HostWeights StreamingArtifact::host_weights() const {
  gpu::HostWeights all;
  for (const std::vector<float>& weight : weights_)
    all.weights.emplace_back(reinterpret_cast<const std::uint8_t*>(weight.data()),
                             weight.size() * sizeof(float));
  all.regions = all.weights;
  return all;
}

std::unique_ptr<gpu::ProgramSet> StreamingArtifact::load(const gpu::CudaDriver& driver, bool attach,
                                                         const gpu::GpuOptions& options) const {
  auto programs =
      std::make_unique<gpu::ProgramSet>(driver, artifact_.path(), FakeGpuArtifact::programs(), options);
  if (attach) programs->attach(host_weights());
  programs->fill_caches(host_weights());
  return programs;
}

std::span<const float> StreamingArtifact::sums(const gpu::ProgramSet& programs, int layer) const {
  const std::span<std::byte> all = programs.host("sums");
  return {reinterpret_cast<const float*>(all.data() + sums_offset(experts_, layer)),
          static_cast<std::size_t>(experts_)};
}

void StreamingArtifact::step(gpu::ProgramSet& programs, std::int32_t batch, int tokens,
                             const Routing& routing, const Seen& seen) const {
  std::ranges::fill(programs.host("sums"), std::byte{0});
  const std::span<std::byte> host = programs.host("routing");
  const std::span ids(reinterpret_cast<std::int32_t*>(host.data()), static_cast<std::size_t>(tokens * kTopK));
  const auto cpu = [&](gpu::HandShake& hand_shake) {
    for (int layer = 0; layer < kLayers; ++layer) {
      const auto flag = static_cast<std::uint32_t>(layer);
      if (!hand_shake.wait_for_gpu(flag)) return;
      const std::vector<std::int32_t> wanted = routing(layer);
      for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = wanted[i % wanted.size()];
      programs.route(flag);
      seen(layer, ids, programs.skip()[layer] != 0);
      hand_shake.answer(flag);
    }
  };
  programs.run(batch, cpu, tokens);
}

}  // namespace hetcomp::fake

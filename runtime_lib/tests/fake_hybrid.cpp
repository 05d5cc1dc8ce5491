#include "fake_hybrid.h"

#include <xxhash.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <map>
#include <span>

#include "fake_gpu.h"
#include "fake_program.h"
#include "file.h"
#include "gpu/candidate_rows.h"

namespace hetcomp::fake {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr std::int64_t kRowBytes = kWidth * 4;
constexpr std::int64_t kContext = FakeArtifact::kContext;

// Arguments of a kernel: pointers as words, numbers as such.
class Arguments {
 public:
  explicit Arguments(std::span<const std::uint64_t> values) : values_(values) {}
  template <class T>
  T* pointer(std::size_t i) const {
    return reinterpret_cast<T*>(values_[i]);
  }
  // The rows to compute: the number at i, or where that is 0 the one that the pointer at i + 1 leads to.
  std::int64_t rows(std::size_t i) const {
    return values_[i] != 0 ? static_cast<std::int64_t>(values_[i]) : *pointer<const std::int32_t>(i + 1);
  }

 private:
  std::span<const std::uint64_t> values_;
};

void embed(const Arguments& a) {  // ids, table, x, rows
  for (std::int64_t i = 0; i < a.rows(3) * kWidth; ++i)
    a.pointer<float>(2)[i] =
        a.pointer<const float>(1)[a.pointer<const std::int32_t>(0)[i / kWidth] * kWidth + i % kWidth];
}

std::int64_t cache_row = kWidth;  // numbers between the rows of two positions

float* place(const Arguments& a, std::int64_t row, std::int64_t position) {  // a: slots at 2, state at 3
  return a.pointer<float>(3) + (a.pointer<const std::int32_t>(2)[row] * kContext + position) * cache_row;
}

void append(const Arguments& a) {  // y, positions, slots, state, rows
  for (std::int64_t t = 0; t < a.rows(4); ++t)
    std::copy_n(a.pointer<const float>(0) + t * kWidth, kWidth,
                place(a, t, a.pointer<const std::int32_t>(1)[t]));
}

void attend(const Arguments& a) {  // s, positions, slots, state, rows
  for (std::int64_t i = 0; i < a.rows(4) * kWidth; ++i) {
    float sum = 0;
    for (std::int64_t p = 0; p <= a.pointer<const std::int32_t>(1)[i / kWidth]; ++p)
      sum += static_cast<float>(p % 5 + 1) * place(a, i / kWidth, p)[i % kWidth];
    a.pointer<float>(0)[i] = sum;
  }
}

void logits(const Arguments& a) {  // z, logit_rows, head, logits, rows
  for (std::int64_t i = 0; i < a.rows(4) * kVocab; ++i) {
    const float* z = a.pointer<const float>(0) + a.pointer<const std::int32_t>(1)[i / kVocab] * kWidth;
    float sum = 0;
    for (std::int64_t d = 0; d < kWidth; ++d)
      sum += z[d] * a.pointer<const float>(2)[i % kVocab * kWidth + d];
    a.pointer<float>(3)[i] = sum;
  }
}

void best(const Arguments& a) {  // logits, best, rows
  for (std::int64_t r = 0; r < a.rows(2); ++r) {
    const float* row = a.pointer<const float>(0) + r * kVocab;
    const float* most = std::max_element(row, row + kVocab);
    a.pointer<std::int32_t>(1)[r] = std::isfinite(*most) ? static_cast<std::int32_t>(most - row) : -1;
  }
}

std::atomic<bool> spoil{false};

// The tokens from the eighth largest logit on, where they have a place.
void candidates(const Arguments& a) {  // logits, inverse temperatures, candidates, rows
  using gpu::CandidateRows;
  for (std::int64_t r = 0; r < a.rows(3); ++r) {
    float* row = a.pointer<float>(0) + r * kVocab;
    std::int32_t* words = a.pointer<std::int32_t>(2) + r * static_cast<std::int64_t>(CandidateRows::kWords);
    words[0] = -1;
    const float inverse = a.pointer<const float>(1)[r];
    if (inverse == 0) continue;
    std::vector<float> sorted(row, row + kVocab);
    std::ranges::sort(sorted, std::greater<>());
    float total = 0;
    for (const float logit : sorted) total += std::exp((logit - sorted[0]) * inverse);
    std::int32_t* count = words + CandidateRows::kHeader;
    std::int32_t* logits = count + CandidateRows::kSegments;
    std::int32_t* ids = logits + CandidateRows::kSegments * CandidateRows::kPlaces;
    *count = 0;
    for (std::int32_t v = 0; v < kVocab; ++v) {
      if (row[v] < sorted[7]) continue;
      if (*count < static_cast<std::int32_t>(CandidateRows::kPlaces)) {
        logits[*count] = std::bit_cast<std::int32_t>(row[v]);
        ids[*count] = v;
      }
      ++*count;
    }
    words[0] = 1;
    words[1] = std::bit_cast<std::int32_t>(sorted[7]);
    words[2] = std::bit_cast<std::int32_t>(total);
    if (spoil) std::fill_n(row, kVocab, std::numeric_limits<float>::quiet_NaN());
  }
}

struct Kernel {
  std::string name;
  std::size_t pointers;  // arguments before the number of rows
  void (*run)(const Arguments&);
};
const std::array<Kernel, 6> kKernels{{{"embed", 3, embed},
                                      {"append", 4, append},
                                      {"attend", 4, attend},
                                      {"logits", 4, logits},
                                      {"best", 2, best},
                                      {"candidates", 3, candidates}}};

int load(const void* image, std::size_t) {
  const std::string text = static_cast<const char*>(image) + 64;
  for (std::size_t i = 0; i < kKernels.size(); ++i)
    if (text.starts_with("foreign " + kKernels[i].name + " ")) return static_cast<int>(i);
  return -1;
}

int launch(int id, const unsigned*, int n, const std::uint64_t* values) {
  kKernels[static_cast<std::size_t>(id)].run(Arguments({values, static_cast<std::size_t>(n)}));
  return 0;
}

// rows: those of an exact graph; 0: as many as the step has.
Json kernel(const std::string& name, const std::vector<std::string>& pointers, int rows,
            const std::string& count) {
  Json arguments = Json::array();
  for (const std::string& pointer : pointers) arguments.push_back(buffer(pointer));
  arguments.push_back({{"i32", rows}});
  arguments.push_back(buffer(count));
  return {{"kernel", name}, {"grid", {1, 1, 1}}, {"arguments", arguments}};
}

Json hand_over(int flag, const std::string& from, const std::string& to) {
  return {{"hand_over", {{"flag", flag}, {"from", from}, {"to", to}}}};
}

Json graph(int batch, bool exact, bool with_cpu) {
  const int rows = exact ? batch : 0;
  Json nodes = Json::array({kernel("embed", {"ids", "embed", "x"}, rows, "rows")});
  nodes[0]["after"] = Json::array();
  const auto behind = [&](Json node) {
    node["after"] = {nodes.size() - 1};
    nodes.push_back(node);
  };
  const auto through_cpu = [&](int flag) {
    behind(hand_over(flag, "gpu:0", "cpu"));
    behind(hand_over(flag, "cpu", "gpu:0"));
  };
  if (with_cpu) through_cpu(0);
  behind(kernel("append", {with_cpu ? "y" : "x", "positions", "slots", "kv"}, rows, "rows"));
  behind(kernel("attend", {"s", "positions", "slots", "kv"}, rows, "rows"));
  if (with_cpu) through_cpu(1);
  behind(kernel("logits", {with_cpu ? "z" : "s", "logit_rows", "head", "logits"}, rows, "logit_row_count"));
  behind(kernel("best", {"logits", "best"}, rows, "logit_row_count"));
  if (exact)
    behind(kernel("candidates", {"logits", "inverse_temperatures", "candidates"}, rows, "logit_row_count"));
  return {{"batch", batch}, {"exact", exact}, {"nodes", nodes}};
}

Json facts_of(const fs::path& file) {
  return {{"bytes", fs::file_size(file)}, {"sha256", File(file).sha256()}};
}

std::string hash_of(const std::string& bytes) {
  std::array<char, 17> hash{};
  std::snprintf(hash.data(), hash.size(), "%016llx",
                static_cast<unsigned long long>(XXH3_64bits(bytes.data(), bytes.size())));
  return hash.data();
}

}  // namespace

FakeHybrid::FakeHybrid(Parts parts, Cache cache) : parts_(parts), cache_(cache) {
  cache_row = cache == Cache::kShared ? 1 << 16 : kWidth;
  set_foreign_kernels(load, launch);
  write_gpu();
  Json manifest = artifact_.manifest();
  manifest["gpus"] = Json::array({{{"device", "gpu:0"},
                                   {"program", "gpu/program.json"},
                                   {"weight_files", {"weights-00001.safetensors"}}}});
  manifest["pinned"] = Json::array();
  if (parts == Parts::kGpuAndCpu) manifest = cpu_part(manifest);
  if (cache == Cache::kShared) manifest["model"]["kv_tokens"] = kSharedTokens;
  for (const char* file : {"gpu/program.json", "gpu/kernels.json"})
    manifest["files"][file] = facts_of(artifact_.file(file));
  for (const Kernel& each : kKernels)
    manifest["files"]["gpu/" + each.name + ".cubin"] =
        facts_of(artifact_.file("gpu/" + each.name + ".cubin"));
  artifact_.write_manifest(manifest);
}

FakeHybrid::~FakeHybrid() {
  set_foreign_kernels(nullptr, nullptr);
  spoil = false;
}

void FakeHybrid::spoil_sampled_logits() const { spoil = true; }

// The manifest with the program for hand-overs and its weight, which are written here, for those of the fake
// artifact.
Json FakeHybrid::cpu_part(Json manifest) const {
  fs::copy_file(FAKE_HYBRID_PROGRAM, artifact_.file("kernels/lib.so"), fs::copy_options::overwrite_existing);
  const std::string bias = read_file(artifact_.file("weights-00001.safetensors")).substr(64, kRowBytes);
  write_file(artifact_.file("cpu-weights.safetensors"), bias);
  manifest["weights"] = {{{"name", "bias"},
                          {"file", "cpu-weights.safetensors"},
                          {"offset", 0},
                          {"bytes", kRowBytes},
                          {"xxh3_64", hash_of(bias)}}};
  manifest["states"] = Json::array();
  manifest["files"]["cpu-weights.safetensors"] = {{"bytes", kRowBytes}};
  manifest["files"]["kernels/lib.so"] = facts_of(artifact_.file("kernels/lib.so"));
  manifest["pinned"] = {"x", "y", "s", "z"};
  return manifest;
}

Json FakeHybrid::cache_buffer() const {
  const bool shared = cache_ == Cache::kShared;
  const std::int64_t positions = shared ? 4 : 1;  // of a block
  const std::int64_t slot = kContext * cache_row * 4;
  const std::int64_t block = positions * cache_row * 4;
  constexpr std::int64_t kGranule = 2 << 20;
  const std::int64_t spare = shared ? (block + kGranule - 1) / kGranule * kGranule : block;
  return {{"name", "kv"},
          {"bytes", FakeArtifact::kMaxBatch * slot + spare},
          {"kind", "state"},
          {"cache",
           {{"slots", FakeArtifact::kMaxBatch},
            {"slot_bytes", slot},
            {"block_bytes", block},
            {"block_positions", positions},
            {"granule_bytes", kGranule},
            {"granules", shared ? kGranules : 0}}}};
}

void FakeHybrid::write_gpu() const {
  fs::create_directory(artifact_.file("gpu"));
  Json kernels = Json::array();
  for (const Kernel& each : kKernels) {
    std::string text = "foreign " + each.name;
    Json arguments = Json::array();
    for (std::size_t i = 0; i < each.pointers + 2; ++i) {
      const bool number = i == each.pointers;
      text += number ? " 4" : " 8";
      arguments.push_back({{"name", "a" + std::to_string(i)}, {"type", number ? "i32" : "ptr"}});
    }
    const fs::path cubin = artifact_.file("gpu/" + each.name + ".cubin");
    write_cubin(cubin, text);
    kernels.push_back({{"name", each.name},
                       {"entry", each.name},
                       {"cc", 90},
                       {"file", each.name + ".cubin"},
                       {"sha256", File(cubin).sha256()},
                       {"num_warps", 4},
                       {"shared_bytes", 0},
                       {"global_scratch_bytes", 0},
                       {"arguments", arguments}});
  }
  write_file(artifact_.file("gpu/kernels.json"), Json{{"schema", {1, 0}}, {"kernels", kernels}}.dump(1));
  Json buffers = Json::array();
  const auto add = [&](const char* name, std::int64_t bytes, const char* kind) {
    buffers.push_back({{"name", name}, {"bytes", bytes}, {"kind", kind}});
  };
  for (const char* name : {"ids", "positions", "slots"}) add(name, kMaxTokens * 4, "step");
  for (const char* name : {"logit_rows", "inverse_temperatures"}) add(name, kMaxLogitRows * 4, "step");
  for (const char* name : {"rows", "logit_row_count"}) add(name, 4, "step");
  for (const char* name : {"x", "s"}) add(name, kMaxTokens * kRowBytes, "pinned_out");
  for (const char* name : {"y", "z"}) add(name, kMaxTokens * kRowBytes, "pinned_in");
  add("logits", kMaxLogitRows * kVocab * 4, "result");
  add("best", kMaxLogitRows * 4, "pinned_out");
  add("candidates", 4 * static_cast<std::int64_t>(gpu::CandidateRows::kWords) * 4, "pinned_out");
  buffers.push_back(cache_buffer());
  // The weights of the fake artifact, which are the CPU's there.
  Json weights = artifact_.manifest()["weights"];
  for (Json& weight : weights) {
    const Json name = weight["name"];
    const Json bytes = weight["bytes"];
    weight.erase("name");
    weight["to"] = 0;
    buffers.push_back(
        {{"name", name}, {"bytes", bytes}, {"kind", "weight"}, {"sources", Json::array({weight})}});
  }
  const bool with_cpu = parts_ == Parts::kGpuAndCpu;
  const Json program{
      {"schema", {5, 0}},
      {"device", "gpu:0"},
      {"device_bytes", 32 << 20},
      {"flags", with_cpu ? 2 : 0},
      {"buffers", buffers},
      {"graphs", {graph(1, true, with_cpu), graph(4, true, with_cpu), graph(kMaxTokens, false, with_cpu)}}};
  write_file(artifact_.file("gpu/program.json"), program.dump(1));
}

Json FakeHybrid::program() const { return Json::parse(read_file(artifact_.file("gpu/program.json"))); }

void FakeHybrid::write_program(const Json& program) const {
  write_file(artifact_.file("gpu/program.json"), program.dump(1));
  Json manifest = artifact_.manifest();
  manifest["files"]["gpu/program.json"] = facts_of(artifact_.file("gpu/program.json"));
  artifact_.write_manifest(manifest);
}

std::vector<float> FakeHybrid::expected(const std::vector<std::int32_t>& ids) const {
  const std::vector<float> of_ids = artifact_.expected(ids);
  if (parts_ == Parts::kGpu) return of_ids;
  std::vector<float> logits = artifact_.expected({0});  // embed[0] . head
  for (std::size_t v = 0; v < logits.size(); ++v) logits[v] += 2 * 3 * of_ids[v];
  return logits;
}

}  // namespace hetcomp::fake

#include "manifest.h"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "checked_json.h"
#include "file.h"
#include "status.h"

namespace hetcomp {
namespace {

// A manifest lists files and tensors, a few hundred bytes each: 256 MB is beyond any model.
constexpr std::uint64_t kLargestManifest = 256U << 20;
// Every sequence has an entry in a table; a million is beyond any machine.
constexpr std::int32_t kMostSequences = 1 << 20;
// Of a weight, in bytes: beyond any machine, and sums of all stay in range.
constexpr std::uint64_t kLargestWeight = 1ULL << 46;

ModelFacts model_facts(const CheckedJson& node) {
  ModelFacts model;
  model.name = node["name"].text();
  model.architecture = node["architecture"].text();
  model.vocab = node["vocab"].count(1);
  model.context = node["context"].count(1);
  model.max_batch = node["max_batch"].count(1, kMostSequences);
  model.kv_tokens = model.context * model.max_batch;
  if (node.has("kv_tokens"))
    model.kv_tokens =
        static_cast<std::int64_t>(node["kv_tokens"].number(1, static_cast<std::uint64_t>(model.kv_tokens)));
  model.max_tokens = node["max_tokens"].count(1);
  model.max_logit_rows = node["max_logit_rows"].count(1);
  for (const CheckedJson& id : node["eos_token_ids"].elements()) model.eos_token_ids.push_back(id.count(0));
  if (node.has("recurrent")) model.recurrent = node["recurrent"].truth();
  if (node.has("bos_token_id")) model.bos_token_id = node["bos_token_id"].count(0);
  return model;
}

// A name in "files", with a SHA-256 if code or text is read from it.
std::string listed_file(const CheckedJson& node, const Manifest& manifest, bool hashed) {
  std::string file = node.text();
  const auto found = manifest.files.find(file);
  if (found == manifest.files.end()) node.refuse("one of the names in \"files\"");
  if (hashed && found->second.sha256.empty()) node.refuse("a file with a sha256 in \"files\"");
  return file;
}

void read_files(const CheckedJson& node, Manifest& manifest) {
  constexpr auto kLargest = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  for (const auto& [file, record] : node.members()) {
    if (!stays_inside(file)) record.refuse("named by a relative path inside the artifact");
    manifest.files[file] = {record["bytes"].number(0, kLargest),
                            record.has("sha256") ? record["sha256"].hex(64) : ""};
  }
}

void read_nodes(const CheckedJson& root, Manifest& manifest) {
  constexpr std::size_t kMostNodes = 64;  // a plan for more sockets than any x86 machine has
  constexpr std::int32_t kLargestId = 1023;
  if (!root.has("nodes")) return;  // schema 1.0: one node
  manifest.nodes.clear();
  for (const CheckedJson& id : root["nodes"].elements()) {
    manifest.nodes.push_back(id.count(0, kLargestId));
    if (std::ranges::count(manifest.nodes, manifest.nodes.back()) > 1) id.refuse("named once");
  }
  if (manifest.nodes.empty() || manifest.nodes.size() > kMostNodes)
    root["nodes"].refuse("a list of 1 to " + std::to_string(kMostNodes) + " NUMA nodes");
  manifest.main_node = root["main_node"].number(0, manifest.nodes.size() - 1);
}

// In a file of the artifact.
void place_in_file(const CheckedJson& entry, const Manifest& manifest, WeightRecord& weight) {
  weight.file = listed_file(entry["file"], manifest, false);
  const std::uint64_t size = manifest.files.at(weight.file).bytes;
  weight.offset = entry["offset"].number(0, size);
  weight.bytes = entry["bytes"].number(1, std::max<std::uint64_t>(size, 1));
  if (weight.bytes > size - weight.offset)
    entry.refuse("inside " + weight.file + " (" + std::to_string(size) + " bytes)");
  if (weight.offset % Manifest::kAlignment != 0) entry["offset"].refuse("a multiple of 64");
}

// In sources.
void place_in_sources(const CheckedJson& entry, const Manifest& manifest, WeightRecord& weight) {
  if (entry.has("file")) entry["file"].refuse("absent beside \"stored\"");
  weight.bytes = entry["bytes"].number(1, kLargestWeight);
  weight.stored = StoredWeight::parse(entry["stored"], weight.bytes, manifest.sources);
  if (const RowRun* run = weight.stored->in_place(weight.bytes)) {
    weight.file = manifest.sources[run->source].path;
    weight.offset = run->offset;
  }
}

void read_weights(const CheckedJson& node, Manifest& manifest) {
  for (const CheckedJson& entry : node.elements()) {
    WeightRecord weight{entry["name"].text(), "", 0, 0, entry["xxh3_64"].hash_value(), manifest.main_node};
    if (entry.has("stored"))
      place_in_sources(entry, manifest, weight);
    else
      place_in_file(entry, manifest, weight);
    if (entry.has("node")) weight.node = entry["node"].number(0, manifest.nodes.size() - 1);
    if (entry.has("on_demand")) weight.on_demand = entry["on_demand"].truth();
    if (weight.on_demand && !weight.mappable()) entry["on_demand"].refuse("of a weight that can be mapped");
    manifest.weights.push_back(std::move(weight));
  }
}

void read_gpus(const CheckedJson& root, Manifest& manifest, const std::string& where) {
  if (root.has("gpu"))
    throw Error(HETCOMP_BAD_ARTIFACT, where +
                                          " has a GPU as schema 1.1 knew it, which is no longer read: "
                                          "compile the model again.");
  if (!root.has("gpus")) return;
  for (const CheckedJson& node : root["gpus"].elements()) {
    GpuRecord gpu{node["device"].text(), listed_file(node["program"], manifest, true), {}};
    for (const CheckedJson& file : node["weight_files"].elements())
      gpu.weight_files.push_back(listed_file(file, manifest, false));
    for (const GpuRecord& other : manifest.gpus)
      if (other.device == gpu.device) node["device"].refuse("named once");
    manifest.gpus.push_back(std::move(gpu));
  }
  if (manifest.gpus.empty()) root["gpus"].refuse("a list of at least one GPU");
  constexpr const char* kKernels = "gpu/kernels.json";
  const auto kernels = manifest.files.find(kKernels);
  if (kernels == manifest.files.end() || kernels->second.sha256.empty())
    root["gpus"].refuse(std::string("absent, or \"files\" have ") + kKernels + " with a sha256");
  std::set<std::string> seen;
  for (const CheckedJson& name : root["pinned"].elements()) {
    manifest.pinned.push_back(name.text());
    if (!seen.insert(manifest.pinned.back()).second) name.refuse("named once");
  }
}

// A file of weights may go without a SHA-256, for its tensors have a hash each, those for a GPU in its
// program; no other may.
void check_hashes(const CheckedJson& node, const Manifest& manifest) {
  std::set<std::string> of_weights;
  for (const WeightRecord& weight : manifest.weights) of_weights.insert(weight.file);
  for (const GpuRecord& gpu : manifest.gpus)
    of_weights.insert(gpu.weight_files.begin(), gpu.weight_files.end());
  for (const auto& [file, record] : manifest.files)
    if (record.sha256.empty() && !of_weights.contains(file)) node[file].refuse("given with a sha256");
}

StateRecord state_record(const CheckedJson& entry, const ModelFacts& model) {
  const auto slots = static_cast<std::uint64_t>(model.max_batch);
  const auto largest = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()) / slots;
  StateRecord state{entry["name"].text(), entry["bytes_per_slot"].number(1, largest), 0, {}};
  state.bytes = state.bytes_per_slot * slots;
  if (entry.has("bytes")) state.bytes = entry["bytes"].number(1, state.bytes);
  if (!entry.has("rows")) return state;  // schema 1.1
  std::uint64_t position = 0;
  for (const CheckedJson& row : entry["rows"].elements()) {
    state.rows.push_back(row.number(1, state.bytes_per_slot));
    position += state.rows.back();
    if (position > state.bytes_per_slot) break;
  }
  if (state.rows.empty() && model.recurrent) return state;
  const auto context = static_cast<std::uint64_t>(model.context);
  if (position != state.bytes_per_slot / context || state.bytes_per_slot % context != 0)
    entry["rows"].refuse("rows whose sum is what bytes_per_slot has for each position");
  return state;
}

void read_states(const CheckedJson& node, Manifest& manifest) {
  for (const CheckedJson& entry : node.elements())
    manifest.states.push_back(state_record(entry, manifest.model));
}

}  // namespace

Manifest Manifest::parse(std::string_view text, const std::string& where) {
  const nlohmann::json json = parse_json(text, where);
  const CheckedJson root(json, "", where);
  check_schema(root, Manifest::kSchemaMajor, where);
  Manifest manifest;
  manifest.model = model_facts(root["model"]);
  read_files(root["files"], manifest);
  for (const CheckedJson& entry : root["programs"].elements())
    manifest.programs.push_back({entry["isa"].text(), listed_file(entry["file"], manifest, true)});
  if (manifest.programs.empty()) root["programs"].refuse("a list of at least one program");
  read_nodes(root, manifest);
  manifest.sources = SourceRecord::parse(root);
  read_weights(root["weights"], manifest);
  read_gpus(root, manifest, where);
  check_hashes(root["files"], manifest);
  read_states(root["states"], manifest);
  if (root.has("timers"))
    for (const CheckedJson& timer : root["timers"].elements()) manifest.timers.push_back(timer.text());
  if (root.has("tokenizer")) manifest.tokenizer = listed_file(root["tokenizer"], manifest, true);
  if (root.has("chat_template")) manifest.chat_template = listed_file(root["chat_template"], manifest, true);
  return manifest;
}

Manifest Manifest::read(const std::filesystem::path& artifact) {
  std::error_code error;
  if (!std::filesystem::is_directory(artifact, error))
    throw Error(HETCOMP_NOT_FOUND,
                artifact.string() + " is not a folder: give the path of a compiled model.");
  const std::filesystem::path path = artifact / "manifest.json";
  if (!std::filesystem::exists(path, error))
    throw Error(HETCOMP_NOT_FOUND,
                artifact.string() + " is not a hetcomp artifact: it has no manifest.json.");
  const File file(path);
  if (file.size() > kLargestManifest)
    throw Error(HETCOMP_BAD_ARTIFACT, path.string() + " is " + in_words(file.size()) + ": not a manifest.");
  return parse(file.text(), path.string());
}

std::filesystem::path locate(const std::filesystem::path& artifact, const Manifest& manifest,
                             const std::string& file) {
  std::filesystem::path path = inside(artifact, file);
  const std::uint64_t expected = manifest.files.at(file).bytes;
  const std::uint64_t size = File(path).size();
  if (size != expected) {
    throw Error(HETCOMP_BAD_ARTIFACT, path.string() + " has " + std::to_string(size) +
                                          " bytes, the manifest says " + std::to_string(expected) +
                                          ": truncated or replaced; copy the artifact anew.");
  }
  return path;
}

void verify_files(const std::filesystem::path& artifact, const Manifest& manifest) {
  for (const auto& [file, record] : manifest.files) {
    const std::filesystem::path path = locate(artifact, manifest, file);
    if (!record.sha256.empty() && File(path).sha256() != record.sha256) {
      throw Error(HETCOMP_BAD_ARTIFACT,
                  path.string() +
                      " does not have the SHA-256 in the manifest: it is damaged; copy the artifact anew.");
    }
  }
}

}  // namespace hetcomp

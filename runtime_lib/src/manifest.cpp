#include "manifest.h"

#include <algorithm>
#include <charconv>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "file.h"
#include "status.h"

namespace hetcomp {
namespace {

using Json = nlohmann::json;

// A manifest lists files and tensors, a few hundred bytes each: 256 MB is beyond any model.
constexpr std::uint64_t kLargestManifest = 256U << 20;
// Every sequence has an entry in a table; a million is beyond any machine.
constexpr std::int32_t kMostSequences = 1 << 20;

// One value of the manifest with the path that leads to it, for messages.
class Node {
 public:
  Node(const Json& json, std::string path, const std::string& where)
      : json_(json), path_(std::move(path)), where_(where) {}

  [[noreturn]] void refuse(const std::string& expected) const {
    std::string path = path_.empty() ? "it" : path_;
    std::ranges::replace(path, '\0', '?');  // a NUL would end the message
    throw Error(HETCOMP_BAD_ARTIFACT, where_ + " is damaged: " + path + " must be " + expected +
                                          "; compile the model again or copy the artifact anew.");
  }

  Node operator[](const std::string& key) const {
    if (!json_.is_object()) refuse("an object");
    const auto found = json_.find(key);
    const std::string path = path_.empty() ? key : path_ + "." + key;
    if (found == json_.end()) {
      static const Json kMissing = "missing";
      Node(kMissing, path, where_).refuse("present");
    }
    return {*found, path, where_};
  }

  bool has(const std::string& key) const {
    return json_.is_object() && json_.contains(key) && !json_.at(key).is_null();
  }

  std::string text() const {
    if (!json_.is_string()) refuse("a string");
    return json_.get<std::string>();
  }

  std::uint64_t number(std::uint64_t low, std::uint64_t high) const {
    const std::string range = "a whole number from " + std::to_string(low) + " to " + std::to_string(high);
    if (!json_.is_number_integer()) refuse(range);
    if (!json_.is_number_unsigned() && json_.get<std::int64_t>() < 0) refuse(range);
    const auto value = json_.get<std::uint64_t>();
    if (value < low || value > high) refuse(range);
    return value;
  }

  std::int32_t count(std::int32_t low, std::int32_t high = std::numeric_limits<std::int32_t>::max()) const {
    return static_cast<std::int32_t>(
        number(static_cast<std::uint64_t>(low), static_cast<std::uint64_t>(high)));
  }

  // Lower-case hexadecimal of a given length.
  std::string hex(std::size_t digits) const {
    std::string value = text();
    const bool good = value.size() == digits && std::ranges::all_of(value, [](char c) {
                        return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
                      });
    if (!good) refuse(std::to_string(digits) + " hexadecimal digits");
    return value;
  }

  std::vector<Node> elements() const {
    if (!json_.is_array()) refuse("a list");
    std::vector<Node> nodes;
    nodes.reserve(json_.size());
    for (std::size_t i = 0; i < json_.size(); ++i)
      nodes.push_back({json_[i], path_ + "[" + std::to_string(i) + "]", where_});
    return nodes;
  }

  std::vector<std::pair<std::string, Node>> members() const {
    if (!json_.is_object()) refuse("an object");
    std::vector<std::pair<std::string, Node>> nodes;
    for (const auto& [key, value] : json_.items())
      nodes.emplace_back(key, Node(value, path_ + "." + key, where_));
    return nodes;
  }

 private:
  const Json& json_;
  std::string path_;
  const std::string& where_;
};

bool stays_inside(const std::string& file) {
  if (file.empty() || file.find('\0') != std::string::npos) return false;
  const std::filesystem::path path(file);
  return path.is_relative() && std::ranges::none_of(path, [](const auto& part) { return part == ".."; });
}

void check_schema(const Node& root, const std::string& where) {
  const auto schema = root["schema"].elements();
  if (schema.size() != 2) root["schema"].refuse("two numbers, [major, minor]");
  const std::int32_t major = schema[0].count(0);
  const std::int32_t minor = schema[1].count(0);
  if (major == Manifest::kSchemaMajor) return;
  const std::string version = std::to_string(major) + "." + std::to_string(minor);
  if (major > Manifest::kSchemaMajor) {
    throw Error(HETCOMP_NEWER_SCHEMA, where + " has schema " + version + ", this runtime (hetcomp " +
                                          HETCOMP_VERSION + ") reads " +
                                          std::to_string(Manifest::kSchemaMajor) +
                                          ".x: update hetcomp or compile the model with this version.");
  }
  throw Error(HETCOMP_BAD_ARTIFACT,
              where + " has schema " + version + ", which is no longer read: compile the model again.");
}

ModelFacts model_facts(const Node& node) {
  ModelFacts model;
  model.name = node["name"].text();
  model.architecture = node["architecture"].text();
  model.vocab = node["vocab"].count(1);
  model.context = node["context"].count(1);
  model.max_batch = node["max_batch"].count(1, kMostSequences);
  model.max_tokens = node["max_tokens"].count(1);
  model.max_logit_rows = node["max_logit_rows"].count(1);
  for (const Node& id : node["eos_token_ids"].elements()) model.eos_token_ids.push_back(id.count(0));
  if (node.has("bos_token_id")) model.bos_token_id = node["bos_token_id"].count(0);
  return model;
}

std::uint64_t hash_value(const Node& node) {
  const std::string digits = node.hex(16);
  std::uint64_t value = 0;
  std::from_chars(digits.data(), digits.data() + digits.size(), value, 16);
  return value;
}

// A name in "files", with a SHA-256 if code or text is read from it.
std::string listed_file(const Node& node, const Manifest& manifest, bool hashed) {
  std::string file = node.text();
  const auto found = manifest.files.find(file);
  if (found == manifest.files.end()) node.refuse("one of the names in \"files\"");
  if (hashed && found->second.sha256.empty()) node.refuse("a file with a sha256 in \"files\"");
  return file;
}

void read_files(const Node& node, Manifest& manifest) {
  constexpr auto kLargest = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  for (const auto& [file, record] : node.members()) {
    if (!stays_inside(file)) record.refuse("named by a relative path inside the artifact");
    manifest.files[file] = {record["bytes"].number(0, kLargest),
                            record.has("sha256") ? record["sha256"].hex(64) : ""};
  }
}

void read_nodes(const Node& root, Manifest& manifest) {
  constexpr std::size_t kMostNodes = 64;  // a plan for more sockets than any x86 machine has
  constexpr std::int32_t kLargestId = 1023;
  if (!root.has("nodes")) return;  // schema 1.0: one node
  manifest.nodes.clear();
  for (const Node& id : root["nodes"].elements()) {
    manifest.nodes.push_back(id.count(0, kLargestId));
    if (std::ranges::count(manifest.nodes, manifest.nodes.back()) > 1) id.refuse("named once");
  }
  if (manifest.nodes.empty() || manifest.nodes.size() > kMostNodes)
    root["nodes"].refuse("a list of 1 to " + std::to_string(kMostNodes) + " NUMA nodes");
  manifest.main_node = root["main_node"].number(0, manifest.nodes.size() - 1);
}

void read_weights(const Node& node, Manifest& manifest) {
  for (const Node& entry : node.elements()) {
    WeightRecord weight{
        entry["name"].text(), listed_file(entry["file"], manifest, false), 0, 0, hash_value(entry["xxh3_64"]),
        manifest.main_node};
    const std::uint64_t size = manifest.files[weight.file].bytes;
    weight.offset = entry["offset"].number(0, size);
    weight.bytes = entry["bytes"].number(1, std::max<std::uint64_t>(size, 1));
    if (weight.bytes > size - weight.offset)
      entry.refuse("inside " + weight.file + " (" + std::to_string(size) + " bytes)");
    if (weight.offset % Manifest::kAlignment != 0) entry["offset"].refuse("a multiple of 64");
    if (entry.has("node")) weight.node = entry["node"].number(0, manifest.nodes.size() - 1);
    manifest.weights.push_back(std::move(weight));
  }
}

// A file of weights may go without a SHA-256, for its tensors have a hash each; no other may.
void check_hashes(const Node& node, const Manifest& manifest) {
  std::set<std::string> of_weights;
  for (const WeightRecord& weight : manifest.weights) of_weights.insert(weight.file);
  for (const auto& [file, record] : manifest.files)
    if (record.sha256.empty() && !of_weights.contains(file)) node[file].refuse("given with a sha256");
}

void read_states(const Node& node, Manifest& manifest) {
  const auto largest = std::numeric_limits<std::int64_t>::max() / manifest.model.max_batch;
  for (const Node& entry : node.elements()) {
    manifest.states.push_back(
        {entry["name"].text(), entry["bytes_per_slot"].number(1, static_cast<std::uint64_t>(largest))});
  }
}

}  // namespace

Manifest Manifest::parse(std::string_view text, const std::string& where) {
  Json json;
  try {
    json = Json::parse(text);
  } catch (const Json::exception&) {
    throw Error(HETCOMP_BAD_ARTIFACT,
                where + " is not valid JSON: it is damaged or truncated; copy the artifact anew.");
  }
  const Node root(json, "", where);
  check_schema(root, where);
  Manifest manifest;
  manifest.model = model_facts(root["model"]);
  read_files(root["files"], manifest);
  for (const Node& entry : root["programs"].elements())
    manifest.programs.push_back({entry["isa"].text(), listed_file(entry["file"], manifest, true)});
  if (manifest.programs.empty()) root["programs"].refuse("a list of at least one program");
  read_nodes(root, manifest);
  read_weights(root["weights"], manifest);
  check_hashes(root["files"], manifest);
  read_states(root["states"], manifest);
  if (root.has("timers"))
    for (const Node& timer : root["timers"].elements()) manifest.timers.push_back(timer.text());
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
  std::error_code error;
  const std::filesystem::path root = std::filesystem::canonical(artifact, error);
  if (error)
    throw Error(HETCOMP_NOT_FOUND, "Cannot open " + artifact.string() + ": " + error.message() + ".");
  std::filesystem::path path = std::filesystem::canonical(artifact / file, error);
  if (error) {
    throw Error(HETCOMP_BAD_ARTIFACT, "The artifact " + artifact.string() + " lacks its file " + file + " (" +
                                          error.message() + "); copy the artifact anew.");
  }
  if (std::mismatch(root.begin(), root.end(), path.begin(), path.end()).first != root.end()) {
    throw Error(HETCOMP_BAD_ARTIFACT,
                "The file " + file + " of the artifact " + artifact.string() +
                    " is a link to a place outside of it; copy the artifact with its files.");
  }
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

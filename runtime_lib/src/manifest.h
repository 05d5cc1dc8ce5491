// manifest.json of an artifact, checked: after parsing, every number is in range, every path stays inside the
// artifact, every file has the size and (but for weights) the SHA-256 that the manifest says.
#pragma once

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "source_files.h"
#include "stored_weight.h"

namespace hetcomp {

struct ModelFacts {
  std::string name;
  std::string architecture;
  std::int32_t vocab;
  std::int64_t context;
  std::int32_t max_batch;
  std::int64_t kv_tokens;  // positions that all sequences hold together, at most
  std::int32_t max_tokens;
  std::int32_t max_logit_rows;
  std::vector<std::int32_t> eos_token_ids;
  std::optional<std::int32_t> bos_token_id;
  // Whether a sequence has states that its tokens so far have made and that cannot be cut back to fewer.
  bool recurrent = false;

  // Positions of the longest sequence that there can be.
  std::int64_t longest() const { return std::min(context, kv_tokens); }
};

struct FileRecord {
  std::uint64_t bytes;
  std::string sha256;  // empty for files of weights
};

struct ProgramRecord {
  std::string isa;
  std::string file;
};

// In a file of the artifact, or made of rows of sources. `file` and `offset` say where it can be mapped: in
// the artifact or, by an absolute path, in a source; an empty `file`: nowhere.
struct WeightRecord {
  std::string name;
  std::string file;
  std::uint64_t offset;
  std::uint64_t bytes;
  std::uint64_t xxh3_64;   // of the bytes in memory
  std::size_t node;        // index into Manifest::nodes
  bool on_demand = false;  // parts of it are read from the disk when they are chosen, if it is not in RAM
  std::optional<StoredWeight> stored{};

  bool mappable() const { return !file.empty(); }
};

// Of a KV cache: of each slot one run of rows after the other, a row a position: those of each head, and of
// its scales. Of a recurrence: no rows.
struct StateRecord {
  std::string name;
  std::uint64_t bytes_per_slot;
  std::uint64_t bytes;              // of memory that the sequences take together, at most
  std::vector<std::uint64_t> rows;  // bytes of a row, by run; empty: not known, or none
};

// What is computed on a GPU: a program, with kernels of gpu/kernels.json.
struct GpuRecord {
  std::string device;   // the plan's name: "gpu:0"
  std::string program;  // its file
  std::vector<std::string> weight_files;
};

struct Manifest {
  static constexpr int kSchemaMajor = 1;
  static constexpr std::uint64_t kAlignment = 64;  // of weights in files and of everything in memory

  ModelFacts model;
  std::map<std::string, FileRecord> files;
  std::vector<SourceRecord> sources;    // files outside of the artifact that weights are taken from
  std::vector<ProgramRecord> programs;  // best first
  std::vector<WeightRecord> weights;    // the CPU's, in the order of the program's weight indices
  std::vector<StateRecord> states;      // the CPU's, in the order of the program's state indices
  std::vector<GpuRecord> gpus;
  std::vector<std::string> pinned;  // the GPU programs' buffers in the order of hetcomp_step::pinned
  std::vector<int> nodes{0};        // ids of the NUMA nodes that the weights are cut for, at least one
  std::size_t main_node = 0;        // index of the one that holds what is not cut
  std::vector<std::string> timers;  // names of the program's timers; may be shorter
  std::optional<std::string> tokenizer;
  std::optional<std::string> chat_template;

  // Both throw Error. read() opens no file but manifest.json.
  static Manifest parse(std::string_view json, const std::string& where);
  static Manifest read(const std::filesystem::path& artifact);
};

// The place of a manifest's file; refuses links that lead out of the artifact and files of another size.
std::filesystem::path locate(const std::filesystem::path& artifact, const Manifest& manifest,
                             const std::string& file);

// Checks the size of every file and the SHA-256 of all but the weights.
void verify_files(const std::filesystem::path& artifact, const Manifest& manifest);

}  // namespace hetcomp

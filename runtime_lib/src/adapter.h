// A LoRA adapter in memory: low-rank pairs for some of a program's weights, from a file that `hetcomp adapter
// pack` wrote for that program's plan.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "hetcomp/program.h"
#include "manifest.h"
#include "memory.h"

namespace hetcomp {

// The file: "HETLORA" and a byte 1, the length of a JSON header (u64), its XXH3 (u64), the header, padded so
// that the data behind it begins at a multiple of 64; then the data. The header has schema, name, plan
// (SHA-256 of the plan.json that it was packed for), sha256 (of the adapter's own files), bytes and xxh3_64
// (of the data), and weights: for each its index, name, rank, scale, and the offsets a and b in the data of
// its pairs (hetcomp_pair). All integers are little-endian.
class Adapter {
 public:
  static constexpr std::int64_t kLargestRank = 4096;

  // Reads the file whole. Throws Error with its name: no such file, damaged, of another plan, numbers that
  // are not finite. `program` must be adaptable.
  Adapter(const std::filesystem::path& file, const Manifest& manifest, const hetcomp_program& program);
  Adapter(const Adapter&) = delete;
  Adapter& operator=(const Adapter&) = delete;

  // By weight of the program; null: left as it is.
  const hetcomp_pair* const* table() const { return table_.data(); }
  std::int64_t rank() const { return rank_; }  // the greatest
  std::uint64_t bytes() const { return data_.size(); }
  const std::string& name() const { return name_; }      // that it was packed with
  const std::string& sha256() const { return sha256_; }  // of the adapter's own files
  std::size_t weights() const { return pairs_.size(); }

 private:
  void read_pairs(const class CheckedJson& header, const Manifest& manifest, const hetcomp_program& program);

  std::string name_;
  std::string sha256_;
  Memory data_;
  std::vector<hetcomp_pair> pairs_;
  std::vector<const hetcomp_pair*> table_;
  std::int64_t rank_ = 0;
};

}  // namespace hetcomp

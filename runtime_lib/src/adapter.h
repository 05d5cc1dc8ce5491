// A LoRA adapter in memory: low-rank pairs for some of a program's weights, from a file that `hetcomp adapter
// pack` wrote for that program's plan.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "hetcomp/program.h"
#include "manifest.h"
#include "memory.h"

namespace hetcomp {

namespace gpu {
struct AdapterPlace;
}

// What adapters may change of what a GPU computes.
struct GpuAdaptable {
  struct Weight {
    std::string name;
    hetcomp_adaptable shape;
  };
  std::string device;
  std::int64_t rank;  // the greatest that there is room for
  std::vector<Weight> weights;
};

// A pair for one of these weights.
struct GpuPair {
  std::size_t weight;
  hetcomp_pair pair;
  std::uint64_t a_bytes, b_bytes;
};

// The file: "HETLORA" and a byte 1, the length of a JSON header (u64), its XXH3 (u64), the header, padded so
// that the data behind it begins at a multiple of 64; then the data. The header has schema, name, plan
// (SHA-256 of the plan.json that it was packed for), sha256 (of the adapter's own files), bytes and xxh3_64
// (of the data), and weights: for each its index, name, rank, scale, and the offsets a and b in the data of
// its pairs (hetcomp_pair). Where GPUs have pairs, gpus: for each its device and weights like those, with
// indices among the weights that adapters may change there. All integers are little-endian.
class Adapter {
 public:
  static constexpr std::int64_t kLargestRank = 4096;

  // Reads the file whole. Throws Error with its name: no such file, damaged, of another plan, numbers that
  // are not finite. gpus: those that have room for adapters.
  Adapter(const std::filesystem::path& file, const Manifest& manifest, const hetcomp_program& program,
          std::span<const GpuAdaptable> gpus);
  Adapter(const Adapter&) = delete;
  Adapter& operator=(const Adapter&) = delete;

  // By weight of the program; null: left as it is.
  const hetcomp_pair* const* table() const { return table_.data(); }
  std::int64_t rank() const { return rank_; }  // the greatest
  std::uint64_t bytes() const { return data_.size(); }
  const std::string& name() const { return name_; }      // that it was packed with
  const std::string& sha256() const { return sha256_; }  // of the adapter's own files
  std::size_t weights() const;

  // By GPU that has room for adapters.
  const std::vector<std::vector<GpuPair>>& on_gpus() const { return on_gpus_; }
  bool changes_gpus() const;
  // What it has of the GPUs as long as it lives; null: nothing, it changes nothing there.
  const gpu::AdapterPlace* place() const { return place_.get(); }
  void set_place(std::shared_ptr<const gpu::AdapterPlace> place) { place_ = std::move(place); }

 private:
  void read_pairs(const class CheckedJson& header, const Manifest& manifest, const hetcomp_program& program);
  void read_gpu_pairs(const class CheckedJson& header, std::span<const GpuAdaptable> gpus);

  std::string name_;
  std::string sha256_;
  Memory data_;
  std::vector<hetcomp_pair> pairs_;
  std::vector<const hetcomp_pair*> table_;
  std::vector<std::vector<GpuPair>> on_gpus_;
  std::shared_ptr<const gpu::AdapterPlace> place_;
  std::int64_t rank_ = 0;
};

}  // namespace hetcomp

#include "weights.h"

#include <xxhash.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <map>
#include <mutex>
#include <numeric>
#include <string>
#include <thread>

#include "status.h"

namespace hetcomp {
namespace {

// Large enough for the disk, small enough to be hashed while it is in the cache.
constexpr std::size_t kChunk = 1U << 20;

struct HashFree {
  void operator()(XXH3_state_t* state) const { XXH3_freeState(state); }
};

// Reads a tensor to `home`, or through a buffer if there is none, and compares its hash.
void read_weight(const WeightRecord& weight, const File& file, std::uint8_t* home, bool verify) {
  const std::unique_ptr<XXH3_state_t, HashFree> hash(XXH3_createState());
  if (!hash) throw std::bad_alloc();
  XXH3_64bits_reset(hash.get());
  std::vector<std::byte> buffer(home == nullptr ? std::min<std::uint64_t>(kChunk, weight.bytes) : 0);
  for (std::uint64_t done = 0; done < weight.bytes;) {
    const auto size = static_cast<std::size_t>(std::min<std::uint64_t>(kChunk, weight.bytes - done));
    std::byte* to = home == nullptr ? buffer.data() : reinterpret_cast<std::byte*>(home + done);
    file.read(weight.offset + done, {to, size});
    if (verify) XXH3_64bits_update(hash.get(), to, size);
    done += size;
  }
  if (verify && XXH3_64bits_digest(hash.get()) != weight.xxh3_64) {
    throw Error(HETCOMP_BAD_ARTIFACT,
                "The weight " + weight.name + " in " + file.path().string() +
                    " does not have the hash in the manifest: it is damaged; copy the artifact anew.");
  }
}

// Calls work(i) for every i of `order` from several threads; rethrows the first exception after all have
// ended.
template <class Work>
void in_parallel(const std::vector<std::size_t>& order, int threads, const Work& work) {
  std::atomic<std::size_t> next{0};
  std::exception_ptr failure;
  std::mutex failure_mutex;
  const auto loop = [&] {
    for (std::size_t i; (i = next.fetch_add(1)) < order.size();) {
      try {
        work(order[i]);
      } catch (...) {
        const std::lock_guard lock(failure_mutex);
        if (!failure) failure = std::current_exception();
        next.store(order.size());
      }
    }
  };
  {
    std::vector<std::jthread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back(loop);
    loop();
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace

std::uint64_t Weights::ram_bytes(const Manifest& manifest) {
  std::uint64_t bytes = 0;
  for (const WeightRecord& weight : manifest.weights)
    bytes += (weight.bytes + Manifest::kAlignment - 1) / Manifest::kAlignment * Manifest::kAlignment;
  return bytes;
}

Weights::Weights(const std::filesystem::path& artifact, const Manifest& manifest, Residency residency,
                 bool verify, int threads)
    : residency_(residency) {
  std::map<std::string, File> files;
  std::map<std::string, const std::uint8_t*> bases;
  for (const WeightRecord& weight : manifest.weights) {
    bytes_ += weight.bytes;
    const auto [file, added] = files.try_emplace(weight.file, locate(artifact, manifest, weight.file));
    if (added && residency == Residency::kMapped)
      bases[weight.file] = mapped_.emplace_back(file->second).data();
  }
  if (residency == Residency::kRam) ram_ = Memory(ram_bytes(manifest), "the weights");

  std::vector<std::uint8_t*> homes;
  std::uint64_t position = 0;
  for (const WeightRecord& weight : manifest.weights) {
    std::uint8_t* home = residency == Residency::kRam ? ram_.data() + position : nullptr;
    homes.push_back(home);
    addresses_.push_back(home != nullptr ? home : bases.at(weight.file) + weight.offset);
    position += (weight.bytes + Manifest::kAlignment - 1) / Manifest::kAlignment * Manifest::kAlignment;
  }
  if (residency == Residency::kMapped && !verify) return;

  // Largest first, so that the threads end together.
  std::vector<std::size_t> order(manifest.weights.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::sort(order, std::greater<>(), [&](std::size_t i) { return manifest.weights[i].bytes; });
  in_parallel(order, threads, [&](std::size_t i) {
    const WeightRecord& weight = manifest.weights[i];
    read_weight(weight, files.at(weight.file), homes[i], verify);
  });
}

}  // namespace hetcomp

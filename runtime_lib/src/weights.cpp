#include "weights.h"

#include <xxhash.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <numeric>
#include <string>
#include <thread>

#include "cpu_affinity.h"
#include "hetcomp/fetch_pages.h"
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

// The same for one that is made of rows of sources.
void read_weight(const WeightRecord& weight, const SourceFiles& sources, std::uint8_t* home, bool verify) {
  const StoredReader reader(*weight.stored, sources);
  verify = verify || reader.touched();
  if (home == nullptr && !verify) return;
  const std::unique_ptr<XXH3_state_t, HashFree> hash(XXH3_createState());
  if (!hash) throw std::bad_alloc();
  XXH3_64bits_reset(hash.get());
  std::vector<std::uint8_t> buffer;
  for (std::size_t piece = 0; piece < reader.pieces(); ++piece) {
    const auto size = static_cast<std::size_t>(reader.piece_bytes(piece));
    if (home == nullptr) buffer.resize(size);
    std::uint8_t* to = home == nullptr ? buffer.data() : home + reader.offset(piece);
    reader.read(piece, to);
    if (verify) XXH3_64bits_update(hash.get(), to, size);
  }
  if (verify && XXH3_64bits_digest(hash.get()) != weight.xxh3_64)
    refuse_changed(reader, "The weight " + weight.name);
}

// Weights that the threads of one node read.
struct Queue {
  std::vector<std::size_t> order;
  int threads;
  std::vector<int> cpus;  // empty: the threads are not bound
  std::atomic<std::size_t> next{0};
};

// Calls work(i) for every i of every queue on the queue's own threads; rethrows the first exception after all
// have ended.
template <class Work>
void in_parallel(std::deque<Queue>& queues, const Work& work) {
  std::exception_ptr failure;
  std::mutex failure_mutex;
  std::atomic<bool> failed{false};
  const auto loop = [&](Queue& queue) {
    bind_thread(queue.cpus);
    for (std::size_t i; !failed && (i = queue.next.fetch_add(1)) < queue.order.size();) {
      try {
        work(queue.order[i]);
      } catch (...) {
        const std::lock_guard lock(failure_mutex);
        if (!failure) failure = std::current_exception();
        failed = true;
      }
    }
  };
  {
    std::vector<std::jthread> threads;
    for (Queue& queue : queues)
      for (int t = 0; t < queue.threads; ++t) threads.emplace_back([&] { loop(queue); });
  }
  if (failure) std::rethrow_exception(failure);
}

// Of weights that are read on demand a page that is touched must not bring megabytes of its neighbours with
// it (the kernels ask for what they need); all others may be read ahead of their first use.
void advise(const std::vector<WeightRecord>& weights, const std::vector<const std::uint8_t*>& addresses) {
  if (std::ranges::none_of(weights, &WeightRecord::on_demand)) return;
  for (std::size_t i = 0; i < weights.size(); ++i)
    advise_pages(addresses[i], static_cast<std::int64_t>(weights[i].bytes),
                 weights[i].on_demand ? MADV_RANDOM : MADV_WILLNEED);
}

std::string weight_at(const Manifest& manifest, const std::string& file, std::uint64_t offset) {
  for (const WeightRecord& weight : manifest.weights)
    if (weight.file == file && offset >= weight.offset && offset - weight.offset < weight.bytes)
      return "The weight " + weight.name;
  return "What lies between weights";
}

// Whether the weight is used where a file has it. GPUs copy from pinned memory, which a whole source must not
// be.
bool is_mapped(const WeightRecord& weight, const Manifest& manifest, Residency residency) {
  return residency == Residency::kMapped && weight.mappable() && (!weight.stored || manifest.gpus.empty());
}

std::uint64_t aligned(std::uint64_t bytes) {
  return (bytes + Manifest::kAlignment - 1) / Manifest::kAlignment * Manifest::kAlignment;
}

}  // namespace

std::vector<std::uint64_t> Weights::ram_bytes(const Manifest& manifest, Residency residency) {
  std::vector<std::uint64_t> bytes(manifest.nodes.size());
  for (const WeightRecord& weight : manifest.weights)
    if (!is_mapped(weight, manifest, residency)) bytes[weight.node] += aligned(weight.bytes);
  return bytes;
}

void Weights::require_room_for_repacked(const Manifest& manifest, std::uint64_t others,
                                        std::uint64_t available) {
  const std::vector<std::uint64_t> sizes = ram_bytes(manifest, Residency::kMapped);
  const std::uint64_t repacked = std::accumulate(sizes.begin(), sizes.end(), std::uint64_t{0});
  if (repacked == 0 || repacked + others <= available) return;
  throw Error(
      HETCOMP_OUT_OF_MEMORY,
      "The weights that are repacked from other files need " + in_words(repacked) +
          " and KV cache and activations " + in_words(others) + ", but " + in_words(available) +
          " of memory are available: compile the model with --weights packed, whose files can be mapped.");
}

std::vector<std::span<const std::uint8_t>> Weights::regions() const {
  std::vector<std::span<const std::uint8_t>> regions;
  for (const Memory& memory : ram_) regions.emplace_back(memory.data(), memory.size());
  for (const auto& [name, file] : mapped_) regions.emplace_back(file.data(), file.size());
  return regions;
}

bool Weights::good() const {
  return std::ranges::none_of(mapped_, [](const auto& file) { return file.second.fault().has_value(); });
}

void Weights::require_good(const Manifest& manifest) {
  if (good()) return;
  std::exception_ptr first;
  for (auto& [name, file] : mapped_) {
    if (!file.fault()) continue;
    try {
      file.refuse(weight_at(manifest, name, *file.fault()));
    } catch (const Error&) {
      if (!first) first = std::current_exception();
    }
  }
  advise(manifest.weights, addresses_);
  std::rethrow_exception(first);
}

std::uint64_t Weights::bytes() const {
  return std::accumulate(node_bytes_.begin(), node_bytes_.end(), std::uint64_t{0});
}

bool Weights::bound() const { return std::ranges::all_of(ram_, &Memory::bound); }

Weights::Weights(const std::filesystem::path& artifact, const Manifest& manifest, Residency residency,
                 bool verify, const std::vector<NodePlace>& nodes)
    : residency_(residency), node_bytes_(nodes.size()) {
  const SourceFiles sources(manifest.sources);
  std::map<std::string, File> files;
  for (const WeightRecord& weight : manifest.weights) {
    node_bytes_[weight.node] += weight.bytes;
    if (!weight.stored) files.try_emplace(weight.file, locate(artifact, manifest, weight.file));
    if (is_mapped(weight, manifest, residency))
      mapped_.try_emplace(weight.file,
                          weight.stored ? std::filesystem::path(weight.file) : files.at(weight.file).path());
  }
  std::vector<std::uint8_t*> next;  // place of a node's next weight in RAM
  const std::vector<std::uint64_t> sizes = ram_bytes(manifest, residency);
  for (std::size_t n = 0; n < nodes.size(); ++n) {
    const std::string where = nodes.size() > 1 ? " of node " + std::to_string(nodes[n].plan_node) : "";
    if (sizes[n] > 0) ram_.emplace_back(sizes[n], "the weights" + where, nodes[n].machine_node);
    next.push_back(sizes[n] > 0 ? ram_.back().data() : nullptr);
  }

  std::vector<std::uint8_t*> homes;
  bool all_mapped = true;
  for (const WeightRecord& weight : manifest.weights) {
    const bool mapped = is_mapped(weight, manifest, residency);
    all_mapped = all_mapped && mapped;
    homes.push_back(mapped ? nullptr : next[weight.node]);
    addresses_.push_back(mapped ? mapped_.at(weight.file).data() + weight.offset : homes.back());
    if (!mapped) next[weight.node] += aligned(weight.bytes);
  }
  if (residency == Residency::kMapped) advise(manifest.weights, addresses_);
  if (all_mapped && !verify && manifest.sources.empty()) return;

  std::deque<Queue> queues;
  for (const NodePlace& node : nodes) {
    Queue& queue = queues.emplace_back();
    queue.threads = std::max(node.threads, 1);
    if (nodes.size() > 1) queue.cpus = node.cpus;
  }
  for (std::size_t i = 0; i < manifest.weights.size(); ++i)
    queues[manifest.weights[i].node].order.push_back(i);
  // Largest first, so that the threads end together.
  for (Queue& queue : queues)
    std::ranges::sort(queue.order, std::greater<>(),
                      [&](std::size_t i) { return manifest.weights[i].bytes; });
  in_parallel(queues, [&](std::size_t i) {
    const WeightRecord& weight = manifest.weights[i];
    if (weight.stored)
      read_weight(weight, sources, homes[i], verify);
    else if (homes[i] != nullptr || verify)
      read_weight(weight, files.at(weight.file), homes[i], verify);
  });
}

}  // namespace hetcomp

// gpu/program-N.json of an artifact, the part of one GPU: buffers, and for every batch size the nodes of one
// step's graph, checked. After parsing every index, offset and size is in range, every argument fits its
// kernel, and no graph has a cycle.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "../stored_weight.h"
#include "adapter_record.h"
#include "expert_cache_record.h"
#include "kernel_table.h"
#include "stream_record.h"
#include "weight_stream_record.h"

namespace hetcomp::gpu {

enum class BufferKind {
  kArena,      // between kernels of a step
  kWeight,     // read from files, never written
  kConstant,   // the same, but not of the model
  kState,      // the KV cache: lives from step to step
  kRecurrent,  // what recurrences have come to: lives from step to step
  kResult,     // of a step, which the host may fetch when it is over
  kStep,       // the host writes it before a step, kernels read it in device memory
  kPinnedIn,   // in host memory: what the CPU or another GPU hands to kernels
  kPinnedOut,  // in host memory: what kernels hand to the CPU or another GPU
  kStream,     // what comes from the host's memory during a step: experts, and where they are; weights
  kPairs,      // of adapters that come and go, and where they are
};
inline bool is_pinned(BufferKind kind) {
  return kind == BufferKind::kPinnedIn || kind == BufferKind::kPinnedOut;
}

// A piece of a file, or a weight made of rows of sources, that fills a piece of a buffer.
struct BufferSource {
  std::string file;  // relative to the artifact; empty: see stored
  std::uint64_t offset;
  std::uint64_t bytes;
  std::uint64_t to;  // offset in the buffer
  std::uint64_t xxh3_64;
  std::optional<StoredWeight> stored{};
};

// How a buffer holds the KV cache: blocks of positions, slot_bytes of them a slot, and one block behind the
// last slot, for rows of nobody. With granules, so many pieces of memory are all that is ever behind its
// addresses; 0: all of it is there.
struct CacheRecord {
  std::int32_t slots;
  std::uint64_t slot_bytes;
  std::uint64_t block_bytes;
  std::uint64_t block_positions;
  std::uint64_t granule_bytes;
  std::uint64_t granules;
};

// How a buffer holds states of recurrences: each for all slots, one after the other, and once more for rows
// of nobody.
struct RecurrentRecord {
  struct State {
    std::uint64_t offset;
    std::uint64_t slot_bytes;
  };
  std::int32_t slots;
  std::vector<State> states;  // ascending, not overlapping
};

struct BufferRecord {
  std::string name;
  std::uint64_t bytes;
  BufferKind kind;
  std::vector<BufferSource> sources;           // of weights and constants; ascending, not overlapping
  std::optional<CacheRecord> cache{};          // of a state
  std::optional<RecurrentRecord> recurrent{};  // of a recurrent one
};

struct BufferAddress {
  std::size_t buffer;
  std::uint64_t offset;
};
// This GPU raises the flag for the other side, or waits until the other side has raised it; or, of flags of
// its streams, until what is streamed has come, and raises it when that may be overwritten.
struct HandOver {
  std::uint32_t flag;
  bool raises;
  std::string other;  // "cpu", or the device of another program
  bool with_cpu() const { return other == "cpu"; }
};
// With a hand-over the kernel gets the address of its flag, which it raises or awaits itself.
using ArgumentValue = std::variant<BufferAddress, HandOver, std::int32_t, std::int64_t, float>;

struct KernelNode {
  std::string kernel;
  std::array<std::uint32_t, 3> grid;  // blocks
  std::vector<ArgumentValue> arguments;
  std::string role{};       // of the op that it is for, as traces call it; empty: nobody said
  std::int32_t layer = -1;  // of the plan; -1: none
};

struct NodeRecord {
  std::variant<KernelNode, HandOver> work;
  std::vector<std::size_t> after;  // indices of nodes of the graph

  // What the node is, or those that its kernel makes.
  std::vector<const HandOver*> hand_overs() const;
};

// exact: the kernels work on `batch` rows, whatever the step has. Else they read how many it has, at most
// `batch`. adapted: it adds the pairs of adapters. streams: it waits for what is streamed, layer after layer.
struct GraphRecord {
  std::int32_t batch;
  bool exact;
  bool adapted;
  bool streams;
  std::vector<NodeRecord> nodes;
  std::vector<std::size_t> order;       // all nodes, each behind those it comes after
  std::vector<WeightPortion> portions;  // weights that it waits for
};

// 1 of "gpu:1"; nothing for other names.
std::optional<int> device_number(const std::string& device);

struct GpuProgramRecord {
  static constexpr int kSchemaMajor = 5;
  static constexpr std::uint64_t kMostBytes = 1ULL << 46;  // beyond any device; sums of a few stay in range
  static constexpr std::uint64_t kAlignment = 16;          // of addresses: kernels are compiled for it

  // kernels: those chosen for the device. where: the file's name, for messages. Throws Error.
  static GpuProgramRecord parse(std::string_view json, const std::string& where,
                                const KernelsByName& kernels);

  std::string device;                 // the plan's name of the GPU: "gpu:0"
  std::uint64_t device_bytes;         // the plan's figure: device memory of all buffers and scratch
  std::uint32_t flags;                // hand-overs of a step, those of other GPUs included
  std::vector<SourceRecord> sources;  // files outside of the artifact that weights are taken from
  std::vector<BufferRecord> buffers;
  std::optional<StreamRecord> stream;
  std::optional<WeightStreamRecord> weight_stream;
  std::optional<ExpertCacheRecord> expert_cache;  // only beside a stream
  std::optional<AdapterRecord> adapters;          // with it there is each graph twice, once adapted
  std::vector<GraphRecord> graphs;

  // Whether the flag is of a layer that is streamed to this GPU.
  bool of_stream(std::uint32_t flag) const {
    return stream && flag >= stream->first_flag && flag - stream->first_flag < stream->waves();
  }
  // Flags of hand-overs, and those up to the last of what is streamed to this GPU.
  std::uint32_t all_flags() const {
    if (weight_stream) return weight_stream->first_flag + weight_stream->flags;
    return stream ? stream->first_flag + stream->waves() : flags;
  }
};

}  // namespace hetcomp::gpu

// gpu/program.json of an artifact: buffers, and for every batch size the nodes of one step's graph, checked.
// After parsing every index, offset and size is in range, every argument fits its kernel, and no graph has a
// cycle.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "expert_cache_record.h"
#include "kernel_table.h"
#include "stream_record.h"

namespace hetcomp::gpu {

enum class BufferKind {
  kArena,      // between kernels of a step
  kWeight,     // read from files, never written
  kConstant,   // the same, but not of the model
  kState,      // lives from step to step
  kResult,     // of a step, which the host may fetch when it is over
  kStep,       // the host writes it before a step, kernels read it in device memory
  kPinnedIn,   // in host memory: what the CPU hands to kernels
  kPinnedOut,  // in host memory: what kernels hand to the CPU
  kStream,     // experts that come from the host's memory during a step, and where they are
};

// A piece of a file that fills a piece of a buffer.
struct BufferSource {
  std::string file;  // relative to the artifact
  std::uint64_t offset;
  std::uint64_t bytes;
  std::uint64_t to;  // offset in the buffer
  std::uint64_t xxh3_64;
};

struct BufferRecord {
  std::string name;
  std::uint64_t bytes;
  BufferKind kind;
  std::vector<BufferSource> sources;  // of weights and constants; ascending, not overlapping
};

struct BufferAddress {
  std::size_t buffer;
  std::uint64_t offset;
};
using ArgumentValue = std::variant<BufferAddress, std::int32_t, std::int64_t, float>;

struct KernelNode {
  std::string kernel;
  std::array<std::uint32_t, 3> grid;  // blocks
  std::vector<ArgumentValue> arguments;
};

// To the CPU: the GPU raises the flag. To the GPU: the GPU waits until the CPU has answered it, or, of flags
// behind the hand-overs', until what is streamed has come.
struct HandOver {
  enum class To { kCpu, kGpu };
  std::uint32_t flag;
  To to;
};

struct NodeRecord {
  std::variant<KernelNode, HandOver> work;
  std::vector<std::size_t> after;  // indices of nodes of the graph
};

// exact: the kernels work on `batch` rows, whatever the step has. Else they read how many it has, at most
// `batch`. streams: it waits for what is streamed, layer after layer.
struct GraphRecord {
  std::int32_t batch;
  bool exact;
  bool streams;
  std::vector<NodeRecord> nodes;
  std::vector<std::size_t> order;  // all nodes, each behind those it comes after
};

struct GpuProgramRecord {
  static constexpr int kSchemaMajor = 1;
  static constexpr std::uint64_t kAlignment = 16;  // of addresses: kernels are compiled for it

  // kernels: those chosen for the device. where: the file's name, for messages. Throws Error.
  static GpuProgramRecord parse(std::string_view json, const std::string& where,
                                const KernelsByName& kernels);

  std::uint64_t device_bytes;  // the plan's figure: device memory of all buffers and scratch
  std::uint32_t flags;         // hand-overs that a graph may have
  std::vector<BufferRecord> buffers;
  std::optional<StreamRecord> stream;
  std::optional<ExpertCacheRecord> expert_cache;  // only beside a stream
  std::vector<GraphRecord> graphs;

  // Flags of hand-overs and of what is streamed.
  std::uint32_t all_flags() const {
    return flags + (stream ? static_cast<std::uint32_t>(stream->layers.size()) : 0);
  }
};

}  // namespace hetcomp::gpu

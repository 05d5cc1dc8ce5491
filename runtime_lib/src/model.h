// A loaded artifact: program, weights, KV cache, threads, GPU, texts; and how a step is run on it.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <filesystem>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "candidates.h"
#include "chat_template.h"
#include "expert_counts.h"
#include "gpu/gpu_step.h"
#include "hetcomp/hetcomp.h"
#include "kv_memory.h"
#include "kv_pool.h"
#include "lane_threads.h"
#include "lane_trace.h"
#include "manifest.h"
#include "memory.h"
#include "node_map.h"
#include "program_library.h"
#include "resident_adapters.h"
#include "routing_record.h"
#include "statistics.h"
#include "step_adapters.h"
#include "tokenizer.h"
#include "weights.h"

namespace hetcomp {

struct LoadOptions {
  int threads = 0;
  hetcomp_weights weights = HETCOMP_WEIGHTS_AUTO;
  bool verify_weights = true;
  std::string isa;      // empty: the best
  gpu::GpuOptions gpu;  // but for `verify`, which verify_weights says
};

// One forward pass; see hetcomp_step.
struct StepRequest {
  Phase phase;
  std::span<const std::int32_t> ids;
  std::span<const std::int32_t> positions;
  std::span<const std::int32_t> slots;
  std::span<const std::int32_t> logit_rows;
  float* logits;  // null: not wanted
  // Not null: the most likely token of each row, -1 where logits are not finite.
  std::int32_t* best = nullptr;
  // Not null: asked first; where it chooses a token, logits are left as they are.
  const CandidateRequest* candidates = nullptr;
  // By token, null where it has none; empty: no token has one. Of this model's use_adapter().
  std::span<const Adapter* const> adapters = {};
};

// Thread safe.
class Model {
 public:
  // Throws Error. Nothing of the artifact is executed before it is verified.
  Model(const std::filesystem::path& artifact, const LoadOptions& options);

  const ModelFacts& facts() const { return manifest_.model; }
  const Manifest& manifest() const { return manifest_; }
  const std::string& isa() const { return isa_; }
  int threads() const { return lanes_->size(); }
  Residency residency() const { return weights_->residency(); }
  bool is_eos(std::int32_t id) const;
  const Tokenizer* tokenizer() const { return tokenizer_.get(); }
  const ChatTemplate* chat_template() const { return chat_template_.get(); }
  // These two throw Error if the artifact has none.
  const Tokenizer& require_tokenizer() const;
  const ChatTemplate& require_chat_template() const;

  // A free place in the KV cache; throws Error if there is none.
  std::int32_t take_slot();
  void give_back_slot(std::int32_t slot);

  // What sequences hold of the KV cache; who grows one claims its positions first.
  KvPool& kv_pool() { return *kv_pool_; }
  // A sequence that no step is running for keeps its first `length` positions; the others are free.
  void keep_positions(std::int32_t slot, std::int64_t length);

  // What a sequence's recurrences have come to, whoever computes them. No step may be running for it.
  std::vector<std::byte> recurrent_state(std::int32_t slot) const;
  void set_recurrent_state(std::int32_t slot, std::span<const std::byte> state);

  // Adapters by name, which sessions choose from. The first three throw Error.
  void load_adapter(const std::filesystem::path& file, const std::string& name);
  void unload_adapter(const std::string& name);
  ResidentAdapters::Use use_adapter(const std::string& name);
  std::string adapters_json() const { return adapters_ ? adapters_->json() : "[]"; }

  // Sizes must be within the program's limits and every value in range. Throws Error.
  void run(const StepRequest& request);

  // The GPUs that compute a part, one for each program; empty: the CPU computes all. They never change.
  const std::vector<GpuUse>& gpus() const { return gpu_uses_; }

  // Of which tokens the plan's deferral of experts takes place from the next step on.
  void set_deferral(hetcomp_deferral which);

  // Is told how each step from the next one on routed its tokens, by the thread that runs it; null: nobody.
  void set_routing_callback(hetcomp_routing_callback callback, void* user);

  // Is told what the lanes did in each step from the next one on; null: nobody.
  void set_lane_trace_callback(hetcomp_lane_trace_callback callback, void* user);
  // What the experts get from the next step on; see RoutingRecord::replay. Throws Error.
  void replay_routing(Routing routing, std::int64_t tokens);

  // Whether a step may ask for `best`.
  bool offers_best() const { return gpu_ && gpu_->offers_best(); }
  // Whether some steps find candidates.
  bool offers_candidates() const { return gpu_ && gpu_->offers_candidates(); }

  std::string statistics_json() const;
  // For every weight the node it should lie on and the pages that do.
  std::string numa_report_json() const;
  void reset_statistics();
  // From the next step on; negative: no more. See ExpertCounts::begin.
  void count_experts(std::int64_t half_life);
  const ExpertCounts& expert_counts() const { return expert_counts_; }

 private:
  void load_gpus(const LoadOptions& options);
  void read_gpu_statistics();
  void run_gpus(const hetcomp_step& step, const StepRequest& request, const gpu::GpuStep::Lanes& run_lanes);
  void tell_lane_trace(const StepRequest& request, std::chrono::steady_clock::time_point start);
  void tell_routing(const StepRequest& request);
  void stream_from_weights();
  void allocate(const LoadOptions& options);
  ResidentAdapters& require_adapters();
  bool prepare(Adapter& adapter);
  Residency choose_residency(hetcomp_weights wanted, std::uint64_t available) const;
  void describe_nodes();

  Manifest manifest_;
  std::filesystem::path artifact_;
  std::string isa_;
  std::unique_ptr<ProgramLibrary> library_;
  std::unique_ptr<ResidentAdapters> adapters_;  // null: the program takes none
  std::vector<GpuUse> gpu_uses_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<ChatTemplate> chat_template_;
  std::vector<NodePlace> nodes_;  // in the order of the manifest's
  std::unique_ptr<KvPool> kv_pool_;
  std::unique_ptr<Weights> weights_;
  std::unique_ptr<gpu::GpuStep> gpu_;  // may read weights and pool as long as it lives
  Memory arena_;
  std::unique_ptr<KvMemory> kv_memory_;
  std::uint64_t state_bytes_ = 0;
  Memory logits_;  // for callers whose buffer is not aligned as the kernels want it
  std::unique_ptr<LaneThreads> lanes_;
  pid_t process_;

  mutable std::mutex slots_mutex_;
  std::vector<std::int32_t> free_slots_;

  mutable std::mutex step_mutex_;
  hetcomp_deferral deferral_ = HETCOMP_DEFER_GENERATED;
  hetcomp_routing_callback routing_callback_ = nullptr;
  void* routing_user_ = nullptr;
  RoutingRecord routing_;
  ExpertCounts expert_counts_;
  hetcomp_lane_trace_callback lane_trace_callback_ = nullptr;
  void* lane_trace_user_ = nullptr;
  LaneTrace lane_trace_;
  StepAdapters step_adapters_;
  Statistics statistics_;
};

}  // namespace hetcomp

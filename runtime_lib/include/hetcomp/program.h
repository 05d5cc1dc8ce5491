// The contract between a generated program (kernels/lib_<isa>.so) and the runtime that runs it.
//
// The program is plain code over buffers which the runtime owns. It allocates nothing, starts no thread and
// calls nothing of the runtime: the same .so runs under any host that fills these structs.
#pragma once

#include <stdint.h>

#define HETCOMP_PROGRAM_ABI 8

#ifdef __cplusplus
namespace hetcomp {
struct Lane;
}
typedef hetcomp::Lane hetcomp_lane;
extern "C" {
#else
typedef struct hetcomp_lane hetcomp_lane;
#endif

// Hand-overs between a program and the GPUs that work on the same step, numbered in the order of the step,
// with those among GPUs. The program calls them through await_gpu() and answer_gpu() of lane.h.
typedef struct hetcomp_hand_over {
  void* host;
  // Waits until a GPU has come to hand-over `flag`; 0: the step was given up, and nothing that is computed
  // for it matters.
  int (*wait)(void* host, uint32_t flag);
  // What the CPU computes for hand-over `flag` is in its pinned buffers.
  void (*answer)(void* host, uint32_t flag);
  // Null, or by flag, once it was waited for: 1 where there is nothing to compute, only to answer.
  const uint8_t* skip;
  // 1: the program leaves out what the plan gives to a GPU where weights are copied to it, hand-overs
  // included.
  int32_t streams_weights;
  uint32_t given_up;  // first flag at which the step was given up, UINT32_MAX: none; thread 0 alone writes it
} hetcomp_hand_over;

// Who wants to see a step's routing, or to replace it where the CPU alone computes the experts.
typedef struct hetcomp_routing_hook {
  void* host;
  // Of each MoE layer whose experts the program computes, all or some, in the order of the step; by thread 0,
  // before any of them is computed. ids, weights: [T][top_k], of so many experts. flag: of the hand-over that
  // brings them, which was not yet waited for; HETCOMP_NO_FLAG: they are there, and what is written to them
  // holds.
  void (*routed)(void* host, uint32_t flag, int32_t experts, int32_t top_k, int32_t* ids, float* weights);
  // By whoever waits for hand-over `flag` of a GPU, when it has come and before anything is changed in it.
  void (*came)(void* host, uint32_t flag);
} hetcomp_routing_hook;

#define HETCOMP_NO_FLAG UINT32_MAX

// From a moment on a thread of the lanes does something: the work of a timer, or one of these.
#define HETCOMP_AT_BARRIER (-1)
#define HETCOMP_AT_END (-2)
typedef struct hetcomp_trace_event {
  int64_t ns;    // CLOCK_MONOTONIC
  int32_t call;  // of the plan
  int32_t what;
} hetcomp_trace_event;

// Of one thread. n also counts events for which there was no room.
typedef struct hetcomp_lane_trace {
  hetcomp_trace_event* events;
  int64_t capacity;
  int64_t n;
} hetcomp_lane_trace;

// A weight that adapters may change: matrices w[out, in], one or several (experts, heads).
typedef struct hetcomp_adaptable {
  int64_t matrices;      // 0: no adapter can change the weight
  int64_t out;           // rows of a matrix
  int64_t in;            // its columns
  int32_t halves;        // 2: gate and up rows lie in panels of their own, in turn; else 1
  int32_t number_bytes;  // of a number of its pairs: 4 (f32), 2 (bf16) or, on the CPU, 1
} hetcomp_adaptable;

#define HETCOMP_RANK_STEP 4      // ranks of pairs are multiples of it
#define HETCOMP_PAIR_COLUMNS 16  // so are the columns of a as they are stored, zero beyond `in`

// What an adapter adds to a weight: scale b a to each matrix.
// a: [matrices][rank][in, padded]. b: [matrices][panels of 16 rows, those of a half by themselves, as in the
// weight][rank][16], zero beyond the rows. Both begin at multiples of 64 bytes. Numbers of one byte are -127
// .. 127 times a scale: behind the rows of a matrix of a stands f32 [rank], behind a panel of b bf16 [16].
typedef struct hetcomp_pair {
  int64_t rank;
  float scale;
  const uint8_t* a;
  const uint8_t* b;
} hetcomp_pair;

// The adapters of a step's tokens.
typedef struct hetcomp_adapters {
  const int32_t* of_token;      // [T] index into tables; -1: the token has none
  const int32_t* of_logit_row;  // [R] the same of the logit rows' tokens
  int64_t n;
  // [n][program.n_weights]; null: the adapter leaves the weight as it is. Not null only where the program's
  // weight is adaptable.
  const hetcomp_pair* const* const* tables;
  int64_t rank;    // the greatest of them
  float* scratch;  // program.adapter_floats + program.adapter_rows * rank numbers, 64-byte aligned
} hetcomp_adapters;

// One forward pass over `n_tokens` tokens, which may belong to several sequences.
// Tokens of one sequence are adjacent and in order of position; the pass appends them to the sequence's KV
// cache at those positions and attends to positions 0 .. positions[t] of the same slot.
typedef struct hetcomp_step {
  int64_t n_tokens;               // T, 1 .. program.max_tokens
  const int32_t* ids;             // [T] token ids, 0 .. vocab-1 (checked by the caller)
  const int32_t* positions;       // [T] 0 .. context-1 (checked by the caller)
  const int32_t* slots;           // [T] sequence slot, 0 .. max_batch-1
  int64_t n_logit_rows;           // R, 0 .. program.max_logit_rows
  const int32_t* logit_rows;      // [R] indices into the T tokens whose logits are wanted
  float* logits;                  // [R, vocab] out; null where a GPU computes them
  uint8_t* arena;                 // program.arena_bytes, 64-byte aligned: activations and workspaces
  const uint8_t* const* weights;  // program.n_weights base addresses, 64-byte aligned, packed layout
  uint8_t* const* states;  // program.n_states base addresses: [slot][...] as the plan's state types say
  int64_t context;         // positions a slot of the KV cache holds
  int64_t* lane_ns;        // null, or [program.n_timers]: nanoseconds spent per timer, added by thread 0
  // program.n_pinned base addresses, 64-byte aligned: buffers that CPU and GPU both reach.
  uint8_t* const* pinned;
  hetcomp_hand_over* hand_over;  // null where program.n_flags is 0
  // 1: a program whose plan defers experts does so in this step, of all its tokens. Nothing of it outlasts
  // the step: what a layer defers is added in the same step.
  int32_t defer_experts;
  const hetcomp_routing_hook* routing;  // null: nobody asks
  hetcomp_lane_trace* trace;            // null, or by thread of the lanes
  const hetcomp_adapters* adapters;     // null: no token has one
} hetcomp_step;

typedef struct hetcomp_program {
  uint32_t abi;           // HETCOMP_PROGRAM_ABI
  uint32_t isa_size;      // reserved for growth; 0
  const char* isa;        // "avx2", "avx512", ...
  const char* plan_hash;  // SHA-256 (hex) of plan.json that this program was generated from
  int64_t n_weights;
  int64_t n_states;
  int64_t arena_bytes;
  int64_t max_tokens;
  int64_t max_logit_rows;
  int64_t vocab;
  int64_t n_timers;  // one per op group and phase; names in plan.json
  int64_t n_nodes;   // NUMA nodes that its weights are cut for; lanes carry `own` where it is more than 1
  int64_t n_pinned;  // buffers that it shares with GPUs
  int64_t n_flags;   // hand-overs of a step; 0 beside GPUs: it has no part in any, and nobody calls run
  const hetcomp_adaptable* adaptable;  // [n_weights]; null: adapters cannot be used with the program
  int64_t adapter_floats;              // see hetcomp_adapters::scratch
  int64_t adapter_rows;
  // Runs one step. Called by every thread of the lane set with its own lane and the same step.
  void (*run)(hetcomp_lane* lane, const hetcomp_step* step);
} hetcomp_program;

// The only symbol a program exports.
const hetcomp_program* hetcomp_program_entry(void);

#ifdef __cplusplus
}
#endif

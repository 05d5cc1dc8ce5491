/* hetcomp: runs compiled Mixture-of-Experts models. C ABI of libhetcomp_runtime.so.
 *
 * Every function that can fail returns a hetcomp_status; after a failure hetcomp_last_error() has one
 * sentence that says what was wrong and what to do. No exception and no signal leaves the library.
 *
 * Threads: a model may be used from several threads; its steps run one after another, each on all lanes.
 * A session or a generation may be used from one thread at a time. A process that forked must load again.
 *
 * Signals: while a model is open whose weights are mapped from files, the process has a handler for SIGBUS,
 * by which a page that cannot be read fails the request (HETCOMP_IO). What is not of those files is passed on
 * to the handler that was there before; one that is installed later must pass on likewise.
 *
 * Strings are UTF-8. Memory that a function hands out is freed with hetcomp_free(), unless it says otherwise.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifndef HETCOMP_EXPORT
#define HETCOMP_EXPORT __attribute__((visibility("default")))
#endif

typedef enum hetcomp_status {
  HETCOMP_OK = 0,
  HETCOMP_INVALID_ARGUMENT =
      1,                    /* the call itself: a null pointer, an id outside the vocabulary, bad options */
  HETCOMP_NOT_FOUND = 2,    /* no artifact at that path */
  HETCOMP_BAD_ARTIFACT = 3, /* damaged, truncated or inconsistent */
  HETCOMP_NEWER_SCHEMA = 4, /* written by a newer hetcomp */
  HETCOMP_MISSING_ISA = 5,  /* this CPU or GPU runs none of the artifact's programs, or there is no GPU */
  HETCOMP_OUT_OF_MEMORY = 6,
  HETCOMP_CONTEXT_FULL = 7, /* the tokens do not fit into the session's context */
  HETCOMP_NO_FREE_SLOT = 8, /* all max_batch sessions are taken */
  HETCOMP_NO_TOKENIZER = 9, /* the artifact has no tokenizer or no chat template */
  HETCOMP_COMPUTE = 10,     /* a kernel failed, or the logits are not finite */
  HETCOMP_IO = 11,          /* a file could not be read */
  HETCOMP_INTERNAL = 12,    /* a bug */
  HETCOMP_POOL_FULL = 13    /* the KV cache that all sessions share has too few positions left */
} hetcomp_status;

HETCOMP_EXPORT const char* hetcomp_version(void);
/* The sentence of the last failure on this thread; "" if there was none. Valid until the next call. */
HETCOMP_EXPORT const char* hetcomp_last_error(void);
HETCOMP_EXPORT void hetcomp_free(void* memory);

/* ---- model ----------------------------------------------------------------------------------------------
 */

typedef struct hetcomp_model hetcomp_model;
typedef struct hetcomp_session hetcomp_session;
typedef struct hetcomp_generation hetcomp_generation;

typedef enum hetcomp_weights {
  HETCOMP_WEIGHTS_AUTO = 0, /* RAM if weights and KV cache fit into 80 % of the available memory, else MMAP */
  /* map the files: starts at once when cached, 4 KB pages; what is repacked from other files is in memory */
  HETCOMP_WEIGHTS_MMAP = 1,
  HETCOMP_WEIGHTS_RAM = 2 /* read into memory with 2 MB pages: about a fifth more bandwidth */
} hetcomp_weights;

typedef struct hetcomp_load_options {
  uint32_t struct_size;   /* set by hetcomp_load_options_init */
  int32_t threads;        /* 0: the physical cores this process may use, within its cgroup's CPU quota */
  int32_t weights;        /* hetcomp_weights */
  int32_t verify_weights; /* 1: compare every tensor with its hash while it is read; 0: trust the files */
  const char* isa;        /* NULL: the best that this CPU has; or "avx2", "avx512" */
  /* For models compiled for GPUs: a number for each of them, as the driver counts, from 0, in the order of
   * the artifact. 0: as the artifact says, its gpu:0 is number 0. */
  int32_t n_gpus;
  const int32_t* gpus;
} hetcomp_load_options;

HETCOMP_EXPORT void hetcomp_load_options_init(hetcomp_load_options* options);
/* path: the artifact's folder. options: NULL for the defaults. */
HETCOMP_EXPORT hetcomp_status hetcomp_load(const char* path, const hetcomp_load_options* options,
                                           hetcomp_model** out);
/* Sessions that are still open keep the model's memory until they are freed. */
HETCOMP_EXPORT void hetcomp_model_free(hetcomp_model* model);

/* A GPU that computes a part of a model. */
typedef struct hetcomp_gpu_use {
  const char* name;
  int32_t number; /* as the driver counts */
  int64_t bytes;  /* of its memory that the model takes */
} hetcomp_gpu_use;

typedef struct hetcomp_model_info {
  uint32_t struct_size; /* set by hetcomp_model_info_init */
  int32_t vocab;
  int64_t context;        /* positions a session holds */
  int32_t max_batch;      /* sessions at once */
  int32_t max_tokens;     /* largest step; longer inputs are cut into several */
  int32_t max_logit_rows; /* logit rows of a step */
  int32_t bos_token_id;   /* -1: none */
  int32_t n_eos_token_ids;
  int32_t threads;
  int32_t has_tokenizer;
  int32_t has_chat_template;
  /* Valid as long as the model. */
  const int32_t* eos_token_ids;
  const char* name;
  const char* architecture;
  const char* isa;
  const char* weights; /* "ram" or "mmap" */
  const char* gpu;     /* the names of the GPUs that compute a part; NULL: none does */
  int64_t gpu_bytes;   /* of their memory that the model takes */
  const hetcomp_gpu_use* gpus;
  int32_t n_gpus;
  int64_t kv_tokens; /* positions that all sessions hold together, at most */
} hetcomp_model_info;

HETCOMP_EXPORT void hetcomp_model_info_init(hetcomp_model_info* info);
HETCOMP_EXPORT hetcomp_status hetcomp_model_get_info(const hetcomp_model* model, hetcomp_model_info* info);

/* A JSON object: load seconds, bytes, threads, isa, nodes (the NUMA nodes that the weights are cut for: node,
 * machine_node, threads, weight_bytes), notes (sentences about what slows it down), and for prefill and
 * decode tokens, steps, seconds, tokens per second and the milliseconds of every timer of the plan. With
 * GPUs also gpu: devices (of each the name, its number as the driver counts, and bytes of its memory), steps,
 * steps_by_batch (by the batch size of the graph that was run), and streamed and cache (where experts are:
 * how many were copied, and how often a decoded token found its expert there); all other bytes are the CPU's.
 * Freed with hetcomp_free. */
HETCOMP_EXPORT hetcomp_status hetcomp_model_stats(const hetcomp_model* model, char** json);
/* A JSON array, one object a weight: weight (its name), bytes, node (the artifact's), machine_node (null:
 * any), and of its pages the number (pages), on_node, elsewhere, absent (not in memory). Freed with
 * hetcomp_free. */
HETCOMP_EXPORT hetcomp_status hetcomp_model_numa_report(const hetcomp_model* model, char** json);
/* From the next step on it is counted how often each expert is chosen, by all tokens and by those of each
 * session. A choice counts half of a new one once half_life more tokens (of the session) were counted; 0: as
 * much as a new one, always; negative: nothing is counted any more. Layers whose experts lie on a GPU alone
 * are left out: the CPU does not see their routing. */
HETCOMP_EXPORT hetcomp_status hetcomp_model_count_experts(hetcomp_model* model, int64_t half_life);
/* What was counted since then, or since the figures were set to zero, as the file that `hetcomp plan --stats`
 * reads: a JSON object with top_k, experts, layers, tokens, half_life and frequency ([layer][expert]).
 * HETCOMP_INVALID_ARGUMENT where nothing was. Freed with hetcomp_free. */
HETCOMP_EXPORT hetcomp_status hetcomp_model_expert_statistics(const hetcomp_model* model, char** json);
/* The same of one session, since it was created. */
HETCOMP_EXPORT hetcomp_status hetcomp_session_expert_statistics(const hetcomp_session* session, char** json);
/* Sets the figures of steps to zero. */
HETCOMP_EXPORT hetcomp_status hetcomp_model_reset_stats(hetcomp_model* model);

/* Of a model compiled to defer experts (its plan leaves some of a token's experts to the next MoE layer):
 * which tokens. */
typedef enum hetcomp_deferral {
  HETCOMP_DEFER_GENERATED = 0, /* those of decode steps: one token after others */
  HETCOMP_DEFER_ALL = 1,       /* prompts too: to measure on text (hetcomp_forward) what it costs */
  HETCOMP_DEFER_NONE = 2
} hetcomp_deferral;

/* From the model's next step on, of all its sessions; HETCOMP_DEFER_GENERATED when it is loaded. Models that
 * defer nothing give the same with each; but with HETCOMP_DEFER_ALL no prompt streams experts to a GPU. */
HETCOMP_EXPORT hetcomp_status hetcomp_model_set_deferral(hetcomp_model* model, hetcomp_deferral which);

/* How one step routed its tokens, as the experts got it; valid during the callback. Layers whose experts lie
 * on a GPU alone are left out: the CPU does not see their routing. */
typedef struct hetcomp_routing {
  uint32_t struct_size;
  int32_t decode; /* 1: a step of decoding, one token of each sequence; 0: of a prompt */
  int64_t n_tokens;
  int32_t n_layers; /* MoE layers, in order */
  int32_t top_k;
  const int32_t* positions; /* [n_tokens] */
  const int32_t* slots;     /* [n_tokens]: the sequence's place, as long as its session lives */
  const int32_t* experts;   /* [n_layers][n_tokens][top_k] */
  const float* weights;     /* likewise */
} hetcomp_routing;

/* Must not use the model. */
typedef void (*hetcomp_routing_callback)(const hetcomp_routing* routing, void* user);
/* Called at the end of every step from the next one on, by the thread that runs it; NULL: no more. */
HETCOMP_EXPORT hetcomp_status hetcomp_model_set_routing_callback(hetcomp_model* model,
                                                                 hetcomp_routing_callback callback,
                                                                 void* user);

/* For benchmarks: from the next step on the experts get this routing in place of the routers', a token that
 * of row position % n_tokens; n_tokens 0: the routers' again. experts, weights: [n_layers][n_tokens][top_k],
 * copied. A step fails with HETCOMP_INVALID_ARGUMENT where the routing is not of the model's shape, and in
 * models whose routers run on a GPU. */
HETCOMP_EXPORT hetcomp_status hetcomp_model_replay_routing(hetcomp_model* model, int32_t n_layers,
                                                           int64_t n_tokens, int32_t top_k,
                                                           const int32_t* experts, const float* weights);

/* What a thread of the CPU's lanes does from a moment on, until its next event. */
typedef struct hetcomp_lane_event {
  int64_t ns; /* CLOCK_MONOTONIC */
  int32_t thread;
  int32_t call;  /* of the plan: which use of a template */
  int32_t timer; /* as in hetcomp_model_stats; -1: waits for the other threads, -2: is done with the step */
  int32_t reserved; /* 0 */
} hetcomp_lane_event;

typedef enum hetcomp_gpu_work {
  HETCOMP_GPU_KERNEL = 0,
  HETCOMP_GPU_HAND_OVER = 1, /* tells the CPU or another GPU something, or waits for it */
  HETCOMP_GPU_COPY = 2       /* experts come from the CPU's memory */
} hetcomp_gpu_work;

/* What a GPU did from one moment to another: a copy, a hand-over, or launches one behind the other, which are
 * told by their first kernel. */
typedef struct hetcomp_gpu_event {
  int64_t begin_ns; /* CLOCK_MONOTONIC, by the GPU's clock, which is put beside it anew in every step */
  int64_t end_ns;
  int32_t gpu;        /* as in hetcomp_model_info */
  int32_t work;       /* hetcomp_gpu_work */
  int32_t layer;      /* of a kernel: of the plan; -1: none */
  int32_t launches;   /* in this time; of a copy: 0 */
  int64_t bytes;      /* of a copy */
  const char* kernel; /* its name; "": none */
  const char* role;   /* of the kernel's op in the plan */
} hetcomp_gpu_event;

/* What lanes and GPUs did in a step; valid during the callback. */
typedef struct hetcomp_step_trace {
  uint32_t struct_size;
  int32_t decode; /* as in hetcomp_routing */
  int64_t n_tokens;
  int64_t position; /* behind the last token */
  int64_t begin_ns;
  int64_t end_ns;
  int64_t n_events;
  int64_t dropped;                  /* events for which there was no room */
  const hetcomp_lane_event* events; /* by thread, then by time */
  int64_t n_gpu_events;
  const hetcomp_gpu_event* gpu_events; /* by GPU */
} hetcomp_step_trace;

/* Must not use the model. */
typedef void (*hetcomp_lane_trace_callback)(const hetcomp_step_trace* trace, void* user);
/* Called at the end of every step from the next one on, by the thread that runs it; NULL: no more. Steps of
 * GPUs take longer meanwhile: their graphs record events. */
HETCOMP_EXPORT hetcomp_status hetcomp_model_set_lane_trace_callback(hetcomp_model* model,
                                                                    hetcomp_lane_trace_callback callback,
                                                                    void* user);

/* ---- adapters: LoRA, chosen by each session ---------------------------------------------------------------
 */

/* Makes an adapter available by a name of the caller's choice. path: a file that `hetcomp adapter pack` wrote
 * for this artifact; it is read and checked whole, while steps go on. Up to 32 are in memory, of those that
 * change what GPUs compute as many as the artifact has room for; one more takes the place of the one whose
 * last use is longest ago and that no session has, which is read again when it is wanted. Refused
 * (HETCOMP_BAD_ARTIFACT) if the file is damaged, made for another artifact, or has numbers that are not
 * finite; HETCOMP_INVALID_ARGUMENT if the name is taken, or GPUs compute all of a model that has no room for
 * adapters; HETCOMP_NO_FREE_SLOT if those in memory are all in use. */
HETCOMP_EXPORT hetcomp_status hetcomp_adapter_load(hetcomp_model* model, const char* path, const char* name);
/* Refused while a session has it. */
HETCOMP_EXPORT hetcomp_status hetcomp_adapter_unload(hetcomp_model* model, const char* name);
/* A JSON array, one object an adapter: name, file, resident, sha256 (of the adapter that was packed),
 * sessions (that have it), and where it is in memory bytes, rank and weights. Freed with hetcomp_free. */
HETCOMP_EXPORT hetcomp_status hetcomp_adapter_list(const hetcomp_model* model, char** json);
/* The adapter of all that the session computes from here on; NULL: none, the model as it was compiled. If it
 * is another than before, the session forgets its tokens, as their keys and values are the other adapter's.
 * Sessions of one step may have different adapters. */
HETCOMP_EXPORT hetcomp_status hetcomp_session_set_adapter(hetcomp_session* session, const char* name);

/* ---- sessions: one sequence each, with its place in the KV cache ----------------------------------------
 */

HETCOMP_EXPORT hetcomp_status hetcomp_session_create(hetcomp_model* model, hetcomp_session** out);
HETCOMP_EXPORT void hetcomp_session_free(hetcomp_session* session);
/* Forgets all tokens. */
HETCOMP_EXPORT hetcomp_status hetcomp_session_reset(hetcomp_session* session);
/* Keeps the first `length` tokens. Where the model has recurrences (linear attention) these are computed
 * again before the next ones: their states cannot be cut back. */
HETCOMP_EXPORT hetcomp_status hetcomp_session_truncate(hetcomp_session* session, int64_t length);
/* Tokens in the KV cache. */
HETCOMP_EXPORT hetcomp_status hetcomp_session_length(const hetcomp_session* session, int64_t* length);
/* Prepares for a prompt that repeats what the session holds (the next turn of a chat): truncates to the
 * longest common prefix with ids, but at most n - 1 tokens, and sets *kept to its length. Go on with ids +
 * kept. Where the model has recurrences it keeps all tokens if they are that prefix, else those up to the
 * last step of a prompt that begins in it. */
HETCOMP_EXPORT hetcomp_status hetcomp_session_reuse(hetcomp_session* session, const int32_t* ids, int64_t n,
                                                    int64_t* kept);

/* Each appends ids to the session. n >= 1; ids are 0 .. vocab - 1; if n does not fit into the context
 * (HETCOMP_CONTEXT_FULL), or into what all sessions share (HETCOMP_POOL_FULL: others go on), nothing is
 * computed. If a step fails the session keeps the tokens of the steps before it. */

/* logits: [n][vocab], of every token. */
HETCOMP_EXPORT hetcomp_status hetcomp_forward(hetcomp_session* session, const int32_t* ids, int64_t n,
                                              float* logits);
/* logits: [vocab], of the last token; or NULL. */
HETCOMP_EXPORT hetcomp_status hetcomp_prefill(hetcomp_session* session, const int32_t* ids, int64_t n,
                                              float* logits);
/* One token for each of n different sessions of one model. logits: [n][vocab]. */
HETCOMP_EXPORT hetcomp_status hetcomp_decode(hetcomp_model* model, hetcomp_session* const* sessions,
                                             const int32_t* ids, int64_t n, float* logits);

/* ---- generation -----------------------------------------------------------------------------------------
 */

/* Order of the sampler (that of transformers): repetition penalty, temperature, top-k, top-p, min-p, then one
 * draw. Same seed, same logits: same tokens. */
typedef struct hetcomp_generate_params {
  uint32_t struct_size; /* set by hetcomp_generate_params_init */
  int32_t ignore_eos;
  int64_t max_new_tokens;
  double temperature; /* 0: greedy */
  int32_t top_k;      /* 0: off */
  int32_t n_stop;
  double top_p;              /* 1: off */
  double min_p;              /* 0: off */
  double repetition_penalty; /* 1: off; over all tokens of the session */
  uint64_t seed;
  const char* const* stop; /* n_stop strings; the text ends before the first that appears */
} hetcomp_generate_params;

HETCOMP_EXPORT void hetcomp_generate_params_init(hetcomp_generate_params* params);

typedef enum hetcomp_finish {
  HETCOMP_FINISH_NONE = 0,    /* goes on */
  HETCOMP_FINISH_EOS = 1,     /* the token is an end-of-sequence token */
  HETCOMP_FINISH_LENGTH = 2,  /* max_new_tokens */
  HETCOMP_FINISH_STOP = 3,    /* a stop string */
  HETCOMP_FINISH_CONTEXT = 4, /* the context is full */
  HETCOMP_FINISH_CALLBACK = 5 /* the callback asked for it */
} hetcomp_finish;

typedef struct hetcomp_token {
  int32_t id;     /* -1: none yet (a part of the prompt was computed), or none was asked for */
  int32_t finish; /* hetcomp_finish: why this token is the last */
  /* The complete characters that this token finished, NUL-terminated; valid until the next call. Text that
   * may become a stop string is held back. The texts of all tokens together are the whole text. */
  const char* text;
  size_t text_length;
} hetcomp_token;

/* Generation step by step. The session must outlive it and not be used otherwise meanwhile. The prompt (n >=
 * 1) is appended to what the session holds. */
HETCOMP_EXPORT hetcomp_status hetcomp_generation_start(hetcomp_session* session, const int32_t* ids,
                                                       int64_t n, const hetcomp_generate_params* params,
                                                       hetcomp_generation** out);
/* Computes at most one step. After the last token every call returns id -1 and its finish. */
HETCOMP_EXPORT hetcomp_status hetcomp_generation_next(hetcomp_generation* generation, hetcomp_token* token);
HETCOMP_EXPORT void hetcomp_generation_free(hetcomp_generation* generation);

/* Called for every token; a non-zero result stops. */
typedef int (*hetcomp_token_callback)(const hetcomp_token* token, void* user);
/* The same in one call. finish: NULL, or receives a hetcomp_finish. */
HETCOMP_EXPORT hetcomp_status hetcomp_generate(hetcomp_session* session, const int32_t* ids, int64_t n,
                                               const hetcomp_generate_params* params,
                                               hetcomp_token_callback callback, void* user, int32_t* finish);

/* ---- text -----------------------------------------------------------------------------------------------
 */

/* parse_special: special tokens written in the text become their ids. add_special: the ids that the model
 * puts around a text (BOS). *ids is freed with hetcomp_free. */
HETCOMP_EXPORT hetcomp_status hetcomp_tokenize(const hetcomp_model* model, const char* text, size_t length,
                                               int parse_special, int add_special, int32_t** ids, size_t* n);
/* *text has *length bytes and a NUL behind them; freed with hetcomp_free. */
HETCOMP_EXPORT hetcomp_status hetcomp_detokenize(const hetcomp_model* model, const int32_t* ids, size_t n,
                                                 int skip_special, char** text, size_t* length);
/* context_json: an object with messages, add_generation_prompt, tools, ... *text as above. */
HETCOMP_EXPORT hetcomp_status hetcomp_chat_render(const hetcomp_model* model, const char* context_json,
                                                  size_t context_length, char** text, size_t* length);

#ifdef __cplusplus
}
#endif

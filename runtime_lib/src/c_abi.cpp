// The C ABI of hetcomp.h over the classes of the runtime: checks arguments, turns exceptions into statuses.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "c_abi_guard.h"
#include "c_abi_model.h"
#include "generation.h"

struct hetcomp_generation {
  hetcomp_generation(hetcomp::Session& session, std::span<const std::int32_t> ids,
                     const hetcomp::GenerateParams& p)
      : generation(session, ids, p) {}
  hetcomp::Generation generation;
};

namespace {

using hetcomp::Error;
using namespace hetcomp::c_abi;

std::span<const std::int32_t> id_span(const std::int32_t* ids, std::int64_t n) {
  if (n < 1) throw Error(HETCOMP_INVALID_ARGUMENT, "There are no tokens: at least one is needed.");
  require(ids, "ids");
  return {ids, static_cast<std::size_t>(n)};
}

hetcomp::GenerateParams generate_params(const hetcomp_generate_params* given) {
  hetcomp_generate_params p;
  hetcomp_generate_params_init(&p);
  p = copy_options(given, p);
  hetcomp::GenerateParams params{p.max_new_tokens,
                                 {p.temperature, p.top_k, p.top_p, p.min_p, p.repetition_penalty},
                                 p.seed,
                                 p.ignore_eos != 0,
                                 {}};
  if (p.n_stop < 0) throw Error(HETCOMP_INVALID_ARGUMENT, "The number of stop strings is negative.");
  if (p.n_stop > 0) require(p.stop, "stop");
  for (std::int32_t i = 0; i < p.n_stop; ++i) {
    require(p.stop[i], "stop");
    params.stop.emplace_back(p.stop[i]);
  }
  return params;
}

hetcomp_token public_token(const hetcomp::GeneratedToken& token) {
  return {token.id, token.finish, token.text.c_str(), token.text.size()};
}

}  // namespace

const char* hetcomp_version(void) { return HETCOMP_VERSION; }

const char* hetcomp_last_error(void) { return last_error.c_str(); }

void hetcomp_free(void* memory) { std::free(memory); }

// ---- model

void hetcomp_load_options_init(hetcomp_load_options* options) {
  if (options != nullptr)
    *options = {sizeof(hetcomp_load_options), 0, HETCOMP_WEIGHTS_AUTO, 1, nullptr, 0, nullptr};
}

hetcomp_status hetcomp_load(const char* path, const hetcomp_load_options* options, hetcomp_model** out) {
  return guard([&] {
    require(path, "path");
    require(out, "out");
    hetcomp_load_options o;
    hetcomp_load_options_init(&o);
    o = copy_options(options, o);
    if (o.weights < HETCOMP_WEIGHTS_AUTO || o.weights > HETCOMP_WEIGHTS_RAM)
      throw Error(HETCOMP_INVALID_ARGUMENT, "The option weights must be auto (0), mmap (1) or ram (2).");
    hetcomp::LoadOptions load{o.threads,
                              static_cast<hetcomp_weights>(o.weights),
                              o.verify_weights != 0,
                              o.isa == nullptr ? "" : o.isa,
                              {}};
    if (o.n_gpus < 0 || (o.n_gpus > 0 && o.gpus == nullptr))
      throw Error(HETCOMP_INVALID_ARGUMENT, "The option gpus must have n_gpus numbers.");
    load.gpu.devices.assign(o.gpus, o.gpus + o.n_gpus);
    *out = std::make_unique<hetcomp_model>(std::make_shared<hetcomp::Model>(path, load)).release();
  });
}

void hetcomp_model_free(hetcomp_model* model) { delete model; }

void hetcomp_model_info_init(hetcomp_model_info* info) {
  if (info == nullptr) return;
  *info = {};
  info->struct_size = sizeof(hetcomp_model_info);
}

hetcomp_status hetcomp_model_get_info(const hetcomp_model* model, hetcomp_model_info* info) {
  return guard([&] {
    require(model, "model");
    require(info, "info");
    const std::uint32_t size = info->struct_size;
    copy_options(info, *info);  // checks the size
    const hetcomp::Model& m = *model->model;
    const hetcomp::ModelFacts& facts = m.facts();
    const hetcomp_model_info full{
        .struct_size = size,
        .vocab = facts.vocab,
        .context = facts.context,
        .max_batch = facts.max_batch,
        .max_tokens = facts.max_tokens,
        .max_logit_rows = facts.max_logit_rows,
        .bos_token_id = facts.bos_token_id.value_or(-1),
        .n_eos_token_ids = static_cast<std::int32_t>(facts.eos_token_ids.size()),
        .threads = m.threads(),
        .has_tokenizer = m.tokenizer() != nullptr,
        .has_chat_template = m.chat_template() != nullptr,
        .eos_token_ids = facts.eos_token_ids.data(),
        .name = facts.name.c_str(),
        .architecture = facts.architecture.c_str(),
        .isa = m.isa().c_str(),
        .weights = m.residency() == hetcomp::Residency::kRam ? "ram" : "mmap",
        .gpu = model->gpus.empty() ? nullptr : model->gpu_names.c_str(),
        .gpu_bytes = model->gpu_bytes,
        .gpus = model->gpus.data(),
        .n_gpus = static_cast<std::int32_t>(model->gpus.size()),
        .kv_tokens = facts.kv_tokens,
    };
    std::memcpy(static_cast<void*>(info), &full, size);
  });
}

hetcomp_status hetcomp_model_stats(const hetcomp_model* model, char** json) {
  return guard([&] {
    require(model, "model");
    require(json, "json");
    *json = copy_text(model->model->statistics_json(), nullptr);
  });
}

hetcomp_status hetcomp_model_numa_report(const hetcomp_model* model, char** json) {
  return guard([&] {
    require(model, "model");
    require(json, "json");
    *json = copy_text(model->model->numa_report_json(), nullptr);
  });
}

hetcomp_status hetcomp_model_reset_stats(hetcomp_model* model) {
  return guard([&] {
    require(model, "model");
    model->model->reset_statistics();
  });
}

hetcomp_status hetcomp_model_set_deferral(hetcomp_model* model, hetcomp_deferral which) {
  return guard([&] {
    require(model, "model");
    if (which != HETCOMP_DEFER_GENERATED && which != HETCOMP_DEFER_ALL && which != HETCOMP_DEFER_NONE)
      throw Error(HETCOMP_INVALID_ARGUMENT,
                  "There is no hetcomp_deferral " + std::to_string(static_cast<int>(which)) + ".");
    model->model->set_deferral(which);
  });
}

// ---- sessions

hetcomp_status hetcomp_session_create(hetcomp_model* model, hetcomp_session** out) {
  return guard([&] {
    require(model, "model");
    require(out, "out");
    *out = std::make_unique<hetcomp_session>(*model).release();
  });
}

void hetcomp_session_free(hetcomp_session* session) { delete session; }

hetcomp_status hetcomp_session_reset(hetcomp_session* session) {
  return hetcomp_session_truncate(session, 0);
}

hetcomp_status hetcomp_session_truncate(hetcomp_session* session, int64_t length) {
  return guard([&] {
    require(session, "session");
    session->session.truncate(length);
  });
}

hetcomp_status hetcomp_session_length(const hetcomp_session* session, int64_t* length) {
  return guard([&] {
    require(session, "session");
    require(length, "length");
    *length = session->session.length();
  });
}

hetcomp_status hetcomp_session_reuse(hetcomp_session* session, const int32_t* ids, int64_t n, int64_t* kept) {
  return guard([&] {
    require(session, "session");
    require(kept, "kept");
    *kept = session->session.reuse(id_span(ids, n));
  });
}

hetcomp_status hetcomp_forward(hetcomp_session* session, const int32_t* ids, int64_t n, float* logits) {
  return guard([&] {
    require(session, "session");
    require(logits, "logits");
    session->session.forward(id_span(ids, n), logits);
  });
}

hetcomp_status hetcomp_prefill(hetcomp_session* session, const int32_t* ids, int64_t n, float* logits) {
  return guard([&] {
    require(session, "session");
    session->session.prefill(id_span(ids, n), logits);
  });
}

hetcomp_status hetcomp_decode(hetcomp_model* model, hetcomp_session* const* sessions, const int32_t* ids,
                              int64_t n, float* logits) {
  return guard([&] {
    require(model, "model");
    require(sessions, "sessions");
    require(logits, "logits");
    const auto span = id_span(ids, n);
    std::vector<hetcomp::Session*> list;
    for (std::int64_t i = 0; i < n; ++i) {
      require(sessions[i], "sessions");
      list.push_back(&sessions[i]->session);
    }
    hetcomp::Session::decode(*model->model, list, span, logits);
  });
}

// ---- generation

void hetcomp_generate_params_init(hetcomp_generate_params* params) {
  if (params == nullptr) return;
  *params = {};
  params->struct_size = sizeof(hetcomp_generate_params);
  params->max_new_tokens = hetcomp::GenerateParams{}.max_new_tokens;
  params->top_p = 1;
  params->repetition_penalty = 1;
}

hetcomp_status hetcomp_generation_start(hetcomp_session* session, const int32_t* ids, int64_t n,
                                        const hetcomp_generate_params* params, hetcomp_generation** out) {
  return guard([&] {
    require(session, "session");
    require(out, "out");
    *out = std::make_unique<hetcomp_generation>(session->session, id_span(ids, n), generate_params(params))
               .release();
  });
}

hetcomp_status hetcomp_generation_next(hetcomp_generation* generation, hetcomp_token* token) {
  return guard([&] {
    require(generation, "generation");
    require(token, "token");
    *token = public_token(generation->generation.next());
  });
}

void hetcomp_generation_free(hetcomp_generation* generation) { delete generation; }

hetcomp_status hetcomp_generate(hetcomp_session* session, const int32_t* ids, int64_t n,
                                const hetcomp_generate_params* params, hetcomp_token_callback callback,
                                void* user, int32_t* finish) {
  return guard([&] {
    require(session, "session");
    hetcomp::Generation generation(session->session, id_span(ids, n), generate_params(params));
    hetcomp_finish reason = HETCOMP_FINISH_NONE;
    while (reason == HETCOMP_FINISH_NONE) {
      const hetcomp::GeneratedToken& token = generation.next();
      reason = token.finish;
      if (token.id < 0 || callback == nullptr) continue;
      const hetcomp_token event = public_token(token);
      if (callback(&event, user) != 0 && reason == HETCOMP_FINISH_NONE) reason = HETCOMP_FINISH_CALLBACK;
    }
    if (finish != nullptr) *finish = reason;
  });
}

// ---- text

hetcomp_status hetcomp_tokenize(const hetcomp_model* model, const char* text, size_t length,
                                int parse_special, int add_special, int32_t** ids, size_t* n) {
  return guard([&] {
    require(model, "model");
    require(text, "text");
    require(ids, "ids");
    require(n, "n");
    std::string error;
    const auto encoded = model->model->require_tokenizer().encode({text, length}, parse_special != 0,
                                                                  add_special != 0, &error);
    if (!encoded) throw Error(HETCOMP_INVALID_ARGUMENT, error);
    *ids = allocate<std::int32_t>(encoded->size() + 1);
    std::copy(encoded->begin(), encoded->end(), *ids);
    *n = encoded->size();
  });
}

hetcomp_status hetcomp_detokenize(const hetcomp_model* model, const int32_t* ids, size_t n, int skip_special,
                                  char** text, size_t* length) {
  return guard([&] {
    require(model, "model");
    if (n > 0) require(ids, "ids");
    require(text, "text");
    require(length, "length");
    *text = copy_text(model->model->require_tokenizer().decode({ids, n}, skip_special != 0), length);
  });
}

hetcomp_status hetcomp_chat_render(const hetcomp_model* model, const char* context_json,
                                   size_t context_length, char** text, size_t* length) {
  return guard([&] {
    require(model, "model");
    require(context_json, "context_json");
    require(text, "text");
    require(length, "length");
    std::string error;
    const auto rendered =
        model->model->require_chat_template().render({context_json, context_length}, &error);
    if (!rendered) throw Error(HETCOMP_INVALID_ARGUMENT, error);
    *text = copy_text(*rendered, length);
  });
}

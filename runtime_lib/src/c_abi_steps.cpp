// The C ABI's part that looks into steps: routing and what the lanes do.
#include "c_abi_guard.h"
#include "c_abi_model.h"

using hetcomp::c_abi::copy_text;
using hetcomp::c_abi::guard;
using hetcomp::c_abi::require;

hetcomp_status hetcomp_model_set_routing_callback(hetcomp_model* model, hetcomp_routing_callback callback,
                                                  void* user) {
  return guard([&] {
    require(model, "model");
    model->model->set_routing_callback(callback, user);
  });
}

hetcomp_status hetcomp_model_count_experts(hetcomp_model* model, int64_t half_life) {
  return guard([&] {
    require(model, "model");
    model->model->count_experts(half_life);
  });
}

hetcomp_status hetcomp_model_expert_statistics(const hetcomp_model* model, char** json) {
  return guard([&] {
    require(model, "model");
    require(json, "json");
    *json = copy_text(model->model->expert_counts().json(), nullptr);
  });
}

hetcomp_status hetcomp_session_expert_statistics(const hetcomp_session* session, char** json) {
  return guard([&] {
    require(session, "session");
    require(json, "json");
    *json = copy_text(session->session.expert_statistics_json(), nullptr);
  });
}

hetcomp_status hetcomp_model_replay_routing(hetcomp_model* model, int32_t n_layers, int64_t n_tokens,
                                            int32_t top_k, const int32_t* experts, const float* weights) {
  return guard([&] {
    require(model, "model");
    hetcomp::Routing routing{{}, {}, n_layers, top_k, {}};
    if (n_tokens > 0 && n_layers > 0 && top_k > 0) {
      require(experts, "experts");
      require(weights, "weights");
      const std::int64_t choices = n_tokens * n_layers * top_k;
      routing.experts.assign(experts, experts + choices);
      routing.weights.assign(weights, weights + choices);
    }
    model->model->replay_routing(std::move(routing), n_tokens);
  });
}

hetcomp_status hetcomp_model_set_lane_trace_callback(hetcomp_model* model,
                                                     hetcomp_lane_trace_callback callback, void* user) {
  return guard([&] {
    require(model, "model");
    model->model->set_lane_trace_callback(callback, user);
  });
}

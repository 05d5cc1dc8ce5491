// The C ABI's part for adapters.
#include "c_abi_guard.h"
#include "c_abi_model.h"

using hetcomp::c_abi::copy_text;
using hetcomp::c_abi::guard;
using hetcomp::c_abi::require;

hetcomp_status hetcomp_adapter_load(hetcomp_model* model, const char* path, const char* name) {
  return guard([&] {
    require(model, "model");
    require(path, "path");
    require(name, "name");
    model->model->load_adapter(path, name);
  });
}

hetcomp_status hetcomp_adapter_unload(hetcomp_model* model, const char* name) {
  return guard([&] {
    require(model, "model");
    require(name, "name");
    model->model->unload_adapter(name);
  });
}

hetcomp_status hetcomp_adapter_list(const hetcomp_model* model, char** json) {
  return guard([&] {
    require(model, "model");
    require(json, "json");
    *json = copy_text(model->model->adapters_json(), nullptr);
  });
}

hetcomp_status hetcomp_session_set_adapter(hetcomp_session* session, const char* name) {
  return guard([&] {
    require(session, "session");
    session->session.set_adapter(name);
  });
}

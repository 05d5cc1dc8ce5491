// What the C ABI's handles of a model and of a session hold.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "hetcomp/hetcomp.h"
#include "model.h"
#include "session.h"

struct hetcomp_model {
  explicit hetcomp_model(std::shared_ptr<hetcomp::Model> loaded) : model(std::move(loaded)) {
    for (const hetcomp::GpuUse& use : model->gpus()) {
      gpus.push_back({use.name.c_str(), use.ordinal, static_cast<std::int64_t>(use.bytes)});
      gpu_names += (gpu_names.empty() ? "" : ", ") + use.name;
      gpu_bytes += gpus.back().bytes;
    }
  }
  std::shared_ptr<hetcomp::Model> model;
  std::vector<hetcomp_gpu_use> gpus;
  std::string gpu_names;
  std::int64_t gpu_bytes = 0;
};

struct hetcomp_session {
  explicit hetcomp_session(const hetcomp_model& owner) : session(owner.model) {}
  hetcomp::Session session;
};

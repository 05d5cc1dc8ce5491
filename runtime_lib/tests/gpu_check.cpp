// Hand-overs between a GPU and this CPU, checked and measured:
//   gpu_check FOLDER [STEPS]
// FOLDER has a gpu/ as gpu_check_program.py writes it: L layers of y = x + 1 on the GPU, a hand-over to the
// CPU and back, y = x + 1 again. The CPU answers at once, without work. Prints a JSON document; 1 if a result
// was wrong.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "file.h"
#include "gpu/program_set.h"

namespace {

using hetcomp::gpu::HandShake;
using hetcomp::gpu::ProgramSet;
using Clock = std::chrono::steady_clock;

double microseconds(Clock::duration time) { return std::chrono::duration<double, std::micro>(time).count(); }

std::string quantiles(std::vector<double> values) {
  std::ranges::sort(values);
  const auto at = [&](double q) {
    return values[static_cast<std::size_t>(q * static_cast<double>(values.size() - 1))];
  };
  char text[128];
  std::snprintf(text, sizeof text, "{\"min\": %.2f, \"median\": %.2f, \"p95\": %.2f, \"max\": %.2f}", at(0),
                at(0.5), at(0.95), at(1));
  return text;
}

struct Check {
  ProgramSet& program;
  float* input;
  float* output;
  std::size_t width;
  int layers;
};

// One step of a batch size that stands for a variant; false if the result is wrong.
bool step(Check& check, int batch, bool hand_overs, float first) {
  for (std::size_t i = 0; i < check.width; ++i) check.input[i] = first + static_cast<float>(i % 100);
  check.program.run(batch, [&](HandShake& hand_shake) {
    for (int layer = 0; hand_overs && layer < check.layers; ++layer) {
      if (!hand_shake.wait_for_gpu(static_cast<std::uint32_t>(layer))) return;
      hand_shake.answer(static_cast<std::uint32_t>(layer));
    }
  });
  for (std::size_t i = 0; i < check.width; ++i)
    if (check.output[i] != first + static_cast<float>(i % 100) + 2.0F * static_cast<float>(check.layers))
      return false;
  return true;
}

int run(const std::string& folder, int steps) {
  const auto facts = nlohmann::json::parse(hetcomp::File(folder + "/check.json").text());
  const hetcomp::gpu::CudaDriver driver;
  const auto load = Clock::now();
  ProgramSet program(driver, folder, {{"gpu:0", "gpu/program.json"}}, {});
  const double load_ms = microseconds(Clock::now() - load) / 1e3;
  const auto input = program.host("input");
  Check check{program, reinterpret_cast<float*>(input.data()),
              reinterpret_cast<float*>(program.host("output").data()), input.size() / sizeof(float),
              facts["layers"].get<int>()};
  std::printf("{\"device\": \"%s\", \"cuda\": %d, \"layers\": %d, \"steps\": %d, \"load_ms\": %.1f,\n",
              program[0].device().name.c_str(), driver.version(), check.layers, steps, load_ms);
  int wrong = 0;
  for (const auto& [name, variant] : facts["variants"].items()) {
    std::vector<double> times;
    for (int i = 0; i < steps + 50; ++i) {  // the first fifty warm up
      const auto start = Clock::now();
      const bool right = step(check, variant["batch"].get<int>(), variant["hand_overs"].get<bool>(),
                              static_cast<float>(i % 1000));
      if (i >= 50) times.push_back(microseconds(Clock::now() - start));
      wrong += right ? 0 : 1;
    }
    std::printf(" \"%s_us\": %s,\n", name.c_str(), quantiles(times).c_str());
  }
  // A step that is given up must leave the program usable.
  bool gave_up = false;
  try {
    program.run(1, [](HandShake& hand_shake) {
      hand_shake.wait_for_gpu(0);
      throw std::domain_error("the lane is dead");
    });
  } catch (const std::domain_error&) {
    gave_up = step(check, 1, true, 7);
  }
  const bool good = wrong == 0 && gave_up;
  std::printf(" \"wrong_results\": %d, \"usable_after_a_dead_lane\": %s, \"ok\": %s}\n", wrong,
              gave_up ? "true" : "false", good ? "true" : "false");
  return good ? 0 : 1;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) {
    std::fprintf(stderr, "usage: gpu_check FOLDER [STEPS]\n");
    return 2;
  }
  try {
    return run(arguments[1], count > 2 ? std::atoi(arguments[2]) : 2000);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

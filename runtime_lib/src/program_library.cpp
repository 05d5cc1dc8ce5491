#include "program_library.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <memory>

#include "cpu_isa.h"
#include "status.h"

namespace hetcomp {
namespace {

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text.empty() ? "none that hetcomp compiles for" : text;
}

// A way to write "/" that this process has not used before. Two loads of one file share the library under the
// first one's name, which lives on when that descriptor is closed and its number belongs to another file.
std::string unused_prefix() {
  static std::atomic<std::uint64_t> loads{0};
  std::string path = "/";
  for (std::uint64_t bits = ++loads; bits != 0; bits >>= 1) path += bits % 2 != 0 ? "./" : "/";
  return path;
}

}  // namespace

const ProgramRecord& choose_program(const Manifest& manifest, const std::vector<std::string>& available,
                                    const std::string& forced) {
  std::vector<std::string> offered;
  for (const ProgramRecord& program : manifest.programs) {
    offered.push_back(program.isa);
    if (!forced.empty() && program.isa != forced) continue;
    if (contains(available, program.isa)) return program;
  }
  if (!forced.empty() && !contains(offered, forced)) {
    throw Error(HETCOMP_MISSING_ISA, "The artifact has no program for " + forced + ", only for " +
                                         join(offered) + ": compile it with --isa " + forced + ".");
  }
  const std::string advice =
      available.empty() ? "run it on a CPU with AVX2 or better" : "compile it with --isa " + available.back();
  throw Error(HETCOMP_MISSING_ISA, "This CPU has " + join(available) + ", the artifact needs " +
                                       (forced.empty() ? join(offered) : forced) + ": " + advice + ".");
}

ProgramLibrary::ProgramLibrary(const std::filesystem::path& path, const ProgramRecord& record,
                               const Manifest& manifest)
    : file_(path) {
  // dlopen takes a library of the same name for the same library, even after a new compile replaced the file.
  // The descriptor's name is this file's only; without /proc (a bare chroot) the path must do.
  const std::string by_descriptor = "/proc/self/fd" + unused_prefix() + std::to_string(file_.descriptor());
  const std::string name = access(by_descriptor.c_str(), R_OK) == 0 ? by_descriptor : path.string();
  struct Close {
    void operator()(void* handle) const { dlclose(handle); }
  };
  std::unique_ptr<void, Close> handle(dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL));
  if (!handle) {
    const char* reason = dlerror();
    throw Error(HETCOMP_BAD_ARTIFACT, "Cannot load the program " + path.string() + ": " +
                                          (reason ? reason : "no reason given") + ".");
  }
  using Entry = const hetcomp_program* (*)();
  const auto entry = reinterpret_cast<Entry>(dlsym(handle.get(), "hetcomp_program_entry"));
  if (entry != nullptr) program_ = entry();
  if (program_ == nullptr) throw Error(HETCOMP_BAD_ARTIFACT, path.string() + " is not a program of hetcomp.");
  check(record, manifest);
  handle_ = handle.release();
}

ProgramLibrary::~ProgramLibrary() {
  if (handle_ != nullptr) dlclose(handle_);
}

void ProgramLibrary::check(const ProgramRecord& record, const Manifest& manifest) const {
  const std::string where = "The program " + record.file;
  if (program_->abi != HETCOMP_PROGRAM_ABI) {
    throw Error(HETCOMP_BAD_ARTIFACT, where + " has the ABI " + std::to_string(program_->abi) +
                                          ", this runtime has " + std::to_string(HETCOMP_PROGRAM_ABI) +
                                          ": compile the model again.");
  }
  struct Fact {
    const char* name;
    std::int64_t program;
    std::int64_t manifest;
  };
  const ModelFacts& model = manifest.model;
  const std::array facts{
      Fact{"weights", program_->n_weights, static_cast<std::int64_t>(manifest.weights.size())},
      Fact{"NUMA nodes", program_->n_nodes, static_cast<std::int64_t>(manifest.nodes.size())},
      Fact{"states", program_->n_states, static_cast<std::int64_t>(manifest.states.size())},
      Fact{"buffers to share with GPUs", program_->n_pinned,
           static_cast<std::int64_t>(manifest.pinned.size())},
      Fact{"hand-overs with GPUs", program_->n_flags, manifest.gpus.empty() ? 0 : program_->n_flags},
      Fact{"vocabulary entries", program_->vocab, model.vocab},
      Fact{"tokens a step", program_->max_tokens, model.max_tokens},
      Fact{"logit rows a step", program_->max_logit_rows, model.max_logit_rows},
  };
  for (const Fact& fact : facts) {
    if (fact.program == fact.manifest) continue;
    throw Error(HETCOMP_BAD_ARTIFACT, where + " has " + std::to_string(fact.program) + " " + fact.name +
                                          ", the manifest says " + std::to_string(fact.manifest) +
                                          ": compile the model again.");
  }
  const auto plan = manifest.files.find("plan.json");
  if (program_->isa == nullptr || record.isa != program_->isa || program_->plan_hash == nullptr ||
      plan == manifest.files.end() || plan->second.sha256 != program_->plan_hash ||
      program_->arena_bytes < 0 || program_->n_timers < 0 || program_->run == nullptr ||
      program_->n_flags < 0)
    throw Error(HETCOMP_BAD_ARTIFACT,
                where + " was not generated from the plan.json beside it: compile the model again.");
}

}  // namespace hetcomp

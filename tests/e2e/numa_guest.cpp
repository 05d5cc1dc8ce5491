// The first and only process of the virtual machine in test_numa_qemu.py: loads /artifact, prints what it
// computes for the ids in /ids and where its weights lie, runs hetcomp-run on it, and powers off.
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "hetcomp/hetcomp.h"

namespace {

void check(hetcomp_status status) {
  if (status == HETCOMP_OK) return;
  std::printf("failed %s\n", hetcomp_last_error());
  std::fflush(stdout);
  reboot(RB_POWER_OFF);
}

void print_json(const char* name, hetcomp_status (*get)(const hetcomp_model*, char**),
                const hetcomp_model* model) {
  char* json = nullptr;
  check(get(model, &json));
  std::printf("%s %s\n", name, json);
  hetcomp_free(json);
}

void print_logits(hetcomp_model* model, const std::vector<std::int32_t>& ids) {
  hetcomp_model_info info;
  hetcomp_model_info_init(&info);
  check(hetcomp_model_get_info(model, &info));
  hetcomp_session* session = nullptr;
  check(hetcomp_session_create(model, &session));
  std::vector<float> logits(ids.size() * static_cast<std::size_t>(info.vocab));
  check(hetcomp_forward(session, ids.data(), static_cast<std::int64_t>(ids.size()), logits.data()));
  std::printf("logits");
  for (const float value : logits) std::printf(" %.9g", static_cast<double>(value));
  std::printf("\n");
  hetcomp_session_free(session);
}

hetcomp_model* load() {
  hetcomp_load_options options;
  hetcomp_load_options_init(&options);
  options.weights = HETCOMP_WEIGHTS_RAM;
  hetcomp_model* model = nullptr;
  check(hetcomp_load("/artifact", &options, &model));
  return model;
}

// The CPUs that every thread of the runtime may use.
void print_lanes() {
  for (const auto& thread : std::filesystem::directory_iterator("/proc/self/task")) {
    std::string name;
    std::getline(std::ifstream(thread.path() / "comm") >> std::ws, name);
    std::ifstream status(thread.path() / "status");
    for (std::string word; name == "hetcomp-lane" && status >> word;)
      if (word == "Cpus_allowed_list:" && status >> word) std::printf("lane %s\n", word.c_str());
  }
}

// The nodes that memory of this process is bound to, as the kernel says it.
void print_bound(const char* name) {
  std::ifstream maps("/proc/self/numa_maps");
  for (std::string word; maps >> word;)
    if (word.starts_with("bind:")) std::printf("%s %s\n", name, word.c_str() + 5);
  std::printf("%s end\n", name);
}

// From now on mbind fails with EPERM, as in a container without CAP_SYS_NICE.
void forbid_mbind() {
  sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mbind, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program{sizeof(filter) / sizeof(filter[0]), filter};
  prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
  if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) std::printf("failed no seccomp\n");
}

void run(const std::vector<const char*>& arguments) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    std::vector<char*> words;
    for (const char* word : arguments) words.push_back(const_cast<char*>(word));
    words.push_back(nullptr);
    execv(words[0], words.data());
    _exit(127);
  }
  int status = -1;
  waitpid(child, &status, 0);
  std::printf("exit %d\n", status);
}

}  // namespace

int main() {
  mkdir("/proc", 0755);
  mkdir("/sys", 0755);
  mount("proc", "/proc", "proc", 0, nullptr);
  mount("sysfs", "/sys", "sysfs", 0, nullptr);
  std::printf("\n");  // the console's cursor is behind the kernel's last words

  std::ifstream file("/ids");
  std::vector<std::int32_t> ids;
  for (std::int32_t id; file >> id;) ids.push_back(id);
  hetcomp_model* model = load();
  print_json("stats", hetcomp_model_stats, model);
  print_json("report", hetcomp_model_numa_report, model);
  print_bound("bound");
  print_lanes();
  print_logits(model, ids);
  hetcomp_model_free(model);

  run({"/artifact/bin/hetcomp-run", "/artifact", "--ids", "5,6,7,8", "-n", "12", "--ignore-eos",
       "--print-ids", "--weights", "ram", "--numa-report"});

  forbid_mbind();
  model = load();
  print_json("unbound-stats", hetcomp_model_stats, model);
  print_json("unbound-report", hetcomp_model_numa_report, model);
  print_bound("unbound");
  hetcomp_model_free(model);
  std::printf("done\n");
  std::fflush(stdout);
  reboot(RB_POWER_OFF);
}

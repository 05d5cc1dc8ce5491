// The first and only process of the virtual machine in test_unreadable_disk_qemu.py: opens the artifact on an
// NVMe disk with a sector that cannot be read and the same artifact in memory, prints what the runtime says
// and computes, writes the bad file anew, and powers off.
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "hetcomp/hetcomp.h"

namespace {

constexpr const char* kDisk = "/dev/nvme0n1";
constexpr const char* kBad = "/disk/artifact";
constexpr const char* kGood = "/artifact";

[[noreturn]] void leave(const char* last) {
  std::printf("%s\n", last);
  std::fflush(stdout);
  reboot(RB_POWER_OFF);
  _exit(1);
}

void mount_all() {
  for (const char* folder : {"/proc", "/sys", "/dev", "/disk"}) mkdir(folder, 0755);
  mount("proc", "/proc", "proc", 0, nullptr);
  mount("sysfs", "/sys", "sysfs", 0, nullptr);
  mount("devtmpfs", "/dev", "devtmpfs", 0, nullptr);
  std::printf("\n");  // the console's cursor is behind the kernel's last words
  for (int tries = 0; tries < 200 && !std::filesystem::exists(kDisk); ++tries)
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  if (mount(kDisk, "/disk", "ext4", 0, nullptr) != 0) leave("failed no disk");
}

void say(const char* name, hetcomp_status status) {
  std::printf("%s %d %s\n", name, static_cast<int>(status), status == HETCOMP_OK ? "" : hetcomp_last_error());
}

hetcomp_model* load(const char* name, const char* path, hetcomp_weights weights, bool verify) {
  hetcomp_load_options options;
  hetcomp_load_options_init(&options);
  options.weights = weights;
  options.verify_weights = verify ? 1 : 0;
  hetcomp_model* model = nullptr;
  say(name, hetcomp_load(path, &options, &model));
  return model;
}

hetcomp_session* open(hetcomp_model* model) {
  hetcomp_session* session = nullptr;
  if (hetcomp_session_create(model, &session) != HETCOMP_OK) leave("failed no session");
  return session;
}

void step(const char* name, hetcomp_model* model, hetcomp_session* session,
          const std::vector<std::int32_t>& ids) {
  hetcomp_model_info info;
  hetcomp_model_info_init(&info);
  hetcomp_model_get_info(model, &info);
  std::vector<float> logits(static_cast<std::size_t>(info.vocab));
  const hetcomp_status status =
      hetcomp_prefill(session, ids.data(), static_cast<std::int64_t>(ids.size()), logits.data());
  std::int64_t length = -1;
  hetcomp_session_length(session, &length);
  say(name, status);
  std::printf("%s-length %lld\n", name, static_cast<long long>(length));
  std::printf("%s-logits", name);
  for (const float value : logits) std::printf(" %.9g", static_cast<double>(value));
  std::printf("\n");
}

void run_on_disk() {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    execl("/artifact/bin/hetcomp-run", "hetcomp-run", kBad, "--ids", "5,6,7", "-n", "2", "--print-ids",
          static_cast<char*>(nullptr));
    _exit(127);
  }
  int status = -1;
  waitpid(child, &status, 0);
  std::printf("exit %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status));
}

// Into the same file, as who restores it from a backup does; what is written is in the page cache.
void write_anew(const std::string& file) {
  std::ifstream from(std::string(kGood) + "/" + file, std::ios::binary);
  std::ofstream to(std::string(kBad) + "/" + file, std::ios::binary | std::ios::trunc);
  to << from.rdbuf();
  if (!to.flush()) leave("failed not written");
}

}  // namespace

int main() {
  mount_all();
  std::vector<std::int32_t> ids;
  std::ifstream given("/ids");
  for (std::int32_t id; given >> id;) ids.push_back(id);
  std::string file;
  std::getline(std::ifstream("/file"), file);

  hetcomp_model* good = load("elsewhere", kGood, HETCOMP_WEIGHTS_MMAP, true);
  hetcomp_model* bad = load("mapped", kBad, HETCOMP_WEIGHTS_MMAP, false);
  if (good == nullptr || bad == nullptr) leave("failed no model");
  hetcomp_session* session = open(bad);
  step("first", bad, session, ids);
  step("second", bad, session, ids);
  step("good", good, open(good), ids);
  load("in-memory", kBad, HETCOMP_WEIGHTS_RAM, false);
  load("verified", kBad, HETCOMP_WEIGHTS_MMAP, true);
  run_on_disk();
  write_anew(file);
  step("mended", bad, session, ids);
  leave("done");
}

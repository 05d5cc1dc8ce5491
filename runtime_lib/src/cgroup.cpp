#include "cgroup.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

namespace hetcomp {
namespace {

namespace fs = std::filesystem;
constexpr std::uint64_t kUnlimited = std::numeric_limits<std::uint64_t>::max();

struct Mount {
  fs::path root;   // the part of the hierarchy that is mounted
  fs::path point;  // where
};

// Field 4 and 5 of mountinfo, and after " - " the type, the source and the options (which name v1
// controllers).
std::optional<Mount> find_mount(const std::string& type, const std::string& controller) {
  std::ifstream info("/proc/self/mountinfo");
  for (std::string line; std::getline(info, line);) {
    const std::size_t dash = line.find(" - ");
    if (dash == std::string::npos) continue;
    std::istringstream left(line.substr(0, dash));
    std::istringstream right(line.substr(dash + 3));
    std::string skipped;
    std::string root;
    std::string point;
    std::string found;
    std::string options;
    left >> skipped >> skipped >> skipped >> root >> point;
    right >> found >> skipped >> options;
    if (found != type) continue;
    if (controller.empty() || ("," + options + ",").find("," + controller + ",") != std::string::npos)
      return Mount{root, point};
  }
  return std::nullopt;
}

// Lines "id:controllers:path"; v2 has the id 0 and no controllers.
std::optional<std::string> group_path(const std::string& controller) {
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const std::size_t first = line.find(':');
    const std::size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool match = controller.empty()
                           ? controllers.empty() && line.starts_with("0:")
                           : ("," + controllers + ",").find("," + controller + ",") != std::string::npos;
    if (match) return line.substr(second + 1);
  }
  return std::nullopt;
}

// The folders of this process's group and all enclosing ones that are mounted here, innermost first.
std::vector<fs::path> groups(const std::string& type, const std::string& controller) {
  const auto mount = find_mount(type, controller);
  const auto path = group_path(controller);
  if (!mount || !path) return {};
  // In a container the mount shows the group itself as its root, while /proc may name it from the host's.
  fs::path inside = fs::path(*path).lexically_relative(mount->root);
  if (inside.empty() || *inside.begin() == "..") inside = ".";
  std::vector<fs::path> folders;
  for (fs::path at = (mount->point / inside).lexically_normal();; at = at.parent_path()) {
    folders.push_back(at);
    if (at == mount->point || !at.has_relative_path()) break;
  }
  return folders;
}

std::optional<std::uint64_t> number_in(const fs::path& file) {
  std::ifstream in(file);
  std::uint64_t value = 0;
  if (in >> value) return value;
  return std::nullopt;
}

std::uint64_t stat_entry(const fs::path& file, const std::string& wanted) {
  std::ifstream in(file);
  std::string key;
  std::uint64_t value = 0;
  while (in >> key >> value)
    if (key == wanted) return value;
  return 0;
}

std::uint64_t left(std::optional<std::uint64_t> limit, std::optional<std::uint64_t> used,
                   std::uint64_t cache) {
  if (!limit || !used) return kUnlimited;
  const std::uint64_t held = *used > cache ? *used - cache : 0;
  return *limit > held ? *limit - held : 0;
}

}  // namespace

std::optional<double> cgroup_cpu_quota() {
  std::optional<double> smallest;
  const auto consider = [&](double quota, double period) {
    if (quota > 0 && period > 0) smallest = std::min(smallest.value_or(quota / period), quota / period);
  };
  for (const fs::path& group : groups("cgroup2", "")) {
    std::ifstream in(group / "cpu.max");
    std::string quota;
    double period = 0;
    if (in >> quota >> period && quota != "max") consider(std::strtod(quota.c_str(), nullptr), period);
  }
  for (const fs::path& group : groups("cgroup", "cpu")) {
    std::ifstream quota_file(group / "cpu.cfs_quota_us");
    std::ifstream period_file(group / "cpu.cfs_period_us");
    double quota = 0;
    double period = 0;
    if (quota_file >> quota && period_file >> period) consider(quota, period);
  }
  return smallest;
}

std::uint64_t cgroup_memory_left() {
  std::uint64_t smallest = kUnlimited;
  for (const fs::path& group : groups("cgroup2", "")) {
    const fs::path stat = group / "memory.stat";
    const std::uint64_t cache = stat_entry(stat, "inactive_file") + stat_entry(stat, "active_file");
    smallest =
        std::min(smallest, left(number_in(group / "memory.max"), number_in(group / "memory.current"), cache));
  }
  for (const fs::path& group : groups("cgroup", "memory")) {
    const fs::path stat = group / "memory.stat";
    const std::uint64_t cache =
        stat_entry(stat, "total_inactive_file") + stat_entry(stat, "total_active_file");
    smallest = std::min(smallest, left(number_in(group / "memory.limit_in_bytes"),
                                       number_in(group / "memory.usage_in_bytes"), cache));
  }
  return smallest;
}

}  // namespace hetcomp

#include "numa.h"

#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>

namespace hetcomp {
namespace {

constexpr const char* kNodes = "/sys/devices/system/node";
constexpr unsigned long kMostNodes = 1024;  // of a node mask; Linux is built for no more

std::string first_line(const std::string& path) {
  std::ifstream in(path);
  std::string line;
  std::getline(in, line);
  return line;
}

}  // namespace

std::vector<int> parse_cpu_list(const std::string& text) {
  constexpr int kMostCpus = 1 << 20;
  std::vector<int> cpus;
  std::istringstream in(text);
  for (std::string part; std::getline(in, part, ',');) {
    int first = 0;
    const char* const end = part.data() + part.size();
    auto [at, error] = std::from_chars(part.data(), end, first);
    int last = first;
    if (error == std::errc() && at != end && *at == '-') {
      const auto more = std::from_chars(at + 1, end, last);
      at = more.ptr;
      error = more.ec;
    }
    if (error != std::errc() || at != end || first < 0 || last < first || last >= kMostCpus) return {};
    for (int cpu = first; cpu <= last; ++cpu) cpus.push_back(cpu);
  }
  return cpus;
}

std::vector<MachineNode> machine_nodes(const std::vector<int>& allowed_cpus) {
  std::vector<MachineNode> nodes;
  for (const int id : parse_cpu_list(first_line(std::string(kNodes) + "/has_cpu"))) {
    const auto here =
        parse_cpu_list(first_line(std::string(kNodes) + "/node" + std::to_string(id) + "/cpulist"));
    MachineNode node{id, {}};
    for (const int cpu : allowed_cpus)
      if (std::ranges::find(here, cpu) != here.end()) node.cpus.push_back(cpu);
    if (!node.cpus.empty()) nodes.push_back(std::move(node));
  }
  if (nodes.empty()) nodes.push_back({kNoNode, allowed_cpus});
  return nodes;
}

std::uint64_t available_on_node(int node) {
  std::ifstream info(std::string(kNodes) + "/node" + std::to_string(node) + "/meminfo");
  if (!info) return std::numeric_limits<std::uint64_t>::max();
  std::uint64_t available = 0;
  for (std::string line; std::getline(info, line);) {
    std::istringstream words(line);  // Node 0 MemFree:  123 kB
    std::string word, number, key;
    std::uint64_t kilobytes = 0;
    if (!(words >> word >> number >> key >> kilobytes)) continue;
    if (key == "MemFree:" || key == "Active(file):" || key == "Inactive(file):")
      available += kilobytes * 1024;
  }
  return available;
}

bool bind_to_node(void* data, std::size_t bytes, int node) {
  constexpr std::size_t kBits = 8 * sizeof(unsigned long);
  if (node < 0 || static_cast<unsigned long>(node) >= kMostNodes) return false;
  std::array<unsigned long, kMostNodes / kBits> mask{};
  mask[static_cast<std::size_t>(node) / kBits] = 1UL << (static_cast<std::size_t>(node) % kBits);
  // The kernel reads one bit less than it is told.
  return syscall(SYS_mbind, data, bytes, MPOL_BIND, mask.data(), kMostNodes + 1, 0U) == 0;
}

PagePlaces page_places(const void* data, std::size_t bytes, int node) {
  constexpr std::size_t kBatch = 1024;
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const std::uintptr_t into = reinterpret_cast<std::uintptr_t>(data) % page;
  const auto* const begin = static_cast<const std::uint8_t*>(data) - into;
  const std::size_t length = bytes + into;
  std::array<const void*, kBatch> addresses{};
  std::array<int, kBatch> places{};
  PagePlaces found;
  for (std::size_t at = 0; at < length;) {
    std::size_t n = 0;
    for (; n < kBatch && at < length; at += page) addresses[n++] = begin + at;
    // Without nodes to move to it only reports.
    const bool known = syscall(SYS_move_pages, 0, n, addresses.data(), nullptr, places.data(), 0) == 0;
    for (std::size_t i = 0; i < n; ++i) {
      const int place = known ? places[i] : -1;
      ++found.pages;
      ++(place < 0 ? found.absent : node == kNoNode || place == node ? found.on_node : found.elsewhere);
    }
  }
  return found;
}

}  // namespace hetcomp

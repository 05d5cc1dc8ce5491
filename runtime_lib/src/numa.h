// NUMA nodes as the kernel knows them: their CPUs, their free memory, and where pages lie.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace hetcomp {

constexpr int kNoNode = -1;  // of memory that may lie anywhere

struct MachineNode {
  int id;
  std::vector<int> cpus;  // the allowed ones, in the order given
};

// The nodes that have some of these CPUs, by id. A kernel without NUMA, or without /sys, has one: kNoNode.
std::vector<MachineNode> machine_nodes(const std::vector<int>& allowed_cpus);

// "0-3,8" as numbers; what is no such list is empty.
std::vector<int> parse_cpu_list(const std::string& text);

// Bytes of the node that are free or hold nothing but copies of files.
std::uint64_t available_on_node(int node);

// Pages of [data, data + bytes) that are not there yet will come from that node and no other. False if the
// kernel refuses, as containers without CAP_SYS_NICE do.
bool bind_to_node(void* data, std::size_t bytes, int node);

// Where the pages of a stretch of memory lie.
struct PagePlaces {
  std::uint64_t pages = 0;
  std::uint64_t on_node = 0;
  std::uint64_t elsewhere = 0;
  std::uint64_t absent = 0;  // not in memory, or not known
};

// node kNoNode: every page in memory counts as on the node.
PagePlaces page_places(const void* data, std::size_t bytes, int node);

}  // namespace hetcomp

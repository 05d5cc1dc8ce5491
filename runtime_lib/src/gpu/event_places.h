// Where a graph whose times are taken records events.
#pragma once

#include <cstddef>
#include <vector>

namespace hetcomp::gpu {

// Of a graph, with one before all nodes. cuGraphLaunch waits until the device has room for what the graph
// queues, and events take more of it than kernels: on an H100 a graph with 122 events and hand-overs ran, one
// with 244 was never launched, for it waited for a graph that waited for the CPU.
constexpr std::size_t kMostEvents = 110;

// hand_overs: of the nodes in order, whether they are some. Returns the nodes behind which an event is,
// ascending: the last; those before and behind every hand-over, if they are few enough; and of the others as
// many as may be, evenly.
std::vector<std::size_t> event_places(const std::vector<bool>& hand_overs);

}  // namespace hetcomp::gpu

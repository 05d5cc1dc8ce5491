// When a GPU did what in a step, by the host's clock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "device_context.h"
#include "program_record.h"

namespace hetcomp::gpu {

struct GpuEvent {
  enum class Kind { kKernel, kHandOver, kCopy };  // as hetcomp_gpu_work
  Kind kind;
  std::int64_t begin_ns = 0;  // CLOCK_MONOTONIC
  std::int64_t end_ns = 0;
  const KernelNode* kernel = nullptr;  // of a run of launches: the first
  std::int32_t launches = 0;           // of a graph: its nodes in the run; a copy has none
  std::size_t bytes = 0;               // of a copy
};

// Times of events that a stream, or a graph on any stream of the device, has come to.
class EventClock {
 public:
  // stream: at rest. The context must be current. Throws Error.
  EventClock(const CudaDriver& driver, CUstream stream);

  // Of CLOCK_MONOTONIC, some microseconds off; nothing: the event was not recorded.
  std::optional<std::int64_t> nanoseconds(CUevent event) const noexcept;

 private:
  const CudaDriver& driver_;
  EventHandle base_;
  std::int64_t base_ns_ = 0;
};

}  // namespace hetcomp::gpu

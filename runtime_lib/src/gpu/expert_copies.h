// Copies of experts from the host's memory to a GPU, on a stream of their own, in the order in which they are
// asked for.
//
// From pinned memory the GPU copies by itself. From any other, a thread brings them through a ring of pinned
// pieces: it fills one while the GPU empties those before.
#pragma once

#include <array>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "device_context.h"
#include "device_memory.h"
#include "gpu_times.h"

namespace hetcomp::gpu {

class ExpertCopies {
 public:
  // Small enough that the GPU has begun before much is copied, large enough for the link.
  static constexpr std::size_t kPieceBytes = 4U << 20;
  static constexpr std::size_t kPieces = 4;

  // Both must outlive this. The context must be current when this is made and when it ends, and for all
  // calls.
  ExpertCopies(const CudaDriver& driver, const DeviceContext& context);
  ~ExpertCopies();
  ExpertCopies(const ExpertCopies&) = delete;
  ExpertCopies& operator=(const ExpertCopies&) = delete;

  // From now on what is copied is not pinned. failed: is told by the copying thread why the driver refused
  // something; what was asked for behind it is dropped. Throws Error: there is no pinned memory for the ring.
  void stage(std::function<void(const std::string&)> failed);
  // As at first. Nothing may be on its way.
  void unstage() { ring_.reset(); }

  // Of weights.
  void copy(CUdeviceptr to, const void* from, std::size_t bytes);
  // Of pinned memory.
  void send(CUdeviceptr to, const void* from, std::size_t bytes);
  // Within the GPU's memory.
  void copy_on_device(CUdeviceptr to, CUdeviceptr from, std::size_t bytes);
  // What is asked for before is there when the flag is.
  void raise(CUdeviceptr flag);
  // What is asked for behind it begins when the GPU has raised the flag.
  void await(CUdeviceptr flag);

  // good: of what copy() reads, asked by finish().
  void check_by(std::function<bool()> good) { good_ = std::move(good); }
  // Waits until all of it is there; false: something is not, or was not good.
  bool finish() noexcept;

  // In times of a step, what is copied from the host's memory up to here belongs together. A batch also ends
  // where flags are raised or awaited.
  void end_batch();
  // Before a step: whether times are taken of its batches.
  void set_timed(bool timed) {
    timed_ = timed;
    in_batch_ = false;
    n_batches_ = 0;
  }
  // Those of the step, when all of its batches are there.
  void read_times(const EventClock& clock, std::vector<GpuEvent>& events) const;

 private:
  struct Task {
    enum class Kind { kCopy, kSend, kCopyOnDevice, kRaise, kAwait, kRecord };
    Kind kind;
    CUdeviceptr to = 0;  // or the flag
    const void* from = nullptr;
    CUdeviceptr from_device = 0;
    std::size_t bytes = 0;
    CUevent event = nullptr;
  };
  struct Batch {
    EventHandle begin, end;
    std::size_t bytes = 0;
  };
  struct Ring {  // what there is only where memory is not pinned
    Ring(const ExpertCopies& copies, std::function<void(const std::string&)> failed);
    ~Ring();
    void add(const Task& task);
    bool finish();
    void work();
    void fill(const Task& task);

    const ExpertCopies& copies;
    const std::function<void(const std::string&)> failed;
    PinnedMemory memory;
    std::array<EventHandle, kPieces> emptied;
    std::size_t next = 0;  // piece

    std::mutex mutex;  // of what follows
    std::condition_variable changed;
    std::deque<Task> tasks;
    bool broken = false;  // since the last finish()
    bool ends = false;
    std::thread thread;
  };

  void begin_batch();
  void add(const Task& task);
  void perform(const Task& task) const;

  const CudaDriver& driver_;
  const DeviceContext& context_;
  StreamHandle stream_;
  std::function<bool()> good_ = [] { return true; };
  bool timed_ = false;
  bool in_batch_ = false;
  std::vector<Batch> batches_;  // the first n_batches_ are of this step
  std::size_t n_batches_ = 0;
  std::unique_ptr<Ring> ring_;
};

}  // namespace hetcomp::gpu

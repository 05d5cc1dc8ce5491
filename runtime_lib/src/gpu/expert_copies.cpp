#include "expert_copies.h"

#include <pthread.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <utility>

#include "../thread_signals.h"
#include "hand_shake.h"

namespace hetcomp::gpu {

ExpertCopies::ExpertCopies(const CudaDriver& driver, const DeviceContext& context)
    : driver_(driver), context_(context), stream_(create_stream(driver)) {}

ExpertCopies::~ExpertCopies() { ring_.reset(); }

void ExpertCopies::stage(std::function<void(const std::string&)> failed) {
  ring_ = std::make_unique<Ring>(*this, std::move(failed));
}

void ExpertCopies::copy(CUdeviceptr to, const void* from, std::size_t bytes) {
  if (timed_) {
    begin_batch();
    batches_[n_batches_ - 1].bytes += bytes;
  }
  add({.kind = Task::Kind::kCopy, .to = to, .from = from, .bytes = bytes});
}

void ExpertCopies::send(CUdeviceptr to, const void* from, std::size_t bytes) {
  add({.kind = Task::Kind::kSend, .to = to, .from = from, .bytes = bytes});
}

void ExpertCopies::copy_on_device(CUdeviceptr to, CUdeviceptr from, std::size_t bytes) {
  add({.kind = Task::Kind::kCopyOnDevice, .to = to, .from_device = from, .bytes = bytes});
}

void ExpertCopies::raise(CUdeviceptr flag) {
  end_batch();
  add({.kind = Task::Kind::kRaise, .to = flag});
}

void ExpertCopies::await(CUdeviceptr flag) {
  end_batch();
  add({.kind = Task::Kind::kAwait, .to = flag});
}

void ExpertCopies::begin_batch() {
  if (in_batch_) return;
  if (n_batches_ == batches_.size()) batches_.push_back({create_event(driver_), create_event(driver_), 0});
  batches_[n_batches_].bytes = 0;
  add({.kind = Task::Kind::kRecord, .event = batches_[n_batches_++].begin.get()});
  in_batch_ = true;
}

void ExpertCopies::end_batch() {
  if (!in_batch_) return;
  in_batch_ = false;
  add({.kind = Task::Kind::kRecord, .event = batches_[n_batches_ - 1].end.get()});
}

void ExpertCopies::read_times(const EventClock& clock, std::vector<GpuEvent>& events) const {
  for (std::size_t i = 0; i < n_batches_; ++i) {
    const auto begin = clock.nanoseconds(batches_[i].begin.get());
    const auto end = clock.nanoseconds(batches_[i].end.get());
    if (begin && end)
      events.push_back(
          {.kind = GpuEvent::Kind::kCopy, .begin_ns = *begin, .end_ns = *end, .bytes = batches_[i].bytes});
  }
}

void ExpertCopies::add(const Task& task) {
  if (ring_)
    ring_->add(task);
  else
    perform(task);
}

void ExpertCopies::perform(const Task& task) const {
  switch (task.kind) {
    case Task::Kind::kCopy:
    case Task::Kind::kSend:
      return driver_.copy_to_device(task.to, task.from, task.bytes, stream_.get());
    case Task::Kind::kCopyOnDevice:
      return driver_.copy_on_device(task.to, task.from_device, task.bytes, stream_.get());
    case Task::Kind::kRaise:
      return driver_.stream_write(stream_.get(), task.to, HandShake::kRaised, CU_STREAM_WRITE_VALUE_DEFAULT);
    case Task::Kind::kAwait:
      return driver_.stream_wait(stream_.get(), task.to, HandShake::kRaised, CU_STREAM_WAIT_VALUE_GEQ);
    case Task::Kind::kRecord:
      return driver_.event_record(task.event, stream_.get());
  }
}

bool ExpertCopies::finish() noexcept {
  const bool asked = !ring_ || ring_->finish();
  return driver_.stream_synchronize.raw(stream_.get()) == CUDA_SUCCESS && asked && good_();
}

ExpertCopies::Ring::Ring(const ExpertCopies& owner, std::function<void(const std::string&)> tell)
    : copies(owner),
      failed(std::move(tell)),
      memory(owner.driver_, kPieces * kPieceBytes, "copies of experts from memory that is not pinned") {
  for (EventHandle& event : emptied) event = create_event(owner.driver_);
  const OwnFaultsOnly signals;
  thread = std::thread([this] { work(); });
}

ExpertCopies::Ring::~Ring() {
  {
    const std::lock_guard lock(mutex);
    ends = true;
  }
  changed.notify_all();
  thread.join();
}

void ExpertCopies::Ring::add(const Task& task) {
  {
    const std::lock_guard lock(mutex);
    tasks.push_back(task);
  }
  changed.notify_all();
}

bool ExpertCopies::Ring::finish() {
  std::unique_lock lock(mutex);
  changed.wait(lock, [this] { return tasks.empty(); });
  return !std::exchange(broken, false);
}

void ExpertCopies::Ring::work() {
  pthread_setname_np(pthread_self(), "hetcomp-copies");
  std::unique_lock lock(mutex);
  while (true) {
    changed.wait(lock, [this] { return ends || !tasks.empty(); });
    if (tasks.empty()) return;
    const Task task = tasks.front();
    std::string wrong;
    if (!broken) {
      lock.unlock();
      try {
        const CurrentContext current(copies.driver_, copies.context_);
        if (task.kind == Task::Kind::kCopy)
          fill(task);
        else
          copies.perform(task);
      } catch (const std::exception& error) {
        wrong = error.what();
      }
      if (!wrong.empty()) failed(wrong);
      lock.lock();
      broken = broken || !wrong.empty();
    }
    tasks.pop_front();
    if (tasks.empty()) changed.notify_all();
  }
}

void ExpertCopies::Ring::fill(const Task& task) {
  for (std::size_t done = 0; done < task.bytes;) {
    const std::size_t bytes = std::min(kPieceBytes, task.bytes - done);
    const CUevent event = emptied[next].get();
    copies.driver_.event_synchronize(event);  // one that was never recorded is over
    std::byte* const piece = memory.bytes().data() + next * kPieceBytes;
    std::memcpy(piece, static_cast<const std::byte*>(task.from) + done, bytes);
    copies.driver_.copy_to_device(task.to + done, piece, bytes, copies.stream_.get());
    copies.driver_.event_record(event, copies.stream_.get());
    next = (next + 1) % kPieces;
    done += bytes;
  }
}

}  // namespace hetcomp::gpu

#include "hand_shake.h"

#include <immintrin.h>

#include <algorithm>

#include "give_way.h"

namespace hetcomp::gpu {
namespace {

// About 50 us (a pause is 40 to 140 cycles): longer than a kernel of a decode step.
constexpr int kSpins = 2000;
constexpr auto kLook = std::chrono::milliseconds(1);

std::string in_words(std::chrono::milliseconds time) {
  const auto ms = time.count();
  return ms % 1000 == 0 ? std::to_string(ms / 1000) + " s" : std::to_string(ms) + " ms";
}

}  // namespace

HandShake::HandShake(const CudaDriver& driver, std::uint32_t flags, std::chrono::milliseconds patience,
                     Health health)
    : flags_(flags),
      patience_(patience),
      health_(std::move(health)),
      memory_(driver, std::max<std::size_t>(std::size_t{2} * flags, 1) * kStride,
              "the flags between CPU and GPUs") {}

std::atomic_ref<std::uint32_t> HandShake::line(std::size_t index) const {
  return std::atomic_ref(*reinterpret_cast<std::uint32_t*>(memory_.bytes().data() + offset(index)));
}

bool HandShake::wait_for_gpu(std::uint32_t flag) {
  const std::atomic_ref<std::uint32_t> raised = line(flag);
  for (int i = 0; i < kSpins; ++i) {
    if (aborted()) return false;
    if (raised.load(std::memory_order_acquire) == kRaised) return true;
    _mm_pause();
  }
  return wait_patiently(raised, flag);
}

bool HandShake::wait_patiently(std::atomic_ref<std::uint32_t> raised, std::uint32_t index) {
  const Clock::time_point start = Clock::now();
  Clock::time_point look = start + kLook;
  while (!aborted()) {
    if (raised.load(std::memory_order_acquire) == kRaised) return true;
    const Clock::time_point now = Clock::now();
    give_way(now - start);
    if (now < look) continue;
    look = now + kLook;
    const std::string wrong = health_();
    // The flag may have come between the look at it and the graph's end.
    if (raised.load(std::memory_order_acquire) == kRaised) return !aborted();
    if (!wrong.empty()) {
      abort("The CPU waits for hand-over " + std::to_string(index) + " of a GPU, but " + wrong);
    } else if (now - start > patience_) {
      abort("The GPU did not come to hand-over " + std::to_string(index) + " within " + in_words(patience_) +
            ": the step was given up.");
    }
  }
  return false;
}

void HandShake::answer(std::uint32_t flag) { line(flags_ + flag).store(kRaised, std::memory_order_release); }

void HandShake::raise_to_cpu(std::uint32_t flag) { line(flag).store(kRaised, std::memory_order_release); }

void HandShake::abort(const std::string& reason) {
  const std::lock_guard lock(mutex_);
  if (!running_ || aborted()) return;
  reason_ = reason;
  aborted_.store(true, std::memory_order_release);
  for (std::uint32_t flag = 0; flag < flags_; ++flag) answer(flag);
}

void HandShake::begin_step() {
  const std::lock_guard lock(mutex_);
  for (std::size_t i = 0; i < std::size_t{2} * flags_; ++i) line(i).store(0, std::memory_order_relaxed);
  aborted_.store(false, std::memory_order_release);
  reason_.clear();
  running_ = true;
}

void HandShake::end_step() {
  const std::lock_guard lock(mutex_);
  running_ = false;
}

std::string HandShake::abort_reason() const {
  const std::lock_guard lock(mutex_);
  return reason_;
}

}  // namespace hetcomp::gpu

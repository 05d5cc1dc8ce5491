// Decides from step times how many lanes to run and whether they should spin.
#pragma once

#include <chrono>
#include <cstdint>
#include <vector>

namespace hetcomp {

// A process that takes a core from one lane makes all others wait at every barrier; fewer lanes may then be
// faster. Whether they are, is measured: while lanes wait for CPUs, smaller counts are tried, and the
// fastest is kept for a while before all lanes are tried again. Not thread safe.
class LaneCount {
 public:
  explicit LaneCount(int lanes);

  int active() const { return active_; }         // lanes for the next step
  bool contended() const { return contended_; }  // other processes want the cores of these lanes
  // Nobody else does, as far as is known: every lane may have a CPU of its own.
  bool quiet() const { return !contended_ && active_ == lanes_; }

  // After a step of `tokens` tokens on active() lanes. True: there are steps enough to decide().
  bool add(std::int64_t tokens, std::chrono::nanoseconds time);

  // waited: the part of the time since the last call that a lane was ready to run and had no CPU; of the lane
  // that waited most, since all others wait for it.
  void decide(double waited);

 private:
  enum class Mode {
    kWatch,    // all lanes
    kSettle,   // another count; the scheduler takes some milliseconds to spread them
    kMeasure,  // another count
    kHold,     // the fastest
  };
  using Time = std::chrono::nanoseconds;
  // Steps of the same number of tokens on the same number of lanes; others are not compared.
  struct Window {
    std::int64_t tokens = 0;
    std::int64_t steps = 0;
    Time time{0};
    Time step() const { return time / steps; }
  };
  static constexpr Time kWindow{40'000'000};
  static constexpr std::int64_t kWindowSteps = 3;
  // A process that shares a CPU with a lane makes it wait half of the time; kernel threads on a quiet machine
  // (Linux 6.18) 50 to 80 times a second for 20 to 50 us, that is 0.4 %.
  static constexpr double kContended = 0.05;
  static constexpr Time kShortestHold{250'000'000};
  static constexpr Time kLongestHold{4'000'000'000};

  void watch(bool was_contended);
  void try_next();
  void judge();
  void hold();

  const int lanes_;
  std::vector<int> others_;  // the counts to try
  int active_;
  bool contended_ = false;
  Mode mode_ = Mode::kWatch;
  Window window_;
  std::size_t next_ = 0;  // in others_
  int best_ = 0;
  Window best_window_;
  Time hold_ = kShortestHold;
  Time held_{0};
};

}  // namespace hetcomp

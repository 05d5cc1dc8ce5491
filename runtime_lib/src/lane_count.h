// Decides from step times how many lanes to run and whether they should spin.
#pragma once

#include <chrono>
#include <cstdint>
#include <vector>

namespace hetcomp {

// A process that takes a core from one lane makes all others wait at every barrier; fewer lanes may then be
// faster. Whether they are, is measured: when lanes are preempted often, smaller counts are tried, and the
// fastest is kept for a while before all lanes are tried again. Not thread safe.
class LaneCount {
 public:
  explicit LaneCount(int lanes);

  int active() const { return active_; }         // lanes for the next step
  bool contended() const { return contended_; }  // other processes want the cores of these lanes

  // After a step of `tokens` tokens on active() lanes, in which they were preempted so many times.
  void add(std::int64_t tokens, std::int64_t preemptions, std::chrono::nanoseconds time);

 private:
  enum class Mode {
    kWatch,    // all lanes
    kSettle,   // fewer; the scheduler takes some milliseconds to spread them
    kMeasure,  // fewer
    kHold,     // the fastest
  };
  using Time = std::chrono::nanoseconds;
  // Steps of the same number of tokens on the same number of lanes; others are not compared.
  struct Window {
    std::int64_t tokens = 0;
    std::int64_t steps = 0;
    std::int64_t preemptions = 0;
    Time time{0};
    Time step() const { return time / steps; }
  };
  static constexpr Time kWindow{40'000'000};
  static constexpr std::int64_t kWindowSteps = 3;
  // Measured on Linux 6.18: 4 to 15 a second on a quiet machine, thousands beside a busy process.
  static constexpr std::int64_t kContendedPerSecond = 100;
  static constexpr Time kShortestHold{250'000'000};
  static constexpr Time kLongestHold{4'000'000'000};

  void decide(bool was_contended);
  void watch(bool was_contended);
  void try_next();
  void judge();
  void hold();

  const int lanes_;
  std::vector<int> fewer_;  // the counts to try
  int active_;
  bool contended_ = false;
  Mode mode_ = Mode::kWatch;
  Window window_;
  std::size_t next_ = 0;  // in fewer_
  int best_ = 0;
  Window best_window_;
  Time hold_ = kShortestHold;
  Time held_{0};
};

}  // namespace hetcomp

#include "lane_threads.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <map>
#include <memory>
#include <utility>

#include "cpu_affinity.h"
#include "thread_signals.h"

namespace hetcomp {
namespace {

// How long a lane spins before it parks. While nobody else wants the cores, the others arrive within this
// time and a futex call would only cost. Under contention a lane must give its core away at once, so that the
// scheduler can move the lane that was preempted there. Measured with one busy process beside the lanes
// (Linux 6.18), speed in relation to a quiet machine, 100 regions of about 60 us on 2 and on 8 cores:
//   always spin  5 us: 0.51, 0.81;  20 us: 0.42, 0.46;  200 us: 0.20
//   every lane bound to a CPU of its own, 5 us: 0.39, 0.38
//   two spin times and LaneCount: 0.50 to 0.54, 0.51 to 0.78
// and decoding with demo-moe, whose regions take a few us: without LaneCount 0.42 to 0.49, 0.23; with it 0.51
// to 0.57, 0.85.
constexpr std::chrono::nanoseconds kQuietSpin{50'000};
// In a step that hands over to a GPU the lanes wait for its part of a layer, 40 us of attention or more, and
// waking all of them takes about as long again. Qwen3-30B-A3B with its experts on 15 lanes beside an H200, in
// turns: 79 to 90 tok/s with 50 us, 94 to 99 with 200 us, 90 to 99 with 1 ms.
constexpr std::chrono::nanoseconds kHandOverSpin{500'000};
constexpr std::chrono::nanoseconds kContendedSpin{2'000};

// The shortest of several probes: the others may have been interrupted.
double pause_nanoseconds() {
  constexpr int kPauses = 200;
  double shortest = 1e9;
  for (int probe = 0; probe < 10; ++probe) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kPauses; ++i) cpu_relax();
    const std::chrono::duration<double, std::nano> spent = std::chrono::steady_clock::now() - start;
    shortest = std::min(shortest, spent.count() / kPauses);
  }
  return std::max(shortest, 0.5);
}

std::int32_t spins_for(std::chrono::nanoseconds time) {
  static const double each = pause_nanoseconds();
  return static_cast<std::int32_t>(static_cast<double>(time.count()) / each);
}

// The node of every lane, such that the first n lanes of any n are spread over the nodes as all of them are.
std::vector<int> spread(const std::vector<LaneGroup>& groups) {
  int total = 0;
  for (const LaneGroup& group : groups) total += group.threads;
  std::vector<int> taken(groups.size());
  std::vector<int> nodes;
  for (int lane = 1; lane <= total; ++lane) {
    std::size_t next = groups.size();
    double most = 0;
    for (std::size_t node = 0; node < groups.size(); ++node) {
      if (taken[node] == groups[node].threads) continue;
      // A node without any lane comes first; then the one that lags furthest behind its part.
      const double lag = taken[node] == 0 ? total : double(groups[node].threads) * lane / total - taken[node];
      if (next == groups.size() || lag > most) {
        next = node;
        most = lag;
      }
    }
    ++taken[next];
    nodes.push_back(static_cast<int>(next));
  }
  return nodes;
}

// A CPU for every lane: of the groups that share their CPUs each its own. Empty if there are too few.
std::vector<int> cpu_of_each(const std::vector<LaneGroup>& groups, const std::vector<int>& nodes) {
  std::vector<int> cpus;
  std::map<std::vector<int>, std::size_t> taken;
  for (const int node : nodes) {
    const std::vector<int>& of_group = groups[static_cast<std::size_t>(node)].cpus;
    const std::size_t next = taken[of_group]++;
    if (next >= of_group.size()) return {};
    cpus.push_back(of_group[next]);
  }
  return cpus;
}

}  // namespace

// The lanes of `nodes` in order. Where every node has one, each works on its own node's parts; where there
// are too few, all of them work on the parts of one node after the other.
LaneThreads::Team::Team(const std::vector<int>& nodes, int n_nodes)
    : all(static_cast<int>(nodes.size())), seats(nodes.size()) {
  if (n_nodes == 1) return;
  std::vector<int> count(static_cast<std::size_t>(n_nodes));
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    const int node = nodes[i];
    seats[i] = {nullptr, count[static_cast<std::size_t>(node)]++, node, node + 1};
  }
  if (std::ranges::find(count, 0) != count.end()) {
    own.push_back(std::make_unique<LaneSet>(all.n_threads));
    for (std::size_t i = 0; i < seats.size(); ++i) seats[i] = {own[0].get(), static_cast<int>(i), 0, n_nodes};
    return;
  }
  for (const int threads : count) own.push_back(std::make_unique<LaneSet>(threads));
  for (Seat& seat : seats) seat.set = own[static_cast<std::size_t>(seat.first_node)].get();
}

void LaneThreads::Team::begin(std::int32_t spins, bool quiet) {
  const auto begin_set = [&](LaneSet& set) {
    set.error.store(0, std::memory_order_relaxed);
    set.spin_iterations = spins;
    set.quiet = quiet;
  };
  begin_set(all);
  for (const auto& set : own) begin_set(*set);
}

std::int32_t LaneThreads::Team::error() const {
  std::int32_t first = all.error.load(std::memory_order_relaxed);
  for (const auto& set : own)
    if (first == 0) first = set->error.load(std::memory_order_relaxed);
  return first;
}

LaneThreads::LaneThreads(const std::vector<LaneGroup>& groups) : LaneThreads(groups, spread(groups)) {}

LaneThreads::LaneThreads(const std::vector<LaneGroup>& groups, const std::vector<int>& nodes)
    : places_(nodes.size()),
      count_(static_cast<int>(nodes.size())),
      quiet_spins_(spins_for(kQuietSpin)),
      hand_over_spins_(spins_for(kHandOverSpin)),
      contended_spins_(spins_for(kContendedSpin)),
      waiting_spins_(quiet_spins_) {
  for (std::size_t n = 1; n <= nodes.size(); ++n)
    teams_.push_back(
        std::make_unique<Team>(std::vector<int>(nodes.begin(), nodes.begin() + static_cast<long>(n)),
                               static_cast<int>(groups.size())));
  const auto elsewhere = [&](const LaneGroup& group) { return group.cpus != groups.front().cpus; };
  if (std::ranges::any_of(groups, elsewhere)) callers_cpus_ = groups[static_cast<std::size_t>(nodes[0])].cpus;
  own_cpus_ = cpu_of_each(groups, nodes);
  const OwnFaultsOnly signals;
  try {
    for (std::size_t i = 1; i < nodes.size(); ++i) {
      workers_.emplace_back([this, i, cpus = groups[static_cast<std::size_t>(nodes[i])].cpus] {
        pthread_setname_np(pthread_self(), "hetcomp-lane");
        bind_thread(cpus);
        work(static_cast<int>(i), cpus);
      });
    }
  } catch (...) {
    shut_down();
    throw;
  }
}

LaneThreads::~LaneThreads() { shut_down(); }

void LaneThreads::shut_down() {
  stop_.store(true, std::memory_order_relaxed);
  for (Place& place : places_) begin_step(place);
  for (std::thread& worker : workers_) worker.join();
}

void LaneThreads::begin_step(Place& place) {
  place.begun.fetch_add(1, std::memory_order_seq_cst);
  // As in barrier(): either the lane sees the new value in its futex call, or it is seen sleeping here.
  if (place.sleeping.load(std::memory_order_seq_cst) != 0) futex_wake_all(place.begun);
}

// The part of the time since the last decision that a lane waited for a CPU: of the one that waited most.
// Lanes which did not run since then have waited for nothing. Where the system does not say it, nobody waits.
double LaneThreads::longest_wait(std::size_t active) {
  std::chrono::nanoseconds longest{0};
  for (std::size_t i = 0; i < active; ++i) {
    Place& place = places_[i];
    const std::chrono::nanoseconds total = place.wait.total().value_or(place.waited);
    longest = std::max(longest, total - place.waited);
    place.waited = total;
  }
  const auto time = std::exchange(since_decision_, std::chrono::nanoseconds{0});
  return std::chrono::duration<double>(longest) / time;
}

void LaneThreads::run_lane(int thread) {
  const Seat& seat = team_->seats[static_cast<std::size_t>(thread)];
  Lane own{seat.set, seat.thread};
  Lane lane{&team_->all, thread};
  if (seat.set != nullptr) lane.own = &own;
  lane.first_node = seat.first_node;
  lane.last_node = seat.last_node;
  program_->run(&lane, step_);
}

void LaneThreads::work(int thread, const std::vector<int>& cpus) {
  Place& place = places_[static_cast<std::size_t>(thread)];
  bool spread = false;
  place.wait.follow_caller();
  for (std::uint32_t seen = 0;; ++seen) {
    std::int32_t spins = waiting_spins_.load(std::memory_order_relaxed);
    while (place.begun.load(std::memory_order_acquire) == seen) {
      if (spins-- > 0) {
        cpu_relax();
        continue;
      }
      place.sleeping.store(1, std::memory_order_seq_cst);
      futex_wait(place.begun, seen);
      place.sleeping.store(0, std::memory_order_relaxed);
    }
    if (stop_.load(std::memory_order_relaxed)) return;
    if (spread != spread_) {
      spread = spread_;
      bind_thread(spread ? std::vector<int>{own_cpus_[static_cast<std::size_t>(thread)]} : cpus);
    }
    run_lane(thread);
    if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) futex_wake_all(running_);
  }
}

std::int32_t LaneThreads::run(const hetcomp_program& program, const hetcomp_step& step) {
  const auto start = std::chrono::steady_clock::now();
  const auto active = static_cast<std::size_t>(count_.active());
  const std::int32_t quiet_spins = step.hand_over != nullptr ? hand_over_spins_ : quiet_spins_;
  const std::int32_t spins = count_.contended() ? contended_spins_ : quiet_spins;
  team_ = teams_[active - 1].get();
  program_ = &program;
  step_ = &step;
  if (places_[0].wait.follow_caller())
    places_[0].waited = places_[0].wait.total().value_or(places_[0].waited);
  spread_ = count_.quiet() && !own_cpus_.empty();
  team_->begin(spins, count_.quiet());
  waiting_spins_.store(spins, std::memory_order_relaxed);
  running_.store(static_cast<std::uint32_t>(active - 1), std::memory_order_relaxed);
  for (std::size_t i = 1; i < active; ++i) begin_step(places_[i]);
  {
    const BoundWhile bound(callers_cpus_);
    // The other lanes keep to their CPUs, so that the scheduler has no reason to take it from this one.
    if (spread_) move_thread(own_cpus_[0]);
    run_lane(0);
  }

  // The last barrier was passed by all, but `step` is the caller's: nobody may still be looking at it.
  std::int32_t left_spins = spins;
  for (std::uint32_t left; (left = running_.load(std::memory_order_acquire)) != 0;) {
    if (left_spins-- > 0)
      cpu_relax();
    else
      futex_wait(running_, left);
  }
  const auto took = std::chrono::steady_clock::now() - start;
  since_decision_ += took;
  if (count_.add(step.n_tokens, took)) count_.decide(longest_wait(active));
  return team_->error();
}

}  // namespace hetcomp

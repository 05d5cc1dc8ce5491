// Lanes, barriers and dynamic tasks; meant to be run under ThreadSanitizer too.
#include <gtest/gtest.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <numeric>
#include <thread>
#include <vector>

#include "hetcomp/lane.h"
#include "lane_threads.h"

namespace hetcomp {
namespace {

// So many lanes on the CPUs of this process: more lanes than CPUs must work too.
std::vector<LaneGroup> cpus_for(int lanes) {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  sched_getaffinity(0, sizeof(mask), &mask);
  std::vector<int> allowed;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &mask)) allowed.push_back(cpu);
  return {{lanes, allowed}};
}

hetcomp_program program_of(void (*run)(hetcomp_lane*, const hetcomp_step*)) {
  hetcomp_program program{};
  program.run = run;
  return program;
}

// The tests' programs find their data behind the step's arena.
template <class T>
T& data(const hetcomp_step* step) {
  return *reinterpret_cast<T*>(step->arena);
}
template <class T>
hetcomp_step step_of(T& data) {
  hetcomp_step step{};
  step.arena = reinterpret_cast<std::uint8_t*>(&data);
  return step;
}

class Lanes : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Threads, Lanes, testing::Values(1, 2, 3, 4));

// Each region reads what the region before wrote everywhere: a missing barrier or a task done twice changes
// the sum.
struct Relay {
  std::vector<std::int64_t> a;
  std::vector<std::int64_t> b;
  std::int64_t grain;
};

void relay(hetcomp_lane* lane, const hetcomp_step* step) {
  auto& d = data<Relay>(step);
  const auto n = static_cast<std::int64_t>(d.a.size());
  for (int region = 0; region < 100; ++region) {
    const auto& from = region % 2 == 0 ? d.a : d.b;
    auto& to = region % 2 == 0 ? d.b : d.a;
    parallel_for(*lane, n, d.grain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i)
        to[static_cast<std::size_t>(i)] = from[static_cast<std::size_t>((i + 1) % n)] + 1;
    });
    barrier(*lane);
  }
}

TEST_P(Lanes, EveryTaskOnceAndBarriersOrderRegions) {
  LaneThreads lanes(cpus_for(GetParam()));
  const hetcomp_program program = program_of(relay);
  for (const std::int64_t n : {1, 2, 7, 100}) {
    for (const std::int64_t grain : {1, 3, 1000}) {
      Relay d{std::vector<std::int64_t>(static_cast<std::size_t>(n)),
              std::vector<std::int64_t>(static_cast<std::size_t>(n)), grain};
      std::iota(d.a.begin(), d.a.end(), 0);
      const hetcomp_step step = step_of(d);
      EXPECT_EQ(lanes.run(program, step), 0);
      for (std::int64_t i = 0; i < n; ++i) EXPECT_EQ(d.a[static_cast<std::size_t>(i)], (i + 100) % n + 100);
    }
  }
}

// Weights are streamed in the order of `next`; a part of its own for every thread, then draws.
struct Stream {
  std::int64_t first;
  std::int64_t grain;
  std::vector<std::atomic<int>> done;
  std::atomic<int> wrong{0};  // chunks that were not announced
};

void stream(hetcomp_lane* lane, const hetcomp_step* step) {
  auto& d = data<Stream>(step);
  const auto n = static_cast<std::int64_t>(d.done.size());
  std::int64_t announced = -1;
  stream_for(*lane, n, {d.first, d.grain}, [&](std::int64_t begin, std::int64_t end, std::int64_t next) {
    d.wrong += announced >= 0 && begin != announced;
    d.wrong += next != n && next < end;
    for (std::int64_t i = begin; i < end; ++i) d.done[static_cast<std::size_t>(i)] += 1;
    announced = next;
  });
  d.wrong += announced >= 0 && announced != n;
  barrier(*lane);
}

TEST_P(Lanes, StreamsEveryTaskOnceAndSaysWhereItGoesOn) {
  LaneThreads lanes(cpus_for(GetParam()));
  for (const std::size_t n : {0, 1, 3, 64, 101})
    for (const std::int64_t first : {0, 1, 5, 40})
      for (const std::int64_t grain : {1, 3}) {
        Stream d{first, grain, std::vector<std::atomic<int>>(n), {}};
        lanes.run(program_of(stream), step_of(d));
        EXPECT_EQ(d.wrong, 0);
        for (const auto& done : d.done) EXPECT_EQ(done, 1) << n << " " << first << " " << grain;
      }
}

// Two regions without a barrier between them: a task of the second reads what all tasks of a group wrote.
struct Groups {
  static constexpr std::int64_t kTasks = 7;
  std::vector<std::int64_t> parts;  // [groups][kTasks]
  std::vector<std::int64_t> sums;   // [readers]
};

void groups_that_follow(hetcomp_lane* lane, const hetcomp_step* step) {
  auto& d = data<Groups>(step);
  const auto n = static_cast<std::int64_t>(d.parts.size());
  const auto groups = static_cast<std::int32_t>(n / Groups::kTasks);
  for (int round = 0; round < 100; ++round) {
    const Progress progress(*lane, groups);
    stream_for(*lane, n, {n / 2 / lane->threads(), 1},
               [&](std::int64_t begin, std::int64_t end, std::int64_t) {
                 for (std::int64_t i = begin; i < end; ++i) {
                   d.parts[static_cast<std::size_t>(i)] += i;
                   progress.done(static_cast<std::int32_t>(i / Groups::kTasks));
                 }
               });
    parallel_for(*lane, static_cast<std::int64_t>(d.sums.size()), 1,
                 [&](std::int64_t begin, std::int64_t end) {
                   for (std::int64_t reader = begin; reader < end; ++reader)
                     for (std::int32_t g = 0; g < groups; ++g) {
                       progress.await(g, Groups::kTasks);
                       const auto first = d.parts.begin() + g * Groups::kTasks;
                       d.sums[static_cast<std::size_t>(reader)] +=
                           std::accumulate(first, first + Groups::kTasks, std::int64_t{0});
                     }
                 });
    barrier(*lane);
  }
}

TEST_P(Lanes, TasksWaitForTheGroupsThatTheyRead) {
  LaneThreads lanes(cpus_for(GetParam()));
  for (const std::int64_t groups : {0, 1, 5, static_cast<int>(Progress::kMostGroups)}) {
    const std::int64_t n = groups * Groups::kTasks;
    Groups d{std::vector<std::int64_t>(static_cast<std::size_t>(n)), std::vector<std::int64_t>(11)};
    EXPECT_EQ(lanes.run(program_of(groups_that_follow), step_of(d)), 0);
    // In round r (from 1) every part i is r i.
    for (const std::int64_t sum : d.sums) EXPECT_EQ(sum, n * (n - 1) / 2 * 100 * 101 / 2);
  }
}

// Regions of all threads and runs of thread 0 alone in turns, as a decode step has them.
struct Alone {
  bool alone;
  std::vector<std::int64_t> all;
  std::int64_t sum = 0;  // of `all`, made by thread 0
  std::atomic<int> wrong{0};
};

void alone_between_regions(hetcomp_lane* lane, const hetcomp_step* step) {
  auto& d = data<Alone>(step);
  const auto n = static_cast<std::int64_t>(d.all.size());
  for (int round = 0; round < 100; ++round) {
    parallel_for(*lane, n, 3, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) d.all[static_cast<std::size_t>(i)] += d.sum + 1;
    });
    if (alone_begin(*lane, d.alone)) {
      d.wrong += d.alone && lane->thread != 0;
      parallel_for(*lane, 1, 1, [&](std::int64_t, std::int64_t) {
        d.sum = std::accumulate(d.all.begin(), d.all.end(), std::int64_t{0}) % 1000;
      });
      barrier(*lane);
      parallel_for(*lane, n, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) d.all[static_cast<std::size_t>(i)] %= 1000 + d.sum;
      });
    }
    alone_end(*lane, d.alone);
  }
}

TEST_P(Lanes, OneThreadAloneDoesWhatAllDo) {
  LaneThreads lanes(cpus_for(GetParam()));
  Alone together{false, std::vector<std::int64_t>(50), 0, {}};
  lanes.run(program_of(alone_between_regions), step_of(together));
  Alone alone{GetParam() > 1, std::vector<std::int64_t>(50), 0, {}};
  lanes.run(program_of(alone_between_regions), step_of(alone));
  EXPECT_EQ(alone.wrong, 0);
  EXPECT_EQ(alone.all, together.all);
  EXPECT_EQ(alone.sum, together.sum);
}

struct Counts {
  std::vector<std::atomic<int>> done;
};

// More regions than counters without a barrier of their own; regions without tasks in between.
void many_regions(hetcomp_lane* lane, const hetcomp_step* step) {
  auto& d = data<Counts>(step);
  for (std::size_t region = 0; region < d.done.size(); ++region) {
    parallel_for(*lane, static_cast<std::int64_t>(region % 4), 1, [&](std::int64_t begin, std::int64_t end) {
      d.done[region] += static_cast<int>(end - begin);
    });
  }
  barrier(*lane);
}

TEST_P(Lanes, MoreRegionsThanCounters) {
  LaneThreads lanes(cpus_for(GetParam()));
  const hetcomp_program program = program_of(many_regions);
  for (int round = 0; round < 5; ++round) {
    Counts d{std::vector<std::atomic<int>>(3 * LaneSet::kCounters + 7)};
    lanes.run(program, step_of(d));
    for (std::size_t region = 0; region < d.done.size(); ++region)
      EXPECT_EQ(d.done[region], static_cast<int>(region % 4)) << region;
  }
}

// A program with hand-overs beside a GPU that gives the step up at one of them.
struct HandOvers {
  static constexpr std::uint32_t kFlags = 12;
  std::uint32_t gives_up_at = 0;
  std::vector<std::int64_t> from_gpu = std::vector<std::int64_t>(kFlags);  // written by wait()
  std::vector<std::int64_t> to_gpu = std::vector<std::int64_t>(40);
  std::vector<std::int64_t> answers;     // sums of to_gpu
  std::atomic<std::int64_t> left_at{0};  // sum of the flags at which lanes left
  std::atomic<int> lanes{0};
  hetcomp_hand_over hand_over{this, wait, answer, nullptr, 0, UINT32_MAX};

  static int wait(void* host, std::uint32_t flag) {
    auto& d = *static_cast<HandOvers*>(host);
    d.from_gpu[flag] = flag + 5;
    return flag != d.gives_up_at;
  }
  static void answer(void* host, std::uint32_t flag) {
    auto& d = *static_cast<HandOvers*>(host);
    EXPECT_EQ(d.answers.size(), flag);
    d.answers.push_back(std::accumulate(d.to_gpu.begin(), d.to_gpu.end(), std::int64_t{0}));
  }
};

void handing_over(hetcomp_lane* lane, const hetcomp_step* step) {
  auto& d = data<HandOvers>(step);
  d.lanes += 1;
  const auto layers = [&] {
    for (std::uint32_t flag = 0; flag < HandOvers::kFlags; ++flag) {
      if (!await_gpu(*lane, *step, flag)) {
        d.left_at += flag;
        return;
      }
      parallel_for(*lane, 40, 3, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) d.to_gpu[static_cast<std::size_t>(i)] = d.from_gpu[flag];
      });
      // Thread 0 goes on to the next wait while others are still in the barrier: where it answers nothing, it
      // may give up before they have looked whether this hand-over was.
      if (flag % 2 == 0) answer_gpu(*lane, *step, flag);
      if (flag % 2 == 1 && lane->thread == 0) d.answers.push_back(0);
    }
  };
  layers();
  barrier(*lane);
}

TEST_P(Lanes, HandOversAndAStepThatIsGivenUpAtAnyOfThem) {
  LaneThreads lanes(cpus_for(GetParam()));
  for (int round = 0; round < 20; ++round) {
    for (std::uint32_t flag = 0; flag <= HandOvers::kFlags; ++flag) {
      HandOvers d{.gives_up_at = flag, .answers = {}};
      hetcomp_step step = step_of(d);
      step.hand_over = &d.hand_over;
      EXPECT_EQ(lanes.run(program_of(handing_over), step), 0);
      std::vector<std::int64_t> expected;
      for (std::uint32_t i = 0; i < flag && i < HandOvers::kFlags; ++i)
        expected.push_back(i % 2 == 0 ? 40 * (i + 5) : 0);
      EXPECT_EQ(d.answers, expected);
      // All lanes left at the same hand-over.
      EXPECT_EQ(d.left_at, flag < HandOvers::kFlags ? d.lanes * flag : 0);
      EXPECT_EQ(d.hand_over.given_up, flag < HandOvers::kFlags ? flag : UINT32_MAX);
    }
  }
}

void report_error(hetcomp_lane* lane, const hetcomp_step* step) {
  parallel_for(*lane, 8, 1, [&](std::int64_t begin, std::int64_t end) {
    if (begin <= 5 && 5 < end) lane->set->error.store(data<int>(step));
  });
  barrier(*lane);
}

TEST_P(Lanes, ErrorOfOneStepOnly) {
  LaneThreads lanes(cpus_for(GetParam()));
  const hetcomp_program program = program_of(report_error);
  int error = 42;
  EXPECT_EQ(lanes.run(program, step_of(error)), 42);
  error = 0;
  EXPECT_EQ(lanes.run(program, step_of(error)), 0);
}

// A program may use its step until it returns, also after its last barrier.
struct LateReaders {
  std::atomic<int> entered{0};
  std::atomic<int> read{0};
};

void late_reader(hetcomp_lane* lane, const hetcomp_step* step) {
  data<LateReaders>(step).entered += 1;
  barrier(*lane);
  data<LateReaders>(step).read += static_cast<int>(step->n_tokens);
}

TEST_P(Lanes, StepIsUsedByNobodyAfterRun) {
  LaneThreads lanes(cpus_for(GetParam()));
  const hetcomp_program program = program_of(late_reader);
  LateReaders readers;
  for (int i = 0; i < 300; ++i) {
    hetcomp_step step = step_of(readers);
    step.n_tokens = 1;
    lanes.run(program, step);
    step.n_tokens = 1000;  // a lane still inside would add this
  }
  EXPECT_EQ(readers.read, readers.entered);
  EXPECT_GE(readers.entered, 300);
  EXPECT_LE(readers.entered, 300 * GetParam());
}

// Only while nobody else wants the CPUs: on a busy machine the lanes may be free to move when this looks.
struct Places {
  std::vector<int> cpus;  // of each lane; -1: it has several
};

void note_cpu(hetcomp_lane* lane, const hetcomp_step* step) {
  cpu_set_t mask;
  sched_getaffinity(0, sizeof(mask), &mask);
  data<Places>(step).cpus[static_cast<std::size_t>(lane->thread)] =
      CPU_COUNT(&mask) == 1 ? sched_getcpu() : -1;
  barrier(*lane);
}

TEST(LaneThreads, EveryWorkerHasACpuOfItsOwnOnAQuietMachine) {
  const std::vector<LaneGroup> groups = cpus_for(1);
  const int lanes_here = static_cast<int>(groups[0].cpus.size());
  if (lanes_here < 2) GTEST_SKIP() << "one CPU";
  LaneThreads lanes({{lanes_here, groups[0].cpus}});
  Places places{std::vector<int>(groups[0].cpus.size(), -2)};
  lanes.run(program_of(note_cpu), step_of(places));  // the first step: nobody was seen yet
  EXPECT_EQ(places.cpus[0], -1);                     // the caller's thread stays free
  for (std::size_t i = 1; i < places.cpus.size(); ++i) EXPECT_EQ(places.cpus[i], groups[0].cpus[i]);
}

TEST(LaneThreads, MoreLanesThanCpusAreNotBoundToOne) {
  const std::vector<LaneGroup> groups = cpus_for(1);
  if (groups[0].cpus.size() < 2) GTEST_SKIP() << "one CPU";
  const std::size_t n = groups[0].cpus.size() + 1;
  LaneThreads lanes({{static_cast<int>(n), groups[0].cpus}});
  Places places{std::vector<int>(n, -2)};
  lanes.run(program_of(note_cpu), step_of(places));
  for (const int cpu : places.cpus) EXPECT_EQ(cpu, -1);
}

// Without any spinning every wait parks: the futex path of the barrier.
TEST_P(Lanes, BarrierThatAlwaysParks) {
  LaneSet set(GetParam());
  set.spin_iterations = 0;
  std::vector<int> values(static_cast<std::size_t>(GetParam()));
  std::atomic<int> wrong{0};
  const auto body = [&](int thread) {
    Lane lane{&set, thread};
    for (int round = 1; round <= 2000; ++round) {
      values[static_cast<std::size_t>(thread)] = round;
      barrier(lane);
      for (const int value : values) wrong += value != round;
      barrier(lane);
    }
  };
  {
    std::vector<std::jthread> threads;
    for (int t = 1; t < GetParam(); ++t) threads.emplace_back(body, t);
    body(0);
  }
  EXPECT_EQ(wrong, 0);
}

TEST_P(Lanes, StartsAndStopsWithoutSteps) {
  for (int i = 0; i < 20; ++i) LaneThreads lanes(cpus_for(GetParam()));
}

TEST_P(Lanes, LeavesTheCallersAffinityAlone) {
  cpu_set_t before;
  cpu_set_t after;
  ASSERT_EQ(sched_getaffinity(0, sizeof(before), &before), 0);
  Counts d{std::vector<std::atomic<int>>(3)};
  {
    LaneThreads lanes(cpus_for(GetParam()));
    lanes.run(program_of(many_regions), step_of(d));
    ASSERT_EQ(sched_getaffinity(0, sizeof(after), &after), 0);
    EXPECT_TRUE(CPU_EQUAL(&before, &after));
  }
  ASSERT_EQ(sched_getaffinity(0, sizeof(after), &after), 0);
  EXPECT_TRUE(CPU_EQUAL(&before, &after));
}

}  // namespace
}  // namespace hetcomp

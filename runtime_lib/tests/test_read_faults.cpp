// Reads of mapped files that fail, as files that are cut make them fail: who reads goes on and is told, and
// signals that are somebody else's reach him. Meant to be run under ThreadSanitizer too.
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <csetjmp>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <latch>
#include <thread>
#include <tuple>
#include <vector>

#include "mapped_file.h"
#include "status.h"

namespace hetcomp {
namespace {

constexpr std::size_t kPage = 4096;

class CutFile {
 public:
  explicit CutFile(std::size_t bytes) : content_(bytes, 'w') {
    std::string name = (std::filesystem::temp_directory_path() / "hetcomp-XXXXXX").string();
    close(mkstemp(name.data()));
    path_ = name;
    restore();
  }
  ~CutFile() { std::filesystem::remove(path_); }
  CutFile(const CutFile&) = delete;
  CutFile& operator=(const CutFile&) = delete;

  const std::filesystem::path& path() const { return path_; }
  void cut(std::size_t bytes) const { ASSERT_EQ(truncate(path_.c_str(), static_cast<off_t>(bytes)), 0); }
  // In place: the file stays the one that is mapped.
  void restore() const {
    std::fstream file(path_, std::ios::binary | std::ios::in | std::ios::out);
    file.write(content_.data(), static_cast<std::streamsize>(content_.size()));
  }

 private:
  std::string content_;
  std::filesystem::path path_;
};

std::size_t sum(const MappedFile& file, std::size_t from = 0) {
  std::size_t sum = 0;
  for (std::size_t i = from; i < file.size(); i += kPage)
    sum += static_cast<const volatile std::uint8_t*>(file.data())[i];
  return sum;
}

std::string refusal(MappedFile& file) {
  try {
    file.refuse("The weight w");
  } catch (const Error& error) {
    EXPECT_EQ(error.status(), HETCOMP_IO);
    return error.what();
  }
}

struct sigaction bus_action() {
  struct sigaction action{};
  sigaction(SIGBUS, nullptr, &action);
  return action;
}

void handle_bus(void (*handler)(int)) {
  struct sigaction action{};
  action.sa_handler = handler;
  sigaction(SIGBUS, &action, nullptr);
}

// Keeps what SIGBUS did before.
class ReadFaults : public testing::Test {
 protected:
  ~ReadFaults() override { sigaction(SIGBUS, &before_, nullptr); }
  struct sigaction before_ = bus_action();
};

TEST_F(ReadFaults, ThreadsThatReadACutFileGoOnAndAreTold) {
  const CutFile file(64 * kPage);
  MappedFile map(file.path());
  const std::size_t all = 64 * std::size_t{'w'};
  for (int round = 0; round < 20; ++round) {
    ASSERT_EQ(sum(map), all);
    EXPECT_FALSE(map.fault());
    file.cut(16 * kPage);
    std::latch together(4);
    std::vector<std::jthread> threads;
    for (std::size_t t = 0; t < 4; ++t)
      threads.emplace_back([&, t] {
        together.arrive_and_wait();
        EXPECT_LT(sum(map, 5 * t * kPage), all);
      });
    threads.clear();
    ASSERT_TRUE(map.fault());
    EXPECT_GE(*map.fault(), 16 * kPage);
    const std::string said = refusal(map);
    EXPECT_TRUE(said.starts_with("The weight w in " + file.path().string() + " could not be read")) << said;
    EXPECT_NE(said.find("was cut to 65536 of its 262144 bytes"), std::string::npos) << said;
    EXPECT_FALSE(map.fault());
    // It is read again, and is still cut.
    EXPECT_EQ(sum(map), 16 * std::size_t{'w'});
    EXPECT_TRUE(map.fault());
    file.restore();
    EXPECT_NE(refusal(map).find("none any more"), std::string::npos);
  }
  EXPECT_EQ(sum(map), all);
}

TEST_F(ReadFaults, AnotherFileIsNotTouched) {
  const CutFile file(4 * kPage), other(4 * kPage);
  const MappedFile map(file.path()), whole(other.path());
  file.cut(0);
  EXPECT_EQ(sum(map), 0U);
  EXPECT_EQ(sum(whole), 4 * std::size_t{'w'});
  EXPECT_TRUE(map.fault());
  EXPECT_FALSE(whole.fault());
}

std::atomic<int> seen{0};
sigjmp_buf out;

void see(int) { ++seen; }
void leave(int) {
  ++seen;
  siglongjmp(out, 1);
}

// A mapping that nobody watches, of a file that was cut.
class Foreign {
 public:
  Foreign() : opened_(file_.path()) {
    bytes_ =
        static_cast<volatile char*>(mmap(nullptr, kPage, PROT_READ, MAP_SHARED, opened_.descriptor(), 0));
    file_.cut(0);
  }
  ~Foreign() { munmap(const_cast<char*>(bytes_), kPage); }
  char read() const { return bytes_[0]; }

 private:
  CutFile file_{kPage};
  File opened_;
  volatile char* bytes_;
};

TEST_F(ReadFaults, SignalsThatAreNotOursReachTheHandlerOfBefore) {
  seen = 0;
  handle_bus(leave);  // as a host has that maps files itself
  const CutFile file(kPage);
  const MappedFile map(file.path());
  EXPECT_NE(bus_action().sa_handler, leave);
  const Foreign foreign;
  for (int round = 1; round <= 3; ++round) {
    if (sigsetjmp(out, 1) == 0) {
      std::ignore = foreign.read();
      ADD_FAILURE() << "no signal";
    }
    EXPECT_EQ(seen, round);
  }
  if (sigsetjmp(out, 1) == 0) {
    raise(SIGBUS);
    ADD_FAILURE() << "no signal";
  }
  EXPECT_EQ(seen, 4);
  EXPECT_FALSE(map.fault());
}

TEST_F(ReadFaults, TheHandlerGoesWithTheLastMapping) {
  handle_bus(see);
  const CutFile file(kPage);
  {
    const MappedFile first(file.path());
    {
      const MappedFile second(file.path());
    }
    EXPECT_NE(bus_action().sa_handler, see);
  }
  EXPECT_EQ(bus_action().sa_handler, see);
}

struct sigaction below{};
void pass_down(int signal, siginfo_t* info, void* context) {
  ++seen;
  below.sa_sigaction(signal, info, context);
}

TEST_F(ReadFaults, AHandlerThatCameLaterStaysAndIsAskedFirst) {
  seen = 0;
  handle_bus(see);
  const CutFile file(kPage);
  struct sigaction later{};
  later.sa_sigaction = pass_down;
  later.sa_flags = SA_SIGINFO;
  {
    const MappedFile map(file.path());
    sigaction(SIGBUS, &later, &below);
  }
  EXPECT_EQ(bus_action().sa_sigaction, pass_down);
  {
    const MappedFile map(file.path());
    EXPECT_EQ(bus_action().sa_sigaction, pass_down);
    file.cut(0);
    EXPECT_EQ(sum(map), 0U);
    EXPECT_TRUE(map.fault());
    EXPECT_EQ(seen, 1);
  }
  raise(SIGBUS);  // passed on twice, to the handler below both
  EXPECT_EQ(seen, 3);
  sigaction(SIGBUS, &below, nullptr);
  file.restore();
  {
    const MappedFile map(file.path());
  }
  EXPECT_EQ(bus_action().sa_handler, see);
}

// As who restores what he found, when that was before the mapping.
TEST_F(ReadFaults, AHandlerThatWasReplacedByTheOneBeforeItComesAgain) {
  handle_bus(see);
  const CutFile file(kPage);
  {
    const MappedFile map(file.path());
    handle_bus(see);
    const MappedFile second(file.path());
    file.cut(0);
    EXPECT_EQ(sum(map) + sum(second), 0U);
    EXPECT_TRUE(map.fault() && second.fault());
    handle_bus(see);
  }
  EXPECT_EQ(bus_action().sa_handler, see);
}

TEST_F(ReadFaults, AThreadThatHadSignalsBlockedGoesOn) {
  const CutFile file(kPage);
  const MappedFile map(file.path());
  file.cut(0);
  std::jthread([&] {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, nullptr);
    {
      const BusErrorsUnblocked unblocked;
      EXPECT_EQ(sum(map), 0U);
    }
    sigset_t after;
    pthread_sigmask(SIG_SETMASK, nullptr, &after);
    EXPECT_EQ(sigismember(&after, SIGBUS), 1);
  }).join();
  EXPECT_TRUE(map.fault());
}

TEST_F(ReadFaults, WithoutAHandlerOfBeforeSignalsThatAreNotOursEndTheProcess) {
  testing::GTEST_FLAG(death_test_style) = "threadsafe";  // the process has threads
  handle_bus(SIG_DFL);
  const CutFile file(kPage);
  const MappedFile map(file.path());
  EXPECT_EXIT(raise(SIGBUS), testing::KilledBySignal(SIGBUS), "");
  EXPECT_EXIT(std::ignore = Foreign().read(), testing::KilledBySignal(SIGBUS), "");
}

}  // namespace
}  // namespace hetcomp

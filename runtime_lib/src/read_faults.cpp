#include "read_faults.h"

#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <mutex>
#include <thread>
#include <vector>

#include "memory.h"

namespace hetcomp {
namespace {

struct Watched {
  std::uintptr_t begin;
  std::uintptr_t end;
  std::atomic<std::int64_t>* fault;
};
using Table = std::vector<Watched>;

// A handler must not lock: it reads a table that never changes, and whoever replaces it waits until no
// handler looks at the old one.
std::mutex changes;  // of what follows
std::atomic<const Table*> table{nullptr};
std::atomic<int> looking{0};

struct sigaction previous;  // whom SIGBUS is passed on to that is not ours
bool installed = false;

// Zeros for the whole file: a page each would be a mapping each, of which a process may have 65,530. The bare
// system call: no library's lock is in its way, and threads may read meanwhile.
bool cover(const Watched& file) {
  return syscall(SYS_mmap, file.begin, file.end - file.begin, PROT_READ,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) != -1;
}

bool take(std::uintptr_t address) {
  bool covered = false;
  looking.fetch_add(1, std::memory_order_seq_cst);
  if (const Table* files = table.load(std::memory_order_seq_cst); files != nullptr) {
    for (const Watched& file : *files) {
      if (address < file.begin || address >= file.end) continue;
      std::int64_t none = -1;
      file.fault->compare_exchange_strong(none, static_cast<std::int64_t>(address - file.begin));
      covered = cover(file);
      break;
    }
  }
  looking.fetch_sub(1, std::memory_order_seq_cst);
  return covered;
}

// Whoever had SIGBUS before gets it as if this handler were not there.
void pass_on(int signal, siginfo_t* info, void* context) {
  const bool sent = info->si_code <= 0;  // by kill() or raise(): no instruction would fail again
  const bool has_handler = (previous.sa_flags & SA_SIGINFO) != 0 ||
                           (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN);
  if (!has_handler) {
    if (sent && previous.sa_handler == SIG_IGN) return;
    struct sigaction fatal{};
    fatal.sa_handler = SIG_DFL;
    sigaction(SIGBUS, &fatal, nullptr);
    if (sent) raise(signal);  // comes when this handler returns
    return;
  }
  sigset_t before;
  pthread_sigmask(SIG_BLOCK, &previous.sa_mask, &before);
  if ((previous.sa_flags & SA_SIGINFO) != 0)
    previous.sa_sigaction(signal, info, context);
  else
    previous.sa_handler(signal);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void on_bus_error(int signal, siginfo_t* info, void* context) {
  const int error = errno;
  if (info->si_code <= 0 || !take(reinterpret_cast<std::uintptr_t>(info->si_addr)))
    pass_on(signal, info, context);
  errno = error;
}

bool same(const struct sigaction& a, const struct sigaction& b) {
  const bool info = (a.sa_flags & SA_SIGINFO) != 0;
  if (info != ((b.sa_flags & SA_SIGINFO) != 0)) return false;
  return info ? a.sa_sigaction == b.sa_sigaction : a.sa_handler == b.sa_handler;
}

struct sigaction own() {
  struct sigaction action{};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;  // Go's and Python's threads bring stacks for it
  return action;
}

struct sigaction current() {
  struct sigaction action{};
  sigaction(SIGBUS, nullptr, &action);
  return action;
}

void install() {
  const struct sigaction now = current();
  if (same(now, own())) return;
  // Not what was there before: a handler that came later, and may pass on to this one below it.
  if (installed && !same(now, previous)) return;
  previous = now;
  const struct sigaction ours = own();
  installed = sigaction(SIGBUS, &ours, nullptr) == 0;
}

// Where somebody has put a handler over this one, it stays below, and passes on.
void remove() {
  const struct sigaction now = current();
  const bool on_top = same(now, own());
  if (on_top) sigaction(SIGBUS, &previous, nullptr);
  if (on_top || same(now, previous)) installed = false;
}

// `changes` must be locked.
void replace(std::unique_ptr<const Table> files) {
  const std::unique_ptr<const Table> old(table.exchange(files.release(), std::memory_order_seq_cst));
  while (looking.load(std::memory_order_seq_cst) != 0) std::this_thread::yield();
}

}  // namespace

WatchedMapping::WatchedMapping(std::span<const std::uint8_t> mapping) : mapping_(mapping) {
  if (mapping.empty()) return;
  const std::lock_guard lock(changes);
  const Table* const before = table.load();
  auto files = std::make_unique<Table>(before != nullptr ? *before : Table());
  const auto begin = reinterpret_cast<std::uintptr_t>(mapping.data());
  files->push_back({begin, begin + (mapping.size() + kPageBytes - 1) / kPageBytes * kPageBytes, &fault_});
  replace(std::move(files));
  install();
}

WatchedMapping::~WatchedMapping() {
  if (mapping_.empty()) return;
  const std::lock_guard lock(changes);
  auto files = std::make_unique<Table>(*table.load());
  std::erase_if(*files, [&](const Watched& file) { return file.fault == &fault_; });
  if (files->empty()) {
    remove();
    files.reset();
  }
  replace(std::move(files));
}

std::optional<std::uint64_t> WatchedMapping::fault() const {
  const std::int64_t offset = fault_.load();
  if (offset == kNone) return std::nullopt;
  return static_cast<std::uint64_t>(offset);
}

void WatchedMapping::forget() { fault_.store(kNone); }

BusErrorsUnblocked::BusErrorsUnblocked() {
  sigset_t bus;
  sigemptyset(&bus);
  sigaddset(&bus, SIGBUS);
  pthread_sigmask(SIG_UNBLOCK, &bus, &before_);
}

BusErrorsUnblocked::~BusErrorsUnblocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

}  // namespace hetcomp

// Signals of the runtime's own threads.
#pragma once

#include <pthread.h>

#include <csignal>

namespace hetcomp {

// Threads that are started while it lives leave the host's signals (Ctrl-C, timers) to the host's threads. A
// fault of a thread itself is not blocked: the kernel would end the process without asking anybody's handler.
class OwnFaultsOnly {
 public:
  OwnFaultsOnly() {
    sigset_t others;
    sigfillset(&others);
    for (const int fault : {SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGTRAP}) sigdelset(&others, fault);
    pthread_sigmask(SIG_SETMASK, &others, &before_);
  }
  ~OwnFaultsOnly() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  OwnFaultsOnly(const OwnFaultsOnly&) = delete;
  OwnFaultsOnly& operator=(const OwnFaultsOnly&) = delete;

 private:
  sigset_t before_;
};

}  // namespace hetcomp

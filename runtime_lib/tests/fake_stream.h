// Streams of the fake driver: each is a thread that does one task after the other, until one fails.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

#include "cuda_api.h"

inline std::mutex streams_mutex;
inline std::set<struct CUstream_st*> streams;

struct CUstream_st {
  // live: counts streams.
  CUstream_st(int owner, std::atomic<int>& live) : device(owner), counter(live), thread([this] { work(); }) {
    const std::lock_guard lock(streams_mutex);
    streams.insert(this);
    ++counter;
  }
  ~CUstream_st() {
    {
      const std::lock_guard lock(streams_mutex);
      streams.erase(this);
    }
    {
      const std::lock_guard lock(mutex);
      ends = true;
    }
    changed.notify_all();
    thread.join();
    --counter;
  }
  void enqueue(std::function<CUresult()> task) {
    {
      const std::lock_guard lock(mutex);
      tasks.push_back(std::move(task));
    }
    changed.notify_all();
  }
  void work() {
    std::unique_lock lock(mutex);
    while (true) {
      changed.wait(lock, [this] { return ends || !tasks.empty(); });
      if (tasks.empty()) return;
      const auto& task = tasks.front();
      CUresult result = error;
      lock.unlock();
      if (result == CUDA_SUCCESS) result = task();
      lock.lock();
      error = result;
      tasks.pop_front();
      changed.notify_all();
    }
  }
  CUresult query() {
    const std::lock_guard lock(mutex);
    return error != CUDA_SUCCESS ? error : tasks.empty() ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
  }
  CUresult synchronize() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [this] { return tasks.empty(); });
    return error;
  }

  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<CUresult()>> tasks;
  CUresult error = CUDA_SUCCESS;
  bool ends = false;
  const int device;
  std::atomic<int>& counter;
  std::thread thread;
};
// As the driver does before it frees memory.
inline void synchronize_all() {
  const std::lock_guard lock(streams_mutex);
  for (CUstream_st* stream : streams) stream->synchronize();
}

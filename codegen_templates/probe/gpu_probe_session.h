// What every step of the GPU probe stands on: the document that is printed, a watchdog, a context with a
// stream, memory, timing.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cuda_driver.h"

namespace gpu_probe {

constexpr std::size_t kMebi = std::size_t{1} << 20;
inline double step_seconds() {  // a step that takes longer is given up; tests shorten it
  const char* text = std::getenv("HETCOMP_GPU_STEP_SECONDS");
  return text ? std::atof(text) : 20;
}
constexpr double kDrainSeconds = 5;  // then the GPU gets this long to come to rest
// At least every value that is waited for, as stream memory operations compare (cyclically).
constexpr std::uint32_t kRelease = 0x3fffffff;

// The GPU does not answer: nothing more is asked of it.
struct Timeout : Failure {
  using Failure::Failure;
};

inline double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline std::string number(double value) {
  if (!std::isfinite(value)) throw Failure("A figure that is not finite was measured.");
  char text[32];
  std::snprintf(text, sizeof text, "%.7g", value);
  return text;
}

inline std::string list(const std::vector<double>& values) {
  std::string text;
  for (double value : values) text += (text.empty() ? "" : ", ") + number(value);
  return "[" + text + "]";
}

inline std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return out + "\"";
}

inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// The JSON document: fields in order, and warnings. Printed once, by whoever comes first.
class Report {
 public:
  void set(const std::string& key, const std::string& value) {
    const std::scoped_lock lock(mutex_);
    fields_ += (fields_.empty() ? "" : ",\n ") + quoted(key) + ": " + value;
  }
  void warn(const std::string& text) {
    const std::scoped_lock lock(mutex_);
    warnings_ += (warnings_.empty() ? "" : ", ") + quoted(text);
  }
  void print() {
    const std::scoped_lock lock(mutex_);
    if (!std::exchange(printed_, true))
      std::printf("{%s%s\"warnings\": [%s]}\n", fields_.c_str(), fields_.empty() ? "" : ",\n ",
                  warnings_.c_str());
    std::fflush(stdout);
  }

 private:
  std::mutex mutex_;
  std::string fields_, warnings_;
  bool printed_ = false;
};

// Sees to it that nothing waits for ever: a step that is overdue has its flags released, so that the GPU's
// waits end; if it does not end even then (the driver itself hangs), what is known is printed and the process
// ends.
class Watchdog {
 public:
  explicit Watchdog(Report& report) : report_(report), thread_([this] { watch(); }) { arm(); }
  ~Watchdog() {
    stop_ = true;
    thread_.join();
  }
  void arm() { deadline_ = now() + step_seconds(); }
  double deadline() const { return deadline_; }
  // Flags that a GPU may wait on; none: nullptr. They must live until guard is called again.
  void guard(volatile std::uint32_t* flag) {
    const std::scoped_lock lock(mutex_);
    flag_ = flag;
  }
  void release() {
    const std::scoped_lock lock(mutex_);
    if (flag_) *flag_ = kRelease;
  }

 private:
  void watch() {
    while (!stop_) {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      const double late = now() - deadline_;
      if (late > 0) release();
      if (late > 2 * kDrainSeconds) {
        report_.warn("The CUDA driver did not return within " + number(step_seconds()) +
                     " s; measuring was given up.");
        report_.print();
        _exit(0);
      }
    }
  }

  Report& report_;
  std::atomic<double> deadline_{now() + step_seconds()};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  volatile std::uint32_t* flag_ = nullptr;
  std::thread thread_;
};

// A context on one device, current in this thread, with one stream.
class Session {
 public:
  Session(const Driver& driver, Watchdog& watchdog, CUdevice device)
      : cuda(driver), watchdog(watchdog), device(device) {
    cuda.cuDevicePrimaryCtxRetain(&context, device);
    cuda.cuCtxSetCurrent(context);
    cuda.cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING);
    for (CUevent& event : events_) cuda.cuEventCreate(&event, CU_EVENT_DEFAULT);
  }
  ~Session() {
    for (CUevent event : events_) cuda.cuEventDestroy.raw(event);
    cuda.cuStreamDestroy.raw(stream);
    cuda.cuDevicePrimaryCtxRelease.raw(device);
  }
  Session(const Session&) = delete;

  int attribute(CUdevice_attribute which) const {
    int value = 0;
    cuda.cuDeviceGetAttribute(&value, which, device);
    return value;
  }
  std::size_t free_bytes() const {
    std::size_t free = 0, total = 0;
    cuda.cuMemGetInfo(&free, &total);
    return free;
  }
  // Until the stream is idle; throws Failure when the step is overdue.
  void wait(double grace = 0) const {
    for (;;) {
      const CUresult state = cuda.cuStreamQuery.raw(stream);
      if (state != CUDA_ERROR_NOT_READY) return cuda.cuStreamQuery.require(state);
      if (now() > watchdog.deadline() + grace)
        throw Timeout("The GPU did not answer within " + number(step_seconds()) + " s.");
    }
  }
  // Microseconds on the GPU's clock that the enqueued work takes.
  double microseconds(const std::function<void()>& enqueue) const {
    cuda.cuEventRecord(events_[0], stream);
    enqueue();
    cuda.cuEventRecord(events_[1], stream);
    wait();
    float milliseconds = 0;
    cuda.cuEventElapsedTime(&milliseconds, events_[0], events_[1]);
    if (!(milliseconds > 0)) throw Failure("The GPU's clock shows that no time passed.");
    return static_cast<double>(milliseconds) * 1e3;
  }
  void launch(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned threads, int shared,
              void** arguments) const {
    cuda.cuLaunchKernel(function, grid_x, grid_y, 1, threads, 1, 1, static_cast<unsigned>(shared), stream,
                        arguments, nullptr);
  }

  const Driver& cuda;
  Watchdog& watchdog;
  CUdevice device;
  CUcontext context = nullptr;
  CUstream stream = nullptr;

 private:
  CUevent events_[2] = {};
};

class DeviceMemory {
 public:
  DeviceMemory(const Session& session, std::size_t bytes) : session_(session) {
    session.cuda.cuMemAlloc(&at, bytes);
  }
  ~DeviceMemory() { session_.cuda.cuMemFree.raw(at); }
  DeviceMemory(const DeviceMemory&) = delete;
  CUdeviceptr at = 0;

 private:
  const Session& session_;
};

// Pinned host memory that the GPU can address.
class PinnedMemory {
 public:
  PinnedMemory(const Session& session, std::size_t bytes) : session_(session) {
    session.cuda.cuMemHostAlloc(&at, bytes, CU_MEMHOSTALLOC_DEVICEMAP);
  }
  ~PinnedMemory() { session_.cuda.cuMemFreeHost.raw(at); }
  PinnedMemory(const PinnedMemory&) = delete;
  CUdeviceptr on_device() const {
    CUdeviceptr address = 0;
    session_.cuda.cuMemHostGetDevicePointer(&address, at, 0);
    return address;
  }
  std::uint32_t* words() const { return static_cast<std::uint32_t*>(at); }
  void* at = nullptr;

 private:
  const Session& session_;
};

class Module {
 public:
  Module(const Session& session, const std::string& ptx) : session_(session) {
    session.cuda.cuModuleLoadData(&module_, ptx.c_str());
  }
  ~Module() { session_.cuda.cuModuleUnload.raw(module_); }
  Module(const Module&) = delete;
  CUfunction function(const char* name) const {
    CUfunction found = nullptr;
    session_.cuda.cuModuleGetFunction(&found, module_, name);
    return found;
  }

 private:
  const Session& session_;
  CUmodule module_ = nullptr;
};

// A graph under construction, its nodes in one chain, and then executable.
class Graph {
 public:
  explicit Graph(const Session& session) : session_(session) { session.cuda.cuGraphCreate(&graph_, 0); }
  ~Graph() {
    if (exec_) session_.cuda.cuGraphExecDestroy.raw(exec_);
    session_.cuda.cuGraphDestroy.raw(graph_);
  }
  Graph(const Graph&) = delete;
  void add_kernel(CUfunction function) {
    CUDA_KERNEL_NODE_PARAMS node{};
    node.func = function;
    node.gridDimX = node.gridDimY = node.gridDimZ = node.blockDimY = node.blockDimZ = 1;
    node.blockDimX = 32;
    CUgraphNode added = nullptr;
    session_.cuda.cuGraphAddKernelNode(&added, graph_, &last_, last_ ? 1 : 0, &node);
    last_ = added;
  }
  // One node: writes `value` to `signal`, then waits until `answer` holds at least that.
  void add_handshake(CUdeviceptr signal, CUdeviceptr answer, std::uint32_t value) {
    CUstreamBatchMemOpParams operations[2] = {};
    operations[0].writeValue = {CU_STREAM_MEM_OP_WRITE_VALUE_32, signal, value, CU_STREAM_WRITE_VALUE_DEFAULT,
                                0};
    operations[1].waitValue = {CU_STREAM_MEM_OP_WAIT_VALUE_32, answer, value, CU_STREAM_WAIT_VALUE_GEQ, 0};
    const CUDA_BATCH_MEM_OP_NODE_PARAMS node{session_.context, 2, operations, 0};
    CUgraphNode added = nullptr;
    session_.cuda.cuGraphAddBatchMemOpNode(&added, graph_, &last_, last_ ? 1 : 0, &node);
    last_ = added;
  }
  void finish() { session_.cuda.cuGraphInstantiate(&exec_, graph_, 0); }
  void launch() const { session_.cuda.cuGraphLaunch(exec_, session_.stream); }

 private:
  const Session& session_;
  CUgraph graph_ = nullptr;
  CUgraphNode last_ = nullptr;
  CUgraphExec exec_ = nullptr;
};

}  // namespace gpu_probe

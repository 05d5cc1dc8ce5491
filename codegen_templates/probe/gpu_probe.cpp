// Measures a GPU through the CUDA driver API alone (no toolkit, no runtime library) and prints it as JSON.
//   gpu_probe count                                        how many devices the driver shows
//   gpu_probe measure DEVICE MEBIBYTES CPU,CPU,... [quick] one device; CPU threads read MEBIBYTES in all
//   gpu_probe ptx basic|bf16|bf16-2|int8|int8-2            the kernels' PTX, both shapes of the matrix
//   products
// A step that fails leaves its field null and a warning; what is printed was measured.
#include <cstring>
#include <memory>

#include "cuda_driver.h"
#include "gpu_probe_joint.h"
#include "gpu_probe_matrix.h"
#include "gpu_probe_ptx.h"
#include "gpu_probe_session.h"

namespace gpu_probe {
namespace {

std::uint32_t pattern(std::size_t i, std::uint32_t seed) {
  return (static_cast<std::uint32_t>(i) + seed) * 2654435761u;
}

// Copies of one size: GB/s each way on the GPU's clock with copies back to back in a stream, and microseconds
// until the CPU knows of a single one.
class Copies {
 public:
  Copies(const Session& session, std::size_t most)
      : session_(session), host_(session, most), device_(session, most) {}

  std::string measure(std::size_t bytes, int repeats) {
    verify(bytes);
    const int in_a_row = static_cast<int>(std::clamp<std::size_t>(16 * kMebi / bytes, 1, 20));
    std::vector<double> rates[2];
    for (int way = 0; way < 2; ++way) {
      for (int i = 0; i <= repeats; ++i) {  // the first warms up
        const double us = session_.microseconds([&] {
          for (int j = 0; j < in_a_row; ++j) copy(way, bytes);
        });
        if (i) rates[way].push_back(static_cast<double>(bytes) * in_a_row / us * 1e-3);
      }
    }
    std::vector<double> waited;
    for (int i = 0; i <= repeats; ++i) {
      const double start = now();
      copy(0, bytes);
      session_.wait();
      waited.push_back((now() - start) * 1e6);
    }
    return "{\"bytes\": " + std::to_string(bytes) + ", \"to_device_gb_per_s\": " + number(median(rates[0])) +
           ", \"to_host_gb_per_s\": " + number(median(rates[1])) + ", \"to_device\": " + list(rates[0]) +
           ", \"to_host\": " + list(rates[1]) + ", \"waited_us\": " + number(median(waited)) + "}";
  }

 private:
  void copy(int way, std::size_t bytes) {
    if (way == 0) session_.cuda.cuMemcpyHtoDAsync(device_.at, host_.at, bytes, session_.stream);
    if (way == 1) session_.cuda.cuMemcpyDtoHAsync(host_.at, device_.at, bytes, session_.stream);
  }

  // There and back again: the bytes are those that were sent.
  void verify(std::size_t bytes) {
    std::uint32_t* words = host_.words();
    for (std::size_t i = 0; i < bytes / 4; ++i) words[i] = pattern(i, static_cast<std::uint32_t>(bytes));
    copy(0, bytes);
    session_.wait();
    std::memset(words, 0, bytes);
    copy(1, bytes);
    session_.wait();
    for (std::size_t i = 0; i < bytes / 4; ++i)
      if (words[i] != pattern(i, static_cast<std::uint32_t>(bytes)))
        throw Failure("Copies to the GPU and back changed the data.");
  }

  const Session& session_;
  PinnedMemory host_;
  DeviceMemory device_;
};

std::string copies(const Session& session, const Request& request, Report& report) {
  std::vector<std::size_t> sizes{4096, 65536, kMebi, 16 * kMebi, 256 * kMebi};
  const std::size_t free = session.free_bytes();
  std::erase_if(sizes, [&](std::size_t bytes) { return bytes > free / 2; });
  if (sizes.empty()) throw Failure("Too little GPU memory is free for copies.");
  if (sizes.size() < 5) report.warn("Little GPU memory is free: the largest copies were not measured.");
  Copies copies(session, sizes.back());
  std::string points;
  for (const std::size_t bytes : sizes) {
    session.watchdog.arm();
    points += (points.empty() ? "" : ",\n  ") + copies.measure(bytes, request.repeats());
  }
  return "[" + points + "]";
}

// GB/s of a kernel that adds up a buffer much larger than the L2 cache; the sum is checked.
std::string memory_reads(const Session& session, const Request& request) {
  const Module module(session, basic_ptx());
  const CUfunction fill = module.function("fill"), read = module.function("read_sum");
  const auto blocks = static_cast<unsigned>(session.attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)) * 8;
  const auto l2 = static_cast<std::size_t>(session.attribute(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE));
  constexpr unsigned kThreads = 256;
  const std::size_t round = std::size_t{8} * 16 * kThreads * blocks;
  auto rounds = static_cast<unsigned>(std::min(4096 * kMebi, session.free_bytes() / 4) / round);
  const std::size_t bytes = round * rounds;
  if (rounds == 0 || bytes < 8 * l2)
    throw Failure("Too little GPU memory is free to measure its read bandwidth.");
  const DeviceMemory data(session, bytes), sum(session, 4);
  const PinnedMemory answer(session, 4);
  std::uint64_t words = bytes / 4;
  std::uint32_t step = 2654435761u;
  CUdeviceptr data_at = data.at, sum_at = sum.at;
  void* fill_arguments[] = {&data_at, &words, &step};
  session.launch(fill, blocks, 1, kThreads, 0, fill_arguments);
  void* arguments[] = {&data_at, &rounds, &sum_at};
  std::vector<double> rates;
  for (int i = 0; i <= request.repeats(); ++i) {  // the first warms up
    session.cuda.cuMemsetD32Async(sum.at, 0, 1, session.stream);
    const double us = session.microseconds([&] { session.launch(read, blocks, 1, kThreads, 0, arguments); });
    session.cuda.cuMemcpyDtoHAsync(answer.at, sum.at, 4, session.stream);
    session.wait();
    if (answer.words()[0] != static_cast<std::uint32_t>(words / 2 * (words - 1)) * step)
      throw Failure("The kernel that reads GPU memory gives a wrong sum on this GPU.");
    if (i) rates.push_back(static_cast<double>(bytes) / us * 1e-3);
  }
  return "{\"gb_per_s\": " + number(median(rates)) + ", \"samples\": " + list(rates) +
         ", \"bytes\": " + std::to_string(bytes) + "}";
}

// 10^12 operations a second of the shape that is fastest here; every shape's results are checked.
std::string matrix_rate(const Session& session, const Request& request, bool int8) {
  if (session.attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) < 8)
    throw Failure("The matrix kernel needs compute capability 8.0 or newer.");
  std::vector<double> best{0};
  double error = 0;
  for (const GemmShape& shape : kGemmShapes) {
    MatrixProduct product(session, int8, shape);
    error = std::max(error, product.check());
    const std::vector<double> rates = product.rates(request.repeats());
    if (median(rates) > median(best)) best = rates;
  }
  return "{\"tflops\": " + number(median(best)) + ", \"samples\": " + list(best) +
         ", \"kernel\": " + quoted(int8 ? "PTX mma.sync.m16n8k32 s8" : "PTX mma.sync.m16n8k16 bf16") +
         ", \"error\": " + number(error) + "}";
}

// A CPU thread that answers every signal; it leaves when told to, whatever the GPU does.
class Answerer {
 public:
  Answerer(volatile std::uint32_t* signal, volatile std::uint32_t* answer, std::uint32_t rounds)
      : thread_([=, this] {
          for (std::uint32_t i = 1; i <= rounds && !stop_; ++i) {
            while (*signal < i && !stop_) __builtin_ia32_pause();
            if (!stop_) *answer = i;
          }
        }) {}
  ~Answerer() {
    stop_ = true;
    thread_.join();
  }

 private:
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

// Microseconds of a round trip GPU -> CPU thread -> GPU: a graph of 48 nodes, each a flag written and one
// awaited in pinned memory. The graph's launch is part of it.
std::string handshake(const Session& session, const Request& request) {
  constexpr std::uint32_t kRounds = 48;
  const PinnedMemory flags(session, 4096);  // two lines far apart: the signal, the answer
  volatile std::uint32_t *signal = flags.words(), *answer = flags.words() + 512;
  Graph graph(session);
  for (std::uint32_t i = 1; i <= kRounds; ++i)
    graph.add_handshake(flags.on_device(), flags.on_device() + 2048, i);
  graph.finish();
  std::vector<double> times;
  session.watchdog.guard(answer);
  try {
    for (int i = 0; i < 3 * request.repeats(); ++i) {
      *signal = 0;
      *answer = 0;
      const Answerer answerer(signal, answer, kRounds);
      const double start = now();
      graph.launch();
      session.wait();
      if (*signal != kRounds) throw Failure("The GPU did not signal all hand-shakes.");
      if (i > 1) times.push_back((now() - start) * 1e6 / kRounds);
    }
  } catch (const Failure&) {
    session.watchdog.release();  // whatever still waits on the GPU comes to its end before the flags go away
    try {
      session.wait(kDrainSeconds);
    } catch (const Failure&) {
    }
    session.watchdog.guard(nullptr);
    throw;
  }
  session.watchdog.guard(nullptr);
  return "{\"us\": " + number(median(times)) + ", \"samples\": " + list(times) + "}";
}

// Microseconds that one more empty kernel takes in a graph: from chains of 100 and of 1100.
std::string launches(const Session& session, const Request& request) {
  const Module module(session, basic_ptx());
  const CUfunction empty = module.function("empty");
  Graph small(session), large(session);
  for (int i = 0; i < 1100; ++i) {
    if (i < 100) small.add_kernel(empty);
    large.add_kernel(empty);
  }
  small.finish();
  large.finish();
  std::vector<double> times;
  for (int i = 0; i <= request.repeats(); ++i) {  // the first warms up
    const double less = session.microseconds([&] { small.launch(); });
    const double more = session.microseconds([&] { large.launch(); });
    if (more <= less) throw Failure("More kernels in a graph took no more time.");
    if (i) times.push_back((more - less) / 1000);
  }
  return "{\"us\": " + number(median(times)) + ", \"samples\": " + list(times) + "}";
}

void identity(const Driver& cuda, CUdevice device, Report& report) {
  char name[256] = {};
  cuda.cuDeviceGetName(name, sizeof name - 1, device);
  std::size_t total = 0;
  cuda.cuDeviceTotalMem(&total, device);
  report.set("name", quoted(name));
  report.set("memory_bytes", std::to_string(total));
  const auto attribute = [&](CUdevice_attribute which) {
    int value = 0;
    cuda.cuDeviceGetAttribute(&value, which, device);
    return std::to_string(value);
  };
  report.set("compute_capability", "[" + attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) + ", " +
                                       attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR) + "]");
  report.set("multiprocessors", attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT));
  report.set("l2_bytes", attribute(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE));
}

void measure(const Driver& cuda, CUdevice device, const Request& request, Report& report) {
  Watchdog watchdog(report);
  std::unique_ptr<Session> session;
  bool silent = false;
  const auto step = [&](const char* field, const std::function<std::string()>& work) {
    watchdog.arm();
    std::string value = "null";
    try {
      if (!session) throw Failure("There is no context.");
      if (silent) throw Failure("Not measured, the GPU had stopped answering.");
      value = work();
    } catch (const Timeout& error) {
      silent = true;
      report.warn(std::string(field) + ": " + error.what());
    } catch (const std::exception& error) {
      report.warn(std::string(field) + ": " + error.what());
    }
    report.set(field, value);
  };
  try {
    session = std::make_unique<Session>(cuda, watchdog, device);
  } catch (const Failure& error) {
    report.warn(std::string("no context: ") + error.what());
  }
  step("free_bytes", [&] { return std::to_string(session->free_bytes()); });
  step("copies", [&] { return copies(*session, request, report); });
  step("reads", [&] { return memory_reads(*session, request); });
  step("bf16", [&] { return matrix_rate(*session, request, false); });
  step("int8", [&] { return matrix_rate(*session, request, true); });
  step("launch", [&] { return launches(*session, request); });
  step("handshake", [&] { return handshake(*session, request); });
  step("joint", [&] { return joint(*session, request); });
  watchdog.arm();
  session.reset();
}

int count(const Driver& cuda, Report& report) {
  if (!cuda.library) {
    report.warn("libcuda.so.1 cannot be loaded.");
    return 0;
  }
  int devices = 0, version = 0;
  const CUresult state = cuda.cuInit.raw(0);
  if (state == CUDA_ERROR_NO_DEVICE) return 0;
  cuda.cuInit.require(state);
  cuda.cuDriverGetVersion(&version);
  cuda.cuDeviceGetCount(&devices);
  report.set("cuda_version", std::to_string(version));
  return devices;
}

int print_ptx(const std::string& which) {
  if (which == "basic") {
    std::fputs(basic_ptx().c_str(), stdout);
  } else {
    std::fputs(GemmPtx(which.starts_with("int8"), kGemmShapes[which.ends_with("2")]).text().c_str(), stdout);
  }
  return 0;
}

std::vector<int> cpu_list(char* text) {
  std::vector<int> cpus;
  for (char* word = std::strtok(text, ","); word; word = std::strtok(nullptr, ","))
    cpus.push_back(std::atoi(word));
  return cpus;
}

int run(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "ptx" && argc == 3) return print_ptx(argv[2]);
  if (!(what == "count" && argc == 2) && !(what == "measure" && (argc == 5 || argc == 6))) {
    std::fprintf(stderr,
                 "usage: gpu_probe count | measure DEVICE MEBIBYTES CPU,CPU,... [quick] | ptx KERNEL\n");
    return 2;
  }
  const Driver cuda;
  Report report;
  int status = 0;
  try {
    const int devices = count(cuda, report);
    report.set("devices", std::to_string(devices));
    if (what == "measure") {
      const Request request{static_cast<std::size_t>(std::atoll(argv[3])) * kMebi, cpu_list(argv[4]),
                            argc == 6};
      if (request.cpus.empty() || std::atoi(argv[2]) >= devices)
        throw Failure("There is no such device or CPU.");
      CUdevice device = 0;
      cuda.cuDeviceGet(&device, std::atoi(argv[2]));
      identity(cuda, device, report);
      measure(cuda, device, request, report);
    }
  } catch (const std::exception& error) {
    report.warn(error.what());
    status = 1;
  }
  report.print();
  return status;
}

}  // namespace
}  // namespace gpu_probe

int main(int argc, char** argv) { return gpu_probe::run(argc, argv); }

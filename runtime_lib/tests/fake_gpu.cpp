#include "fake_gpu.h"

#include <dlfcn.h>
#include <elf.h>
#include <stdlib.h>
#include <xxhash.h>

#include <array>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <stdexcept>

#include "file.h"

namespace hetcomp::fake {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr std::size_t kBytes = FakeGpuArtifact::kWidth * sizeof(float);

void write_text(const fs::path& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

Json ask(int layer, const Json& after) {
  return {{"hand_over", {{"flag", layer}, {"from", "gpu:0"}, {"to", "cpu"}}}, {"after", after}};
}
Json await(int layer, const Json& after) {
  return {{"hand_over", {{"flag", layer}, {"from", "cpu"}, {"to", "gpu:0"}}}, {"after", after}};
}
Json kernel(const std::string& name, const Json& arguments, const Json& after) {
  return {{"kernel", name}, {"grid", {1, 1, 1}}, {"arguments", arguments}, {"after", after}};
}

Json nodes(int layers) {
  const Json width{{"i32", FakeGpuArtifact::kWidth}};
  Json list = Json::array();
  Json last = Json::array();
  for (int layer = 0; layer < layers; ++layer) {
    const int base = static_cast<int>(list.size());
    const std::string x = layer == 0 ? "input" : "x";
    list.push_back(kernel("add_one", {buffer(x), buffer("out"), width}, last));
    list.push_back(ask(layer, {base}));
    list.push_back(
        kernel("scale", {buffer(x), buffer("shared"), width, {{"f32", 2.0}}, {{"i64", -1}}}, last));
    list.push_back(await(layer, {base + 1}));
    list.push_back(kernel("add", {buffer("in"), buffer("shared"), buffer("x"), width}, {base + 2, base + 3}));
    last = {base + 4};
  }
  list.push_back(kernel("add", {buffer("x"), buffer("weight"), buffer("y"), width}, last));
  return list;
}

Json argument(const std::string& name, const std::string& type) { return {{"name", name}, {"type", type}}; }

Json kernel_record(const std::string& name, const Json& arguments, const std::string& sha256) {
  return {{"name", name},
          {"entry", name},
          {"cc", 90},
          {"file", "sm_90/a.cubin"},
          {"sha256", sha256},
          {"num_warps", 4},
          {"shared_bytes", 0},
          {"global_scratch_bytes", name == "scale" ? kBytes : 0},
          {"arguments", arguments}};
}

float weight(std::size_t i) { return static_cast<float>(i % 5); }

Json weight_source(const fs::path& path) {
  std::array<float, FakeGpuArtifact::kWidth> values{};
  for (std::size_t i = 0; i < FakeGpuArtifact::kWidth; ++i) values[i] = weight(i);
  std::string bytes(64 + kBytes, '\0');
  std::memcpy(bytes.data() + 64, values.data(), kBytes);
  write_text(path / "weights.safetensors", bytes);
  std::array<char, 17> hash{};
  std::snprintf(hash.data(), hash.size(), "%016llx",
                static_cast<unsigned long long>(XXH3_64bits(values.data(), kBytes)));
  return {{{"file", "weights.safetensors"},
           {"offset", 64},
           {"bytes", kBytes},
           {"to", 0},
           {"xxh3_64", hash.data()}}};
}

template <class Entry>
Entry fake_cuda_entry(const char* name) {
  void* library = dlopen(FAKE_CUDA, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
  return reinterpret_cast<Entry>(dlsym(library, name));
}

}  // namespace

FakeCuda& healthy_fake_cuda() {
  FakeCuda& fake = *fake_cuda_entry<FakeCuda* (*)()>("fake_cuda")();
  fake.version = 12040;
  fake.devices = 1;
  fake.compute_capability = 90;
  fake.free_bytes = std::size_t{1} << 30;
  fake.taken_of_others = 0;
  fake.out_of_memory = false;
  fake.memory_operations = fake.memory_mapping = true;
  fake.most_pinned = SIZE_MAX;
  fake.fail_call = 0;
  fake.fail_result = 999;
  fake.calls = 0;
  fake.hang = fake.reverse = false;
  return fake;
}

void set_foreign_kernels(FakeCudaModuleLoader loader, FakeCudaLauncher launcher) {
  fake_cuda_entry<decltype(&fake_cuda_set_module_loader)>("fake_cuda_set_module_loader")(loader);
  fake_cuda_entry<decltype(&fake_cuda_set_launcher)>("fake_cuda_set_launcher")(launcher);
}

void write_cubin(const fs::path& file, const std::string& names) {
  Elf64_Ehdr header{};
  std::memcpy(header.e_ident, ELFMAG, SELFMAG);
  header.e_ident[EI_CLASS] = ELFCLASS64;
  header.e_ident[EI_DATA] = ELFDATA2LSB;
  header.e_machine = 190;
  std::string bytes(sizeof header, '\0');
  std::memcpy(bytes.data(), &header, sizeof header);
  write_text(file, bytes + names + '\0');
}

FakeGpuArtifact::FakeGpuArtifact(int layers) : layers_(layers) {
  std::string name = (fs::temp_directory_path() / "hetcomp-XXXXXX").string();
  if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("no temporary folder");
  path_ = name;
  fs::create_directories(path_ / "gpu" / "sm_90");
  const fs::path cubin = path_ / "gpu" / "sm_90" / "a.cubin";
  write_cubin(cubin, "add_one add scale gather fault");
  const std::string hash = File(cubin).sha256();
  const Json x = argument("x", "ptr");
  const Json y = argument("y", "ptr");
  const Json n = argument("n", "i32");
  write("kernels.json",
        {{"schema", {1, 0}},
         {"kernels",
          {kernel_record("add_one", {x, y, n}, hash),
           kernel_record("add", {argument("a", "ptr"), x, y, n}, hash),
           kernel_record("scale", {x, y, n, argument("factor", "f32"), argument("shift", "i64")}, hash),
           kernel_record("gather",
                         {argument("table", "ptr"), argument("slots", "ptr"), argument("sums", "ptr"),
                          argument("experts", "i32"), argument("width", "i32")},
                         hash),
           kernel_record("fault", Json::array({x}), hash)}}});
  Json buffers = Json::array();
  for (const auto& [buffer_name, kind] : {std::pair{"input", "step"},
                                          {"x", "arena"},
                                          {"shared", "arena"},
                                          {"out", "pinned_out"},
                                          {"in", "pinned_in"},
                                          {"y", "pinned_out"},
                                          {"cache", "state"}})
    buffers.push_back({{"name", buffer_name}, {"bytes", kBytes}, {"kind", kind}});
  buffers.push_back(
      {{"name", "weight"}, {"bytes", kBytes}, {"kind", "weight"}, {"sources", weight_source(path_)}});
  Json graphs = Json::array();
  for (const int batch : {1, 2})
    graphs.push_back({{"batch", batch}, {"exact", true}, {"nodes", nodes(batch == 1 ? layers : 0)}});
  write("program.json", {{"schema", {5, 0}},
                         {"device", "gpu:0"},
                         {"device_bytes", 1 << 20},
                         {"flags", layers},
                         {"buffers", buffers},
                         {"graphs", graphs}});
}

FakeGpuArtifact::~FakeGpuArtifact() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

Json FakeGpuArtifact::read(const std::string& name) const {
  return Json::parse(File(path_ / "gpu" / name).text());
}
void FakeGpuArtifact::write(const std::string& name, const Json& json) const {
  write_text(path_ / "gpu" / name, json.dump(1));
}

namespace {

std::span<float> floats(const gpu::ProgramSet& program, const std::string& name) {
  const std::span<std::byte> bytes = program.host(name);
  return {reinterpret_cast<float*>(bytes.data()), bytes.size() / sizeof(float)};
}

}  // namespace

void FakeGpuArtifact::compute(const gpu::ProgramSet& program, int) {
  const std::span<float> out = floats(program, "out");
  const std::span<float> in = floats(program, "in");
  for (std::size_t i = 0; i < FakeGpuArtifact::kWidth; ++i) in[i] = 3 * out[i];
}

void FakeGpuArtifact::answer_all(const gpu::ProgramSet& program, gpu::HandShake& hand_shake) const {
  for (int layer = 0; layer < layers_; ++layer) {
    if (!hand_shake.wait_for_gpu(static_cast<std::uint32_t>(layer))) return;
    compute(program, layer);
    hand_shake.answer(static_cast<std::uint32_t>(layer));
  }
}

bool FakeGpuArtifact::step_is_right(gpu::ProgramSet& program, float first, std::int32_t batch) const {
  const std::span<float> input = floats(program, "input");
  for (std::size_t i = 0; i < FakeGpuArtifact::kWidth; ++i) input[i] = first + static_cast<float>(i);
  // Batch size 2 has no layers: it adds the weight to what x still holds.
  program.run(batch, [&](gpu::HandShake& hand_shake) {
    if (batch == 1) answer_all(program, hand_shake);
  });
  const std::span<float> y = floats(program, "y");
  for (std::size_t i = 0; i < FakeGpuArtifact::kWidth; ++i) {
    float x = first + static_cast<float>(i);
    for (int layer = 0; layer < layers_; ++layer) x = 3 * (x + 1) + (2 * x - 1);
    if (y[i] != x + weight(i)) return false;
  }
  return true;
}

}  // namespace hetcomp::fake

#include "program_buffers.h"

#include <xxhash.h>

#include "../file.h"
#include "../memory.h"
#include "../status.h"

namespace hetcomp::gpu {
namespace {

constexpr std::uint64_t kAlignment = 256;  // as cuMemAlloc gives

bool is_step(BufferKind kind) { return kind == BufferKind::kStep; }
bool is_pinned(BufferKind kind) { return kind == BufferKind::kPinnedIn || kind == BufferKind::kPinnedOut; }
std::uint64_t aligned(std::uint64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

std::uint64_t bytes_together(const GpuProgramRecord& program, bool step) {
  std::uint64_t bytes = 0;
  for (const BufferRecord& buffer : program.buffers) {
    if (step ? is_step(buffer.kind) : is_pinned(buffer.kind)) bytes += aligned(buffer.bytes);
    if (bytes > std::numeric_limits<std::uint64_t>::max() / 4)
      throw Error(HETCOMP_OUT_OF_MEMORY,
                  "The buffers between CPU and GPU are larger than the address space.");
  }
  return bytes;
}

// A file that buffers are filled from, mapped.
class SourceFile {
 public:
  SourceFile(const std::filesystem::path& artifact, const std::string& name)
      : SourceFile(File(inside(artifact, name))) {}

  const std::uint8_t* piece(const BufferSource& source, const std::string& buffer, bool verify) const {
    if (source.offset > size_ || source.bytes > size_ - source.offset) {
      throw Error(HETCOMP_BAD_ARTIFACT, path_ + " has " + std::to_string(size_) + " bytes, " + buffer +
                                            " lies beyond: truncated or replaced; copy the artifact anew.");
    }
    const std::uint8_t* data = map_.data() + source.offset;
    if (verify && XXH3_64bits(data, source.bytes) != source.xxh3_64) {
      throw Error(HETCOMP_BAD_ARTIFACT,
                  buffer + " in " + path_ +
                      " does not have the hash in program.json: it is damaged; copy the "
                      "artifact anew.");
    }
    return data;
  }

 private:
  explicit SourceFile(const File& file) : path_(file.path().string()), size_(file.size()), map_(file) {}

  std::string path_;
  std::uint64_t size_;
  MappedFile map_;
};

}  // namespace

ProgramBuffers::ProgramBuffers(const CudaDriver& driver, const Device& device,
                               const std::filesystem::path& artifact, const GpuProgramRecord& program,
                               DeviceBudget& budget, CUstream stream, bool verify)
    : driver_(driver), addresses_(program.buffers.size()), host_(program.buffers.size()) {
  for (std::size_t i = 0; i < program.buffers.size(); ++i) {
    const BufferRecord& buffer = program.buffers[i];
    if (is_step(buffer.kind) || is_pinned(buffer.kind)) continue;
    if (buffer.cache && buffer.cache->granules > 0) {
      cache_ = std::make_unique<CacheMemory>(driver, device, budget, buffer.bytes, *buffer.cache);
      addresses_[i] = cache_->address();
      continue;
    }
    memories_.emplace_back(driver, budget, stream, buffer.bytes, "the buffer " + buffer.name);
    addresses_[i] = memories_.back().address();
  }
  if (const std::uint64_t bytes = bytes_together(program, true); bytes > 0) {
    step_ = DeviceMemory(driver, budget, stream, bytes, "a step's inputs");
    step_host_ = PinnedMemory(driver, bytes, "a step's inputs");
    place_together(program, true, step_.address(), step_host_.bytes());
  }
  if (const std::uint64_t bytes = bytes_together(program, false); bytes > 0) {
    pinned_ = PinnedMemory(driver, bytes, "what CPU and GPU hand to each other");
    place_together(program, false, pinned_.address(), pinned_.bytes());
  }
  load(artifact, program, stream, verify);
}

void ProgramBuffers::place_together(const GpuProgramRecord& program, bool step, CUdeviceptr base,
                                    std::span<std::byte> host) {
  std::uint64_t at = 0;
  for (std::size_t i = 0; i < program.buffers.size(); ++i) {
    const BufferRecord& buffer = program.buffers[i];
    if (!(step ? is_step(buffer.kind) : is_pinned(buffer.kind))) continue;
    addresses_[i] = base + at;
    host_[i] = host.subspan(at, buffer.bytes);
    at += aligned(buffer.bytes);
  }
}

void ProgramBuffers::load(const std::filesystem::path& artifact, const GpuProgramRecord& program,
                          CUstream stream, bool verify) {
  std::map<std::string, SourceFile> files;
  try {
    for (std::size_t i = 0; i < program.buffers.size(); ++i) {
      for (const BufferSource& source : program.buffers[i].sources) {
        auto found = files.find(source.file);
        if (found == files.end()) found = files.emplace(source.file, SourceFile(artifact, source.file)).first;
        const std::uint8_t* data = found->second.piece(source, program.buffers[i].name, verify);
        driver_.copy_to_device(addresses_[i] + source.to, data, source.bytes, stream);
      }
    }
    driver_.stream_synchronize(stream);
  } catch (...) {
    driver_.stream_synchronize.raw(stream);  // the files must stay mapped until the last byte has left them
    throw;
  }
}

void ProgramBuffers::send_step(CUstream stream) const {
  const std::span<std::byte> host = step_host_.bytes();
  if (!host.empty()) driver_.copy_to_device(step_.address(), host.data(), host.size(), stream);
}

}  // namespace hetcomp::gpu

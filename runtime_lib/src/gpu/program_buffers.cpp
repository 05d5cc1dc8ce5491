#include "program_buffers.h"

#include <xxhash.h>

#include <algorithm>
#include <thread>

#include "../file.h"
#include "../mapped_file.h"
#include "../status.h"

namespace hetcomp::gpu {
namespace {

bool is_step(BufferKind kind) { return kind == BufferKind::kStep; }

// A file that buffers are filled from, mapped.
class SourceFile {
 public:
  SourceFile(const std::filesystem::path& artifact, const std::string& name) : map_(inside(artifact, name)) {}

  const std::uint8_t* piece(const BufferSource& source, const std::string& buffer, bool verify) {
    const std::string path = map_.path().string();
    if (source.offset > map_.size() || source.bytes > map_.size() - source.offset) {
      throw Error(HETCOMP_BAD_ARTIFACT, path + " has " + std::to_string(map_.size()) + " bytes, " + buffer +
                                            " lies beyond: truncated or replaced; copy the artifact anew.");
    }
    const std::uint8_t* data = map_.data() + source.offset;
    const bool as_written = !verify || XXH3_64bits(data, source.bytes) == source.xxh3_64;
    require_good();
    if (!as_written) {
      throw Error(HETCOMP_BAD_ARTIFACT,
                  buffer + " in " + path +
                      " does not have the hash in program.json: it is damaged; copy the "
                      "artifact anew.");
    }
    return data;
  }
  // Throws Error if a read of it failed. Nobody may be reading.
  void require_good() {
    if (map_.fault()) map_.refuse("What a GPU's buffers are filled with");
  }

 private:
  MappedFile map_;
};

}  // namespace

ProgramBuffers::ProgramBuffers(const CudaDriver& driver, const Device& device,
                               const std::filesystem::path& artifact, const GpuProgramRecord& program,
                               const SharedMemory& shared, DeviceBudget& budget, CUstream stream, bool verify)
    : driver_(driver), addresses_(program.buffers.size()), host_(program.buffers.size()) {
  for (std::size_t i = 0; i < program.buffers.size(); ++i) {
    const BufferRecord& buffer = program.buffers[i];
    if (is_step(buffer.kind)) continue;
    if (is_pinned(buffer.kind)) {
      addresses_[i] = shared.address(buffer.name);
      continue;
    }
    if (buffer.cache && buffer.cache->granules > 0) {
      cache_ = std::make_unique<CacheMemory>(driver, device, budget, buffer.bytes, *buffer.cache);
      addresses_[i] = cache_->address();
      continue;
    }
    memories_.emplace_back(driver, budget, stream, buffer.bytes, "the buffer " + buffer.name);
    addresses_[i] = memories_.back().address();
  }
  place_step(program, budget, stream);
  load(artifact, program, stream, verify);
}

void ProgramBuffers::place_step(const GpuProgramRecord& program, DeviceBudget& budget, CUstream stream) {
  std::uint64_t end = 0;
  for (std::size_t i = 0; i < program.buffers.size(); ++i) {
    if (!is_step(program.buffers[i].kind)) continue;
    addresses_[i] = end;
    end += allocated(program.buffers[i].bytes);
    if (end > std::numeric_limits<std::uint64_t>::max() / 4)
      throw Error(HETCOMP_OUT_OF_MEMORY, "A step's inputs are larger than the address space.");
  }
  if (end == 0) return;
  step_ = DeviceMemory(driver_, budget, stream, end, "a step's inputs");
  step_host_ = PinnedMemory(driver_, end, "a step's inputs");
  for (std::size_t i = 0; i < program.buffers.size(); ++i) {
    if (!is_step(program.buffers[i].kind)) continue;
    host_[i] = step_host_.bytes().subspan(addresses_[i], program.buffers[i].bytes);
    addresses_[i] += step_.address();
  }
}

void ProgramBuffers::load(const std::filesystem::path& artifact, const GpuProgramRecord& program,
                          CUstream stream, bool verify) {
  std::map<std::string, SourceFile> files;
  const SourceFiles sources(program.sources);
  try {
    for (std::size_t i = 0; i < program.buffers.size(); ++i) {
      for (const BufferSource& source : program.buffers[i].sources) {
        if (source.stored) {
          load_stored(source, program.buffers[i].name, addresses_[i] + source.to, sources, stream, verify);
          continue;
        }
        auto found = files.find(source.file);
        if (found == files.end()) found = files.emplace(source.file, SourceFile(artifact, source.file)).first;
        const std::uint8_t* data = found->second.piece(source, program.buffers[i].name, verify);
        driver_.copy_to_device(addresses_[i] + source.to, data, source.bytes, stream);
      }
    }
    driver_.stream_synchronize(stream);
    for (auto& [name, file] : files) file.require_good();
  } catch (...) {
    driver_.stream_synchronize.raw(stream);  // the files must stay mapped until the last byte has left them
    throw;
  }
}

void ProgramBuffers::load_stored(const BufferSource& source, const std::string& buffer, CUdeviceptr to,
                                 const SourceFiles& sources, CUstream stream, bool verify) {
  const StoredReader reader(*source.stored, sources);
  std::vector<std::uint8_t> weight(source.bytes);
  const auto threads = static_cast<std::int32_t>(std::max(1U, std::thread::hardware_concurrency()));
  read_stored(reader, "A weight of the buffer " + buffer, weight, verify, source.xxh3_64, threads);
  driver_.copy_to_device(to, weight.data(), weight.size(), stream);
  driver_.stream_synchronize(stream);  // before its memory goes
}

void ProgramBuffers::send_step(CUstream stream) const {
  const std::span<std::byte> host = step_host_.bytes();
  if (!host.empty()) driver_.copy_to_device(step_.address(), host.data(), host.size(), stream);
}

}  // namespace hetcomp::gpu

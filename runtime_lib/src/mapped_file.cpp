#include "mapped_file.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <span>

#include "status.h"

namespace hetcomp {
namespace {

std::uint8_t* map(const File& file, void* place, int flags) {
  void* const data = mmap(place, file.size(), PROT_READ, MAP_SHARED | flags, file.descriptor(), 0);
  return data == MAP_FAILED ? nullptr : static_cast<std::uint8_t*>(data);
}

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path) : file_(path), map_(nullptr, {file_.size()}) {
  if (file_.size() > 0) {
    map_.reset(map(file_, nullptr, 0));
    if (!map_) throw Error(HETCOMP_IO, "Cannot map " + path.string() + ": " + std::strerror(errno) + ".");
  }
  watch_ = std::make_unique<WatchedMapping>(std::span(map_.get(), file_.size()));
}

MappedFile::~MappedFile() { watch_.reset(); }

void MappedFile::Unmap::operator()(const std::uint8_t* data) const {
  munmap(const_cast<std::uint8_t*>(data), size);
}

std::string MappedFile::reason(std::uint64_t offset) const {
  struct stat now{};
  if (fstat(file_.descriptor(), &now) != 0) return std::strerror(errno);
  if (static_cast<std::uint64_t>(now.st_size) < file_.size())
    return "the file was cut to " + std::to_string(now.st_size) + " of its " + std::to_string(file_.size()) +
           " bytes";
  std::byte byte{};
  if (pread(file_.descriptor(), &byte, 1, static_cast<off_t>(offset)) < 0) return std::strerror(errno);
  return "the system reported an error, and none any more";
}

void MappedFile::refuse(const std::string& what) {
  const std::uint64_t offset = fault().value();
  const std::string why = reason(offset);
  // Where the system has no room for the mapping, the fault stands and the next reader is told again.
  if (map(file_, const_cast<std::uint8_t*>(map_.get()), MAP_FIXED) != nullptr) watch_->forget();
  throw Error(HETCOMP_IO,
              what + " in " + path().string() + " could not be read at byte " + std::to_string(offset) +
                  ": " + why +
                  "; nothing computed from it is kept, and the next request reads the file again: "
                  "put it right, or load an intact copy of the artifact.");
}

}  // namespace hetcomp

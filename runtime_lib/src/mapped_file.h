// A whole file, mapped for reading, whose reads may fail without ending the process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>

#include "file.h"
#include "read_faults.h"

namespace hetcomp {

class MappedFile {
 public:
  // Throws Error.
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(MappedFile&&) noexcept = default;
  MappedFile& operator=(MappedFile&&) = delete;

  const std::uint8_t* data() const { return map_.get(); }
  std::size_t size() const { return file_.size(); }
  const std::filesystem::path& path() const { return file_.path(); }

  // Offset of the first byte that could not be read since refuse() was called last: what was read since then
  // is void. None: all reads were good.
  std::optional<std::uint64_t> fault() const { return watch_->fault(); }
  // After a fault: maps the file again, so that later reads see it as it is then, and throws
  // Error(HETCOMP_IO). what: lies at the fault, for the sentence. Nobody may be reading.
  [[noreturn]] void refuse(const std::string& what);

 private:
  struct Unmap {
    std::size_t size;
    void operator()(const std::uint8_t* data) const;
  };

  std::string reason(std::uint64_t offset) const;

  File file_;
  std::unique_ptr<const std::uint8_t, Unmap> map_;
  std::unique_ptr<WatchedMapping> watch_;  // at an address that does not change
};

}  // namespace hetcomp

// Files outside of an artifact that its weights are taken from: those that it was compiled from.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "checked_json.h"
#include "file.h"

namespace hetcomp {

// As the file was when the artifact was compiled.
struct SourceRecord {
  std::string path;  // absolute
  std::uint64_t bytes;
  std::int64_t mtime_ns;

  // The value of "sources", if there is one. Throws Error.
  static std::vector<SourceRecord> parse(const CheckedJson& root);
};

// Opened files.
class SourceFiles {
 public:
  // Throws Error naming a file that is not there or has another size.
  explicit SourceFiles(const std::vector<SourceRecord>& records);

  const File& operator[](std::size_t source) const { return files_[source]; }
  // Whether it was written, or replaced, since: then its bytes must be looked at.
  bool touched(std::size_t source) const { return touched_[source]; }

 private:
  std::vector<File> files_;
  std::vector<bool> touched_;
};

}  // namespace hetcomp

#include "source_files.h"

#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <limits>

#include "status.h"

namespace hetcomp {
namespace {

constexpr std::int64_t kNanoseconds = 1'000'000'000;

constexpr const char* kAdvice =
    "; put the file back as it was, or compile the model again (--weights packed makes it independent of the "
    "file).";

// FIFOs and devices are refused before they are opened, which could wait, or do something.
struct stat examined(const std::string& path) {
  struct stat info{};
  if (stat(path.c_str(), &info) != 0)
    throw Error(errno == ENOENT ? HETCOMP_NOT_FOUND : HETCOMP_IO, "The weights of this artifact are in " +
                                                                      path + ", which cannot be read (" +
                                                                      std::strerror(errno) + ")" + kAdvice);
  if (!S_ISREG(info.st_mode)) throw Error(HETCOMP_BAD_ARTIFACT, path + " is not a regular file" + kAdvice);
  return info;
}

}  // namespace

std::vector<SourceRecord> SourceRecord::parse(const CheckedJson& root) {
  constexpr auto kLargest = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  std::vector<SourceRecord> records;
  if (!root.has("sources")) return records;
  for (const CheckedJson& node : root["sources"].elements()) {
    SourceRecord record{node["path"].text(), node["bytes"].number(1, kLargest),
                        node["mtime_ns"].integer(std::numeric_limits<std::int64_t>::min(),
                                                 std::numeric_limits<std::int64_t>::max())};
    if (!record.path.starts_with('/') || record.path.find('\0') != std::string::npos)
      node["path"].refuse("an absolute path");
    records.push_back(std::move(record));
  }
  return records;
}

SourceFiles::SourceFiles(const std::vector<SourceRecord>& records) {
  for (const SourceRecord& record : records) {
    const struct stat info = examined(record.path);
    if (static_cast<std::uint64_t>(info.st_size) != record.bytes)
      throw Error(HETCOMP_BAD_ARTIFACT, record.path + " has " + std::to_string(info.st_size) +
                                            " bytes, and had " + std::to_string(record.bytes) +
                                            " when the model was compiled from it" + kAdvice);
    files_.emplace_back(record.path);
    touched_.push_back(info.st_mtim.tv_sec != record.mtime_ns / kNanoseconds ||
                       info.st_mtim.tv_nsec != record.mtime_ns % kNanoseconds);
  }
}

}  // namespace hetcomp

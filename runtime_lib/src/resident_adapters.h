// The adapters of a model by name: those in memory, and those that had to make room.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "adapter.h"

namespace hetcomp {

// Thread safe. Files are read while no lock is held: steps and other adapters go on.
class ResidentAdapters {
 public:
  static constexpr std::size_t kMost = 32;
  // Keeps an adapter in memory and from being unloaded.
  using Use = std::shared_ptr<const Adapter>;

  // Gets an adapter ready before anybody can use it, once it is alone to do so; false: another one must make
  // room first. Throws Error: it never can.
  using Prepare = std::function<bool(Adapter&)>;

  // All must outlive it. gpus: those that have room for adapters.
  ResidentAdapters(const Manifest& manifest, const hetcomp_program& program, std::vector<GpuAdaptable> gpus,
                   Prepare prepare)
      : manifest_(manifest), program_(program), gpus_(std::move(gpus)), prepare_(std::move(prepare)) {}

  // Reads a file. Where kMost adapters are in memory, or there is no room for this one, the one whose last
  // use is longest ago makes room, among those that nobody uses. Throws Error: the name is taken, the file is
  // refused, all are in use.
  void load(const std::filesystem::path& file, const std::string& name);
  // Forgets it. Throws Error if there is none of that name, or if it is in use.
  void unload(const std::string& name);
  // Counts as use. One that made room is read again; throws Error as load(), also if its file has changed, or
  // if there is none of that name.
  Use use(const std::string& name);
  // [{"name", "file", "resident", "bytes", "rank", "weights", "sha256", "sessions"}]
  std::string json() const;

 private:
  struct Entry {
    std::filesystem::path file;
    std::string sha256;
    Use adapter;  // null: it made room
    std::uint64_t last_use;
  };

  Entry& find(const std::string& name);
  void prepare(Adapter& adapter, const std::string& name);

  const Manifest& manifest_;
  const hetcomp_program& program_;
  const std::vector<GpuAdaptable> gpus_;
  const Prepare prepare_;
  mutable std::mutex mutex_;
  std::map<std::string, Entry> entries_;
  std::uint64_t uses_ = 0;
};

}  // namespace hetcomp

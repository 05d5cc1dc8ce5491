#include "resident_adapters.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <ranges>

#include "status.h"

namespace hetcomp {
namespace {

// Who else has it besides its entry. New owners appear only under the lock; one that goes meanwhile makes the
// answer too large, never too small.
long users(const ResidentAdapters::Use& adapter) { return adapter ? adapter.use_count() - 1 : 0; }

}  // namespace

ResidentAdapters::Entry& ResidentAdapters::find(const std::string& name) {
  const auto found = entries_.find(name);
  if (found != entries_.end()) return found->second;
  std::string known;
  for (const auto& entry : entries_) known += (known.empty() ? "" : ", ") + entry.first;
  throw Error(HETCOMP_NOT_FOUND, "There is no adapter " + name + (known.empty() ? "" : " among " + known) +
                                     ": load it first (hetcomp_adapter_load).");
}

void ResidentAdapters::prepare(Adapter& adapter, const std::string& name) {
  while (true) {
    std::size_t resident = 0;
    Entry* oldest = nullptr;
    for (Entry& entry : entries_ | std::views::values) {
      if (!entry.adapter) continue;
      ++resident;
      if (users(entry.adapter) > 0) continue;
      if (oldest == nullptr || entry.last_use < oldest->last_use) oldest = &entry;
    }
    if (resident < kMost && prepare_(adapter)) return;
    if (oldest == nullptr)
      throw Error(HETCOMP_NO_FREE_SLOT, "There is no room for the adapter " + name + ": all " +
                                            std::to_string(resident) +
                                            " adapters in memory are in use by sessions; free one.");
    oldest->adapter.reset();
  }
}

void ResidentAdapters::load(const std::filesystem::path& file, const std::string& name) {
  const auto check_name = [&] {
    if (name.empty()) throw Error(HETCOMP_INVALID_ARGUMENT, "An adapter's name must not be empty.");
    if (entries_.contains(name))
      throw Error(HETCOMP_INVALID_ARGUMENT,
                  "There is an adapter " + name + " already: unload it first, or choose another name.");
  };
  {
    const std::lock_guard lock(mutex_);
    check_name();
  }
  const auto adapter = std::make_shared<Adapter>(file, manifest_, program_, gpus_);
  const std::lock_guard lock(mutex_);
  check_name();
  prepare(*adapter, name);
  std::error_code ignored;
  const std::filesystem::path absolute = std::filesystem::absolute(file, ignored);
  entries_[name] = {absolute.empty() ? file : absolute, adapter->sha256(), adapter, ++uses_};
}

void ResidentAdapters::unload(const std::string& name) {
  const std::lock_guard lock(mutex_);
  if (const long sessions = users(find(name).adapter); sessions > 0)
    throw Error(HETCOMP_INVALID_ARGUMENT,
                "The adapter " + name + " is in use by " + std::to_string(sessions) +
                    (sessions == 1 ? " session" : " sessions") + ": give them another, or free them, first.");
  entries_.erase(name);
}

ResidentAdapters::Use ResidentAdapters::use(const std::string& name) {
  std::filesystem::path file;
  {
    const std::lock_guard lock(mutex_);
    Entry& entry = find(name);
    entry.last_use = ++uses_;
    if (entry.adapter) return entry.adapter;
    file = entry.file;
  }
  const auto again = std::make_shared<Adapter>(file, manifest_, program_, gpus_);
  const std::lock_guard lock(mutex_);
  Entry& entry = find(name);
  if (entry.adapter) return entry.adapter;  // somebody else was faster
  if (again->sha256() != entry.sha256)
    throw Error(HETCOMP_BAD_ARTIFACT, file.string() + " holds another adapter than when " + name +
                                          " was loaded from it: unload the name and load it again.");
  prepare(*again, name);
  entry.adapter = again;
  return entry.adapter;
}

std::string ResidentAdapters::json() const {
  const std::lock_guard lock(mutex_);
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const auto& [name, entry] : entries_) {
    nlohmann::ordered_json one{{"name", name},
                               {"file", entry.file.string()},
                               {"resident", entry.adapter != nullptr},
                               {"sha256", entry.sha256},
                               {"sessions", users(entry.adapter)}};
    if (entry.adapter) {
      one["bytes"] = entry.adapter->bytes();
      one["rank"] = entry.adapter->rank();
      one["weights"] = entry.adapter->weights();
    }
    list.push_back(std::move(one));
  }
  return list.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace hetcomp

// Weights that lie in mapped files and may not be in memory.
#pragma once

#include <sys/mman.h>

#include <cstdint>

namespace hetcomp {

// madvise() for all pages of these bytes. The system may decline, and then reads pages when they are touched.
inline void advise_pages(const std::uint8_t* data, std::int64_t bytes, int advice) {
  constexpr std::uintptr_t kPage = 4096;
  const auto begin = reinterpret_cast<std::uintptr_t>(data) / kPage * kPage;
  const auto end = reinterpret_cast<std::uintptr_t>(data) + static_cast<std::uintptr_t>(bytes);
  madvise(reinterpret_cast<void*>(begin), end - begin, advice);
}

// Has the system begin to read those that it has not in memory.
inline void fetch_pages(const std::uint8_t* data, std::int64_t bytes) {
  advise_pages(data, bytes, MADV_WILLNEED);
}

}  // namespace hetcomp

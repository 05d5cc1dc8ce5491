#include "status.h"

#include <array>
#include <cstdio>

namespace hetcomp {

std::string in_words(std::size_t bytes) {
  struct Unit {
    double size;
    const char* name;
  };
  constexpr std::array units{Unit{1e9, "GB"}, Unit{1e6, "MB"}, Unit{1e3, "KB"}};
  std::array<char, 48> text{};
  for (const Unit& unit : units) {
    if (static_cast<double>(bytes) < unit.size) continue;
    std::snprintf(text.data(), text.size(), "%.1f %s", static_cast<double>(bytes) / unit.size, unit.name);
    return text.data();
  }
  std::snprintf(text.data(), text.size(), "%zu bytes", bytes);
  return text.data();
}

}  // namespace hetcomp

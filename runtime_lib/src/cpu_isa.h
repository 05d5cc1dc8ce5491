// Which of the instruction sets that hetcomp compiles for this CPU and its operating system have.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace hetcomp {

// Weakest first: "avx2" (x86-64-v3), "avx512" (x86-64-v4).
std::vector<std::string> available_isas();

bool contains(const std::vector<std::string>& isas, std::string_view isa);

}  // namespace hetcomp

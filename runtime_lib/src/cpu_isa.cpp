#include "cpu_isa.h"

#include <algorithm>
#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace hetcomp {
namespace {

#if defined(__x86_64__)

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf = 0) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
  return r;
}

bool all(unsigned value, unsigned bits) { return (value & bits) == bits; }

// The register state that the operating system saves (XCR0); 0 without OSXSAVE.
std::uint64_t saved_state(const Registers& leaf1) {
  if (!all(leaf1.c, bit_OSXSAVE)) return 0;
  std::uint32_t low = 0;
  std::uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (std::uint64_t{high} << 32) | low;
}

// The feature lists are those of the x86-64 psABI micro-architecture levels.
std::vector<std::string> detect() {
  const Registers leaf1 = cpuid(1);
  const Registers leaf7 = cpuid(7);
  const Registers extended = cpuid(0x80000001U);
  const std::uint64_t state = saved_state(leaf1);
  constexpr std::uint64_t kYmm = 0x6;   // SSE and AVX state
  constexpr std::uint64_t kZmm = 0xe6;  // and opmask, upper ZMM, ZMM16-31
  std::vector<std::string> isas;
  const bool v3 = (state & kYmm) == kYmm && all(leaf1.c, bit_AVX | bit_FMA | bit_F16C | bit_MOVBE) &&
                  all(leaf7.b, bit_AVX2 | bit_BMI | bit_BMI2) && all(extended.c, bit_LZCNT);
  if (!v3) return isas;
  isas.emplace_back("avx2");
  const bool v4 = (state & kZmm) == kZmm &&
                  all(leaf7.b, bit_AVX512F | bit_AVX512BW | bit_AVX512CD | bit_AVX512DQ | bit_AVX512VL);
  if (v4) isas.emplace_back("avx512");
  return isas;
}

#else

std::vector<std::string> detect() { return {}; }

#endif

}  // namespace

std::vector<std::string> available_isas() { return detect(); }

bool contains(const std::vector<std::string>& isas, std::string_view isa) {
  return std::find(isas.begin(), isas.end(), isa) != isas.end();
}

}  // namespace hetcomp

#include "cpu_isa.h"

#include <algorithm>
#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
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

// Tiles are 8 KB of state that Linux (5.16 and later) gives to processes that ask
// (Documentation/arch/x86/xstate.rst).
bool tiles_permitted() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// The feature lists are those of the x86-64 psABI micro-architecture levels and of hetcomp's
// backends/protocol.py.
std::vector<std::string> detect() {
  const Registers leaf1 = cpuid(1);
  const Registers leaf7 = cpuid(7);
  const Registers leaf7_1 = cpuid(7, 1);
  const Registers extended = cpuid(0x80000001U);
  const std::uint64_t state = saved_state(leaf1);
  constexpr std::uint64_t kYmm = 0x6;                            // SSE and AVX state
  constexpr std::uint64_t kZmm = 0xe6;                           // and opmask, upper ZMM, ZMM16-31
  constexpr std::uint64_t kTiles = 0x60000;                      // tile configuration and data
  constexpr unsigned kAvxVnni = 1U << 4, kAvx512Bf16 = 1U << 5;  // leaf 7.1, eax
  constexpr unsigned kAvx512Vnni = 1U << 11;                     // leaf 7, ecx
  constexpr unsigned kAmxBf16 = 1U << 22, kAmxTile = 1U << 24;   // leaf 7, edx
  std::vector<std::string> isas;
  const bool v3 = (state & kYmm) == kYmm && all(leaf1.c, bit_AVX | bit_FMA | bit_F16C | bit_MOVBE) &&
                  all(leaf7.b, bit_AVX2 | bit_BMI | bit_BMI2) && all(extended.c, bit_LZCNT);
  if (!v3) return isas;
  isas.emplace_back("avx2");
  const bool v4 = (state & kZmm) == kZmm &&
                  all(leaf7.b, bit_AVX512F | bit_AVX512BW | bit_AVX512CD | bit_AVX512DQ | bit_AVX512VL);
  if (all(leaf7_1.a, kAvxVnni)) isas.emplace_back("avx_vnni");
  if (!v4) return isas;
  isas.emplace_back("avx512");
  if (!all(leaf7.c, kAvx512Vnni)) return isas;
  isas.emplace_back("avx512_vnni");
  if (!all(leaf7_1.a, kAvx512Bf16)) return isas;
  isas.emplace_back("avx512_bf16");
  if (all(leaf7.d, kAmxBf16 | kAmxTile) && (state & kTiles) == kTiles && tiles_permitted())
    isas.emplace_back("amx_bf16");
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

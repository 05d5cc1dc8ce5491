// The tile intrinsics of AMX-BF16 in plain C++, for tests on CPUs without it: included before a kernel's
// source (-include), it takes the place of the compiler's. Follows the pseudocode of TDPBF16PS, TILELOADD and
// TILESTORED in the Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2: products of bf16
// pairs are added in f32, subnormals are zero.
#pragma once

#include <immintrin.h>

#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated_tiles {

struct Tile {
  std::uint8_t rows = 0;
  std::uint16_t row_bytes = 0;
  alignas(64) std::uint8_t data[16][64] = {};
};

inline thread_local Tile tiles[8];
inline thread_local bool configured = false;

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "A tile instruction would fault: %s.\n", what);
  std::abort();
}

inline void load_config(const void* config) {
  const auto* bytes = static_cast<const std::uint8_t*>(config);
  require(bytes[0] == 1, "the palette is not 1");
  for (int t = 0; t < 8; ++t) {
    tiles[t] = {};
    std::memcpy(&tiles[t].row_bytes, bytes + 16 + 2 * t, 2);
    tiles[t].rows = bytes[48 + t];
    require(tiles[t].row_bytes <= 64 && tiles[t].rows <= 16, "a tile is larger than 16 x 64 bytes");
  }
  configured = true;
}

inline void release() { configured = false; }

inline Tile& tile(int t) {
  require(configured, "tiles have no shapes");
  require(tiles[t].rows != 0 && tiles[t].row_bytes != 0, "the tile has no shape");
  return tiles[t];
}

inline void zero(int t) { std::memset(tile(t).data, 0, sizeof(Tile::data)); }

inline void load(int t, const void* base, std::int64_t stride) {
  zero(t);
  for (int r = 0; r < tiles[t].rows; ++r)
    std::memcpy(tiles[t].data[r], static_cast<const std::uint8_t*>(base) + r * stride, tiles[t].row_bytes);
}

inline void store(int t, void* base, std::int64_t stride) {
  const Tile& from = tile(t);
  for (int r = 0; r < from.rows; ++r)
    std::memcpy(static_cast<std::uint8_t*>(base) + r * stride, from.data[r], from.row_bytes);
}

// Number `i` of a row of bf16.
inline float bf16_at(const std::uint8_t* row, int i) {
  std::uint16_t bits;
  std::memcpy(&bits, row + 2 * i, 2);
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

inline void multiply_bf16(int to, int a, int b) {
  Tile& c = tile(to);
  const Tile &x = tile(a), &w = tile(b);
  require(x.rows == c.rows && w.row_bytes == c.row_bytes && x.row_bytes == w.rows * 4, "shapes do not fit");
  const unsigned modes = _mm_getcsr();
  _mm_setcsr(modes | 0x8040);  // flush to zero, denormals are zero
  const int width = c.row_bytes / 4;
  for (int k = 0; k < w.rows; ++k) {
    for (int j = 0; j < 2; ++j) {
      float weights[16] = {};
      for (int n = 0; n < width; ++n) weights[n] = bf16_at(w.data[k], 2 * n + j);
      for (int m = 0; m < c.rows; ++m) {
        const float factor = bf16_at(x.data[m], 2 * k + j);
        auto* sums = reinterpret_cast<float*>(c.data[m]);
        for (int n = 0; n < 16; ++n) sums[n] = __builtin_fmaf(factor, weights[n], sums[n]);
      }
    }
  }
  _mm_setcsr(modes);
}

}  // namespace emulated_tiles

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) emulated_tiles::load_config(config)
#define _tile_release() emulated_tiles::release()
#define _tile_zero(t) emulated_tiles::zero(t)
#define _tile_loadd(t, base, stride) emulated_tiles::load(t, base, stride)
#define _tile_stored(t, base, stride) emulated_tiles::store(t, base, stride)
#define _tile_dpbf16ps(to, a, b) emulated_tiles::multiply_bf16(to, a, b)

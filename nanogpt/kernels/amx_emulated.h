// AMX's tile instructions in plain C++, for testing that path on machines without it. In test builds only.
#pragma once

#include <cstdint>
#include <cstring>

namespace nanogpt {
namespace {

struct EmulatedTile {
  alignas(64) uint8_t bytes[16][64];
};
inline thread_local EmulatedTile emulated_tiles[8];

inline void emulated_load(int tile, const void* base, size_t stride) {
  for (int r = 0; r < 16; r++) std::memcpy(emulated_tiles[tile].bytes[r], (const uint8_t*)base + r * stride, 64);
}
inline void emulated_store(int tile, void* base, size_t stride) {
  for (int r = 0; r < 16; r++) std::memcpy((uint8_t*)base + r * stride, emulated_tiles[tile].bytes[r], 64);
}
// TDPBSUD: four signed bytes of `a` times four unsigned of `b` to each int32 of `c`, as the manual's pseudocode says.
inline void emulated_dot(int c, int a, int b) {
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 16; n++) {
        uint32_t sum;
        std::memcpy(&sum, emulated_tiles[c].bytes[m] + 4 * n, 4);
        for (int i = 0; i < 4; i++)
          sum += uint32_t(int8_t(emulated_tiles[a].bytes[m][4 * k + i]) * emulated_tiles[b].bytes[k][4 * n + i]);
        std::memcpy(emulated_tiles[c].bytes[m] + 4 * n, &sum, 4);
      }
}

}  // namespace
}  // namespace nanogpt

#define NG_TILE_LOAD(tile, base, stride) emulated_load(tile, base, stride)
#define NG_TILE_STORE(tile, base, stride) emulated_store(tile, base, stride)
#define NG_TILE_ZERO(tile) std::memset(&emulated_tiles[tile], 0, sizeof(EmulatedTile))
#define NG_TILE_DOT(c, a, b) emulated_dot(c, a, b)

// What a processor has for products of bf16: vectors of pairs, and tiles.

#pragma once

#include "vector.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_AMX 1
#endif

enum Dtype : int32_t { FLOAT32, BFLOAT16, FLOAT16 };

// sum[lane] += both elements of `pair` times the lane's two.
#if defined(__AVX512BF16__) && defined(__AVX512F__)
constexpr bool MULTIPLIES_BF16 = true;
INLINE F32 dot_pairs(F32 sum, uint32_t pair, U32 columns) {
  return (F32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(pair)), (__m512bh)columns);
}
#else
constexpr bool MULTIPLIES_BF16 = false;
INLINE F32 dot_pairs(F32 sum, uint32_t, U32) { return sum; }
#endif

// Tiles are 16 rows of 64 bytes, and each thread configures its own.
#if defined(HAS_AMX)
inline bool tiles_allowed() {
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
  return allowed;
}
struct Tiles {  // configured while it lives
  Tiles() {
    alignas(64) uint8_t config[64] = {1};
    for (int i = 0; i < 8; i++) config[16 + 2 * i] = 64, config[48 + i] = 16;
    _tile_loadconfig(config);
  }
  ~Tiles() { _tile_release(); }
};
#else
inline bool tiles_allowed() { return false; }
struct Tiles { ~Tiles() {} };
#endif

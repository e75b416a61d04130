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
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
constexpr bool MULTIPLIES_BF16 = true;
INLINE F32 dot_pairs(F32 sum, uint32_t pair, U32 columns) {
  return (F32)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)vdupq_n_u32(pair), (bfloat16x8_t)columns);
}
#else
constexpr bool MULTIPLIES_BF16 = false;
INLINE F32 dot_pairs(F32 sum, uint32_t, U32) { return sum; }
#endif

template <class C> inline constexpr int PAIR = std::is_same_v<C, bf16> ? 2 : 1;  // neighbours in a column that lie side by side

// Products on vectors. A row's elements are float, or bf16 where the processor multiplies these.

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MOST_ROWS = 8, MOST_SUMS = 16;  // that a product keeps in registers
#else
constexpr int MOST_ROWS = 4, MOST_SUMS = 8;
#endif

// sums[r][c] += rows[r][i] * columns[i][c] for P dimensions, or tokens, i: R rows, V vectors of columns.
template <class X, class C, int R, int V>
INLINE void multiply_one(F32 (&sums)[R][V], const X* rows, int64_t row_stride, const C* columns, bool both = true) {
  for (int c = 0; c < V; c++) {
    const C* column = columns + c * PAIR<C> * LANES;
    if constexpr (PAIR<C> == 1) {
      const F32 x = load(column);
      for (int r = 0; r < R; r++) sums[r][c] = rows[r * row_stride] * x + sums[r][c];
    } else {
      const U32 pair = both ? load_raw<U32>(column) : load_raw<U32>(column) & 0x0000ffffu;
      if constexpr (std::is_same_v<X, bf16>) {
        for (int r = 0; r < R; r++)
          sums[r][c] = dot_pairs(sums[r][c], load_raw<uint32_t>(rows + r * row_stride), pair);
      } else {
        const F32 first = (F32)(pair << 16), second = (F32)(pair & 0xffff0000u);
        for (int r = 0; r < R; r++) {
          sums[r][c] = rows[r * row_stride] * first + sums[r][c];
          sums[r][c] = rows[r * row_stride + 1] * second + sums[r][c];
        }
      }
    }
  }
}

// Tiles are 16 rows of 64 bytes, and each thread configures its own. Where a product has fewer rows: tiles 0 and 1 are
// sums of `first` rows, which 4 holds, 2 and 3 those of `second` rows, which 5 holds; 6 and 7 are columns.
#if defined(HAS_AMX)
// Compilers do not see that tiles read memory, and might leave stores for later.
INLINE void finish_stores() { __asm__ volatile("" ::: "memory"); }

inline bool tiles_allowed() {
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
  return allowed;
}
struct Tiles {  // configured while it lives
  Tiles(int first = 16, int second = 16) { configure(first, second); }
  void configure(int first, int second) {
    alignas(64) uint8_t config[64] = {1};
    const int rows[8] = {first, first, second, second, first, second, 16, 16};
    for (int i = 0; i < 8; i++) config[16 + 2 * i] = 64, config[48 + i] = uint8_t(rows[i]);
    __asm__ volatile("" : : "r"(config) : "memory");  // compilers see 8 bytes of it read
    _tile_loadconfig(config);
  }
  ~Tiles() { _tile_release(); }
};

// Sums [32 or 16][32] lie in tiles 0 to 3; a step adds the products of 32 k. Strides in elements, of pairs for columns.
template <bool TWO> INLINE void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (TWO) {
    _tile_zero(2);
    _tile_zero(3);
  }
}
template <bool TWO> INLINE void load_sums(const float* sums, int64_t stride) {
  finish_stores();
  _tile_loadd(0, sums, stride * 4);
  _tile_loadd(1, sums + 16, stride * 4);
  if constexpr (TWO) {
    _tile_loadd(2, sums + 16 * stride, stride * 4);
    _tile_loadd(3, sums + 16 * stride + 16, stride * 4);
  }
}
// What a core's first cache keeps, since it is read again soon; the other operand passes by, and pushes nothing out of it.
enum class Kept { BOTH, ROWS, COLUMNS };

// A macro, as compilers want the tile's number in the text.
#define LOAD_TILE(TILE, KEEP, FROM, STRIDE) \
  if constexpr (KEEP) _tile_loadd(TILE, FROM, STRIDE); \
  else _tile_stream_loadd(TILE, FROM, STRIDE)

template <bool TWO, Kept KEPT = Kept::BOTH>
INLINE void multiply_step(const bf16* rows, int64_t row_stride, const bf16* columns, int64_t column_stride,
                          int64_t across = 32) {  // from the first 16 columns to the others
  constexpr bool R = KEPT != Kept::COLUMNS, C = KEPT != Kept::ROWS;
  LOAD_TILE(6, C, columns, column_stride * 2);
  LOAD_TILE(4, R, rows, row_stride * 2);
  _tile_dpbf16ps(0, 4, 6);
  LOAD_TILE(7, C, columns + across, column_stride * 2);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (TWO) {
    LOAD_TILE(5, R, rows + 16 * row_stride, row_stride * 2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}
template <bool TWO> INLINE void store_sums(float* sums, int64_t stride) {
  _tile_stored(0, sums, stride * 4);
  _tile_stored(1, sums + 16, stride * 4);
  if constexpr (TWO) {
    _tile_stored(2, sums + 16 * stride, stride * 4);
    _tile_stored(3, sums + 16 * stride + 16, stride * 4);
  }
}
#else
inline bool tiles_allowed() { return false; }
struct Tiles { Tiles(int = 16, int = 16) {} ~Tiles() {} void configure(int, int) {} };
#endif

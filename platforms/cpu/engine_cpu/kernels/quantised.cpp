// Products with weights of 8 and 4 bits, which are read once and in order, for any number of rows.
//
// Letters: M rows, N outputs, K width, a multiple of 32, G groups of K that share a scale. Outputs lie in panels of 32:
//
//     8 bits    [N' / 32][K][32]        int8
//     4 bits    [N' / 32][K / 8][32]    a word of 32 bits: k = 0, 2, 4, 6, 1, 3, 5, 7 from its lowest bits on, plus 8
//     scales    [N' / 32][G][32]        zeros likewise, int8
//
// A piece of a panel becomes exact numbers in a buffer, pairs of bf16 where the processor multiplies these, else float:
//
//     piece     [k / P][32][P]
//
// which rows are multiplied with; the sums of each group are scaled, in float, and added. A piece has several groups, or a
// group several pieces. All rows take this one way, and an output is summed in one order, so a row's bits depend neither on
// other rows nor on threads.

#include "products.h"

#include <algorithm>
#include <vector>

namespace {

struct Weight {  // the same as `_Weight` in quantised.py
  const void *codes, *scales;
  const int8_t* zeros;  // or null
  int64_t outputs, width, group;
  int32_t bits, scale_dtype;
};

constexpr int PANEL = 32, GROUP = 32, STEP = 32, LINE = 64;
constexpr int PIECE = 256;          // k of a panel that are numbers at a time
constexpr int AHEAD = 1 << 14;      // bytes between what is read and what is fetched
constexpr int64_t CACHE = 1 << 20, MOST_GROUPS = 16;  // of rows that stay in a core's cache while panels pass by: bytes, and at most
constexpr int VECTORS = PANEL / LANES;

int64_t row_bytes(const Weight& w) { return w.width * w.bits / 8; }
int64_t num_panels(const Weight& w) { return (w.outputs + PANEL - 1) / PANEL; }
int64_t num_groups(const Weight& w) { return w.width / w.group; }

INLINE F32 load_as(const void* p, int64_t i, int32_t dtype) {
  return dtype == FLOAT32 ? load((const float*)p + i) : dtype == BFLOAT16 ? load((const bf16*)p + i) : load((const f16*)p + i);
}
INLINE float scalar_as(const void* p, int64_t i, int32_t dtype) {
  return dtype == FLOAT32 ? ((const float*)p)[i] : dtype == BFLOAT16 ? to_float(((const bf16*)p)[i]) : to_float(((const f16*)p)[i]);
}

// Codes to numbers: `count` k, a multiple of 8, of a panel.

typedef int8_t I8 __attribute__((vector_size(LANES)));

INLINE void widen_piece(const Weight& w, const uint8_t* codes, int count, float* to) {
  if (w.bits == 8) {
    for (int i = 0; i < count * PANEL; i += LANES)
      store(to + i, __builtin_convertvector(load_raw<I8>((const int8_t*)codes + i), F32));
    return;
  }
  for (int k = 0; k < count; k += 8, codes += PANEL * 4, to += PANEL * 8)
    for (int n = 0; n < PANEL; n += LANES) {
      const U32 words = load_raw<U32>(codes + n * 4);
      for (int i = 0; i < 8; i++)
        store(to + i * PANEL + n, __builtin_convertvector((I32)(words >> (i / 2 * 4 + i % 2 * 16) & 15u) - 8, F32));
    }
}

#if defined(__AVX512BF16__) && defined(__AVX512F__)
INLINE void widen_piece(const Weight& w, const uint8_t* codes, int count, bf16* to) {
  if (w.bits == 8) {  // integers of 8 bits have no bits where a float has more than bf16
    for (int k = 0; k < count; k += 2, codes += PANEL * 2) {
      __builtin_prefetch(codes + AHEAD, 0, 2);
      for (int n = 0; n < PANEL; n += 16, to += 32) {
        const __m512i even = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(codes + n)))));
        const __m512i odd = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(codes + PANEL + n)))));
        _mm512_storeu_si512(to, _mm512_or_si512(odd, _mm512_srli_epi32(even, 16)));
      }
    }
    return;
  }
  // The bits of -8 to 7 in bf16, twice: the fifth bit of an index does not count.
  alignas(LINE) static const uint16_t numbers[32] = {
      0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
      0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
  const __m512i table = _mm512_load_si512(numbers);
  for (int k = 0; k < count; k += 8, codes += PANEL * 4, to += PANEL * 8)
    for (int n = 0; n < PANEL; n += 16) {
      __builtin_prefetch(codes + n * 4 + AHEAD, 0, 2);
      const __m512i words = _mm512_loadu_si512(codes + n * 4);
      _mm512_storeu_si512(to + n * 2, _mm512_permutexvar_epi16(words, table));
      _mm512_storeu_si512(to + n * 2 + PANEL * 2, _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table));
      _mm512_storeu_si512(to + n * 2 + PANEL * 4, _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), table));
      _mm512_storeu_si512(to + n * 2 + PANEL * 6, _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), table));
    }
}
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
INLINE void widen_piece(const Weight& w, const uint8_t* codes, int count, bf16* to) {
  float numbers[8 * PANEL];  // which have no bits that bf16 lacks
  for (int k = 0; k < count; k += 8, codes += PANEL * w.bits, to += PANEL * 8) {
    widen_piece(w, codes, 8, numbers);
    for (int i = 0; i < 8 * PANEL; i += 2 * PANEL)
      for (int n = i; n < i + PANEL; n += LANES)
        store_raw(to + n * 2 - i, load_raw<U32>(numbers + n) >> 16 | (load_raw<U32>(numbers + n + PANEL) & 0xffff0000u));
  }
}
#endif

template <class X> struct Rows {
  const X* data;
  int64_t row, group, step;  // elements from row to row, from 32 rows to the next, from 32 k to the next
};

#if defined(HAS_AMX)
// sums [32 or 16][32] = rows x piece, added to what is there unless it is the first of a group.
template <bool TWO>
INLINE void multiply_tiles(const Rows<bf16>& x, const bf16* rows, const bf16* piece, int steps, bool first, float* sums) {
  if (first) clear_sums<TWO>();
  else load_sums<TWO>(sums, PANEL);
  for (int i = 0; i < steps; i++, rows += x.step, piece += PANEL * STEP)
    multiply_step<TWO>(rows, x.row, piece, PANEL * 2);
  store_sums<TWO>(sums, PANEL);
  finish_stores();
}
#endif

template <int R, class X>
INLINE void multiply_vectors(const Rows<X>& x, const X* rows, const X* piece, int steps, bool first, float* sums) {
  F32 total[R][VECTORS];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < VECTORS; j++) total[r][j] = first ? F32{} : load(sums + r * PANEL + j * LANES);
  for (int i = 0; i < steps; i++, rows += x.step)
    for (int k = 0; k < STEP; k += PAIR<X>, piece += PANEL * PAIR<X>) multiply_one(total, rows + k, x.row, piece);
  for (int r = 0; r < R; r++)
    for (int j = 0; j < VECTORS; j++) store(sums + r * PANEL + j * LANES, total[r][j]);
}

template <class X>
INLINE void multiply(const Rows<X>& x, const X* rows, int count, const X* piece, int steps, bool first, float* sums) {
#if defined(HAS_AMX)
  if constexpr (std::is_same_v<X, bf16>) {
    if (tiles_allowed()) {
      if (count > 16) multiply_tiles<true>(x, rows, piece, steps, first, sums);
      else multiply_tiles<false>(x, rows, piece, steps, first, sums);
      return;
    }
  }
#endif
  constexpr int R = std::max(1, MOST_SUMS / VECTORS);
  int m = 0;
  for (; m + R <= count; m += R) multiply_vectors<R>(x, rows + m * x.row, piece, steps, first, sums + m * PANEL);
  for (; m < count; m++) multiply_vectors<1>(x, rows + m * x.row, piece, steps, first, sums + m * PANEL);
}

// What the sums of a group are made into.
struct Scale {
  F32 factors[VECTORS], zeros[VECTORS];
  Scale(const Weight& w, int64_t panel, int64_t group) : zeros{} {
    const int64_t at = (panel * num_groups(w) + group) * PANEL;
    for (int j = 0; j < VECTORS; j++) {
      factors[j] = load_as(w.scales, at + j * LANES, w.scale_dtype);
      if (w.zeros) zeros[j] = __builtin_convertvector(load_raw<I8>(w.zeros + at + j * LANES), F32);
    }
  }
};

// total [rows][32] += (sums - zeros * the sum of x) * factors; `x_sums` is null without zeros.
INLINE void add_group(const Scale& scale, const float* x_sums, int64_t stride, const float* sums, int rows, float* total) {
  for (int m = 0; m < rows; m++, sums += PANEL, total += PANEL)
    for (int j = 0; j < VECTORS; j++) {
      F32 sum = load(sums + j * LANES);
      if (x_sums) sum = sum - scale.zeros[j] * x_sums[m * stride];
      store(total + j * LANES, load(total + j * LANES) + sum * scale.factors[j]);
    }
}

template <class T> void store_rows(const Weight& w, const float* total, int64_t rows, int64_t n, T* out) {
  const int count = int(std::min<int64_t>(PANEL, w.outputs - n));
  for (int64_t m = 0; m < rows; m++, total += PANEL, out += w.outputs) {
    int j = 0;
    for (; j + LANES <= count; j += LANES) store(out + n + j, load(total + j));
    for (; j < count; j++) from_float(total[j], out + n + j);
  }
}

// x_sums [M][parts]: of each row, over the k of a part, in one order.
template <class X> void sum_parts(const Rows<X>& x, int64_t m, int64_t width, int64_t part, float* to) {
  const X* row = x.data + m / GROUP * x.group + m % GROUP * x.row;
  for (int64_t k = 0; k < width; k += part) {
    F32 sum = F32{};
    for (int64_t i = k; i < k + part; i += LANES) sum += load(row + i / STEP * x.step + i % STEP);
    *to++ = ::sum(sum);
  }
}

template <class T, class X>
void run(const Weight& w, const Rows<X>& x, int64_t rows, T* out, int num_threads) {
  const bool even = w.group == w.width || w.group % PIECE == 0 || PIECE % w.group == 0;
  const int64_t part = even ? w.group : STEP;  // k of one scale that are summed at a time
  const int64_t parts = w.width / part, panels = num_panels(w), groups = (rows + GROUP - 1) / GROUP;
  const int64_t most = std::clamp<int64_t>(CACHE / (w.width * int64_t(sizeof(X))) / GROUP, 1, MOST_GROUPS);
  const int64_t passes = (groups + most - 1) / most;
  std::vector<float> x_sums(w.zeros ? rows * parts : 0);
#pragma omp parallel num_threads(num_threads)
  {
    const int first = int(std::min<int64_t>(16, rows)), second = int(std::clamp<int64_t>(rows - 16, 1, 16));
    [[maybe_unused]] Tiles configured(first, second);
    if (w.zeros) {
#pragma omp for schedule(static)
      for (int64_t m = 0; m < rows; m++) sum_parts(x, m, w.width, part, x_sums.data() + m * parts);
    }
    alignas(LINE) X numbers[PIECE * PANEL];
    alignas(LINE) float sums[MOST_GROUPS * GROUP * PANEL], totals[MOST_GROUPS * GROUP * PANEL];
    for (int64_t pass = 0; pass < passes; pass++) {
      const int64_t begin = groups * pass / passes, end = groups * (pass + 1) / passes;
#pragma omp for schedule(static) nowait
      for (int64_t n = 0; n < panels; n++) {
        const uint8_t* codes = (const uint8_t*)w.codes + n * row_bytes(w) * PANEL;
        const int64_t here = std::min(rows, end * GROUP) - begin * GROUP;
        std::fill_n(totals, here * PANEL, 0.0f);
        for (int64_t k = 0; k < w.width; k += PIECE) {
          const int64_t stop = std::min<int64_t>(w.width, k + PIECE);
          widen_piece(w, codes + k * w.bits / 8 * PANEL, int(stop - k), numbers);
#if defined(HAS_AMX)
          finish_stores();
#endif
          for (int64_t g = begin; g < end; g++) {
            const int count = int(std::min<int64_t>(GROUP, rows - g * GROUP));
            const int64_t at = (g - begin) * GROUP * PANEL;
            for (int64_t i = k; i < stop; i += part) {  // once, where a group has several pieces
              const int64_t until = std::min(stop, i + part);
              const X* from = x.data + g * x.group + i / STEP * x.step;
              multiply(x, from, count, numbers + (i - k) * PANEL, int((until - i) / STEP), i % part == 0, sums + at);
              const float* row_sums = w.zeros ? x_sums.data() + g * GROUP * parts + i / part : nullptr;
              if (until % part == 0) add_group(Scale(w, n, i / w.group), row_sums, parts, sums + at, count, totals + at);
            }
          }
        }
        store_rows(w, totals, here, n * PANEL, out + begin * GROUP * w.outputs);
      }
    }
  }
}

// Rows as X, in groups of 32: [M' / 32][K / 32][32][32].
template <class T, class X> void multiply_rows(const Weight& w, const T* x, int64_t rows, T* out, int num_threads) {
  if constexpr (std::is_same_v<T, X>)
    if (rows <= GROUP) return run<T, X>(w, {x, w.width, 0, STEP}, rows, out, num_threads);
  const int64_t groups = (rows + GROUP - 1) / GROUP;
  thread_local std::vector<X> memory;
  const size_t needed = groups * GROUP * w.width + LINE;
  if (memory.size() < needed) memory.resize(needed);
  X* const packed = (X*)((uintptr_t(memory.data()) + LINE - 1) / LINE * LINE);
#pragma omp parallel for schedule(static) num_threads(rows * w.width < 1 << 16 ? 1 : num_threads)
  for (int64_t m = 0; m < rows; m++) {
    X* to = packed + m / GROUP * GROUP * w.width + m % GROUP * STEP;
    for (int64_t k = 0; k < w.width; k += STEP, to += GROUP * STEP)
      for (int i = 0; i < STEP; i++) to[i] = converted<T, X>(x[m * w.width + k + i]);
  }
  run<T, X>(w, {packed, STEP, GROUP * w.width, GROUP * STEP}, rows, out, num_threads);
}

int code(const Weight& w, int64_t row, int64_t k) {
  const uint8_t* panel = (const uint8_t*)w.codes + row / PANEL * row_bytes(w) * PANEL;
  if (w.bits == 8) return ((const int8_t*)panel)[k * PANEL + row % PANEL];
  const uint32_t word = ((const uint32_t*)panel)[k / 8 * PANEL + row % PANEL];
  return int(word >> (k % 8 / 2 * 4 + k % 2 * 16) & 15) - 8;
}

}  // namespace

// values int8 [N][K] -> codes.
extern "C" void engine_pack_quantised(const int8_t* values, int64_t outputs, int64_t width, int32_t bits, void* codes,
                                      int32_t num_threads) {
  const int64_t panels = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t p = 0; p < panels; p++) {
    const auto value = [&](int64_t n, int64_t k) { return n < outputs ? int(values[n * width + k]) : 0; };
    for (int64_t n = p * PANEL; n < (p + 1) * PANEL; n++) {
      if (bits == 8) {
        int8_t* to = (int8_t*)codes + p * PANEL * width + n % PANEL;
        for (int64_t k = 0; k < width; k++) to[k * PANEL] = int8_t(value(n, k));
      } else {
        uint32_t* to = (uint32_t*)codes + p * PANEL * width / 8 + n % PANEL;
        for (int64_t k = 0; k < width; k += 8) {
          uint32_t word = 0;
          for (int i = 0; i < 8; i++) word |= uint32_t(value(n, k + i) + 8) << (i / 2 * 4 + i % 2 * 16);
          to[k / 8 * PANEL] = word;
        }
      }
    }
  }
}

// x [M][K] -> out [M][N], both of `dtype`.
extern "C" void engine_multiply_quantised(const Weight* w, const void* x, int64_t rows, void* out, int32_t dtype,
                                          int32_t num_threads) {
  using X = std::conditional_t<MULTIPLIES_BF16, bf16, float>;
  if (rows == 0) return;
  tiles_allowed();  // asked for before other threads need them
  if (dtype == FLOAT32) multiply_rows<float, float>(*w, (const float*)x, rows, (float*)out, num_threads);
  if (dtype == FLOAT16) multiply_rows<f16, float>(*w, (const f16*)x, rows, (f16*)out, num_threads);
  if (dtype == BFLOAT16) multiply_rows<bf16, X>(*w, (const bf16*)x, rows, (bf16*)out, num_threads);
}

// out [count][K], floats: the rows `ids` of the weight.
extern "C" void engine_rows_of_quantised(const Weight* w, const int64_t* ids, int64_t count, float* out, int32_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(count * w->width < 1 << 16 ? 1 : num_threads)
  for (int64_t m = 0; m < count; m++)
    for (int64_t k = 0; k < w->width; k++) {
      const int64_t at = (ids[m] / PANEL * num_groups(*w) + k / w->group) * PANEL + ids[m] % PANEL;
      const float zero = w->zeros ? float(w->zeros[at]) : 0.0f;
      out[m * w->width + k] = (float(code(*w, ids[m], k)) - zero) * scalar_as(w->scales, at, w->scale_dtype);
    }
}

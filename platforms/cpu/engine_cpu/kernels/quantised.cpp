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
// group several pieces. A single row is multiplied with numbers in registers instead, where floats make the same sums. An
// output is summed in one order, so a row's bits depend neither on other rows nor on threads.

#include "interface.h"
#include "rows.h"

#include <algorithm>
#include <vector>

namespace {

// A product with what comes before and after it in a model.
template <class T> struct Call {
  const Weight& weight;
  int64_t rows;
  const T* x;         // [M][K]
  T* out;             // [M][N], or [M][N / 2] where gated
  const T* norm;      // weight [K] of an RMS norm of the rows, or null
  const T* residual;  // [M][N] that is added, or null
  float eps;
  bool gated;         // silu(the first half of the outputs) * the second; both are whole panels
  int num_threads;
};

constexpr int PANEL = 32, GROUP = 32, STEP = 32, LINE = 64;
constexpr int PIECE = 256;          // k of a panel that are numbers at a time
constexpr int AHEAD = 5 << 10;      // bytes between what is read and what is fetched
constexpr int64_t CACHE = 1 << 20, MOST_GROUPS = 16;  // of rows that stay in a core's cache while panels pass by: bytes, and at most
constexpr int ADDED = 4;            // parts whose sums are added at once
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

// Codes to numbers. A vector has 8 k of some outputs: floats, or pairs of bf16, which has all bits that these numbers need.

typedef int8_t I8 __attribute__((vector_size(LANES)));

INLINE F32 load_bytes(const int8_t* p) {
#if defined(__AVX512F__)
  return (F32)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));  // compilers convert one by one
#else
  return __builtin_convertvector(load_raw<I8>(p), F32);
#endif
}

template <int BITS> INLINE void widen(const uint8_t* codes, F32 (&numbers)[8]) {
  if (BITS == 8) {
    for (int i = 0; i < 8; i++) numbers[i] = load_bytes((const int8_t*)codes + i * PANEL);
    return;
  }
  const U32 words = load_raw<U32>(codes);
  for (int i = 0; i < 8; i++) {
    const U32 shifted = words >> (i / 2 * 4 + i % 2 * 16);
#if defined(__AVX512F__)
    const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);  // higher bits do not count
    numbers[i] = (F32)_mm512_permutexvar_ps((__m512i)shifted, table);
#else
    numbers[i] = __builtin_convertvector((I32)(shifted & 15u) - 8, F32);
#endif
  }
}

template <int BITS> INLINE void widen(const uint8_t* codes, U32 (&pairs)[4]) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
  if (BITS == 4) {
    // The bits of -8 to 7 in bf16, twice: the fifth bit of an index does not count.
    alignas(LINE) static const uint16_t numbers[32] = {
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
    const __m512i table = _mm512_load_si512(numbers), words = _mm512_loadu_si512(codes);
    for (int i = 0; i < 4; i++) pairs[i] = (U32)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * i), table);
    return;
  }
#endif
  F32 numbers[8];
  widen<BITS>(codes, numbers);
  for (int i = 0; i < 4; i++) pairs[i] = (U32)numbers[2 * i] >> 16 | (U32)numbers[2 * i + 1];
}

// Where codes of some outputs are among those of 8 k of a panel.
template <int BITS> INLINE int place(int n) { return BITS == 8 ? n : n * 4; }

INLINE void fetch(const uint8_t* codes, int bytes) {
  for (int i = 0; i < bytes; i += LINE) __builtin_prefetch(codes + AHEAD + i, 0, 2);
}

// `count` k, a multiple of 8, of a panel.
template <int BITS, class X> void widen_piece(const uint8_t* codes, int count, X* to) {
  using V = std::conditional_t<std::is_same_v<X, float>, F32, U32>;
  for (int k = 0; k < count; k += 8, codes += PANEL * BITS, to += PANEL * 8) {
    fetch(codes, PANEL * BITS);
    for (int n = 0; n < PANEL; n += LANES) {
      V numbers[8 / PAIR<X>];
      widen<BITS>(codes + place<BITS>(n), numbers);
      for (int i = 0; i < 8 / PAIR<X>; i++) store_raw(to + (i * PANEL + n) * PAIR<X>, numbers[i]);
    }
  }
}

template <class X> struct Rows {
  const X* data;
  int64_t row, group, step;  // elements from row to row, from 32 rows to the next, from 32 k to the next
};

// The sums of a single row, x [K], with the group or part of one that starts at `codes`.
//
// A tile adds, for 32 k, the products with even k and those with odd k in a chain each, and the sum of both to what is there:
// so does TILES, and multiplies and adds at the same time as a tile does, which gives its bits where `Flushing`.
template <int BITS, bool TILES>
INLINE void multiply_row(const uint8_t* codes, const float* x, int64_t count, F32 (&sums)[VECTORS]) {
  for (int64_t begin = 0; begin < count; begin += STEP) {
    F32 even[VECTORS] = {}, odd[VECTORS] = {};
    for (int k = 0; k < STEP; k += 8, codes += PANEL * BITS, x += 8) {
      fetch(codes, PANEL * BITS);
      for (int j = 0; j < VECTORS; j++) {
        F32 numbers[8];
        widen<BITS>(codes + place<BITS>(j * LANES), numbers);
        for (int i = 0; i < 8; i++) {
          F32& sum = !TILES ? sums[j] : i % 2 ? odd[j] : even[j];
          sum = x[i] * numbers[i] + sum;
        }
      }
    }
    for (int j = 0; TILES && j < VECTORS; j++) sums[j] += even[j] + odd[j];
  }
}

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
  Scale() = default;
  Scale(const Weight& w, int64_t group) : zeros{} {  // as they lie, panel by panel
    for (int j = 0; j < VECTORS; j++) {
      factors[j] = load_as(w.scales, group * PANEL + j * LANES, w.scale_dtype);
      if (w.zeros) zeros[j] = load_bytes(w.zeros + group * PANEL + j * LANES);
    }
  }
  // total + (sum - zeros * the sum of x) * factors; `x_sum` is null without zeros.
  INLINE F32 add(int j, F32 total, F32 sum, const float* x_sum) const {
    if (x_sum) sum = sum - zeros[j] * *x_sum;
    return total + sum * factors[j];
  }
};

// Totals [rows][32] with the sums [COUNT][32][32] of parts of a panel, from k on, in order: a total is read and written once.
// `x_sums` are those of the rows, `stride` apart, or null.
template <int COUNT>
INLINE void add_parts(const Weight& w, int64_t panel, int64_t k, int64_t part, const float* x_sums, int64_t stride,
                      const float* sums, int rows, float* totals) {
  Scale scales[COUNT];
  for (int i = 0; i < COUNT; i++) scales[i] = Scale(w, panel * num_groups(w) + (k + i * part) / w.group);
  for (int m = 0; m < rows; m++, totals += PANEL, sums += PANEL, x_sums += x_sums ? stride : 0)
    for (int j = 0; j < VECTORS; j++) {
      F32 total = load(totals + j * LANES);
      for (int i = 0; i < COUNT; i++)
        total = scales[i].add(j, total, load(sums + i * GROUP * PANEL + j * LANES), x_sums ? x_sums + i : nullptr);
      store(totals + j * LANES, total);
    }
}

// Numbers below the smallest normal one count as zero while it lives, as in tiles.
struct Flushing {
#if defined(HAS_AMX)
  const unsigned before = _mm_getcsr();
  Flushing(bool wanted) { if (wanted && tiles_allowed()) _mm_setcsr(before | 0x8040); }
  ~Flushing() { _mm_setcsr(before); }
#else
  Flushing(bool) {}
#endif
};

// total [32] of a single row; `x_sums` are those of its parts.
template <int BITS, bool TILES>
void row_of_panel(const Weight& w, int64_t n, const float* x, const float* x_sums, int64_t part, float* total) {
  const Flushing flushing(TILES);
  const uint8_t* codes = (const uint8_t*)w.codes + n * row_bytes(w) * PANEL;
  const int64_t groups = num_groups(w), scale_bytes = PANEL * (w.scale_dtype == FLOAT32 ? 4 : 2);
  F32 totals[VECTORS] = {};
  for (int64_t g = n * groups; g < (n + 1) * groups; g++) {
    for (int64_t k = 0; k < w.group; k += part, codes += part * BITS / 8 * PANEL, x += part) {
      F32 sums[VECTORS] = {};
      multiply_row<BITS, TILES>(codes, x, part, sums);
      const Scale scale(w, g);
      for (int j = 0; j < VECTORS; j++) totals[j] = scale.add(j, totals[j], sums[j], x_sums);
      if (x_sums) x_sums++;
    }
    __builtin_prefetch((const char*)w.scales + g * scale_bytes + AHEAD / 8);
  }
  for (int j = 0; j < VECTORS; j++) store(total + j * LANES, totals[j]);
}

// Totals [rows][32] of the outputs from n on, and `more` of those half of all outputs later where gated, to rows from m on.
// Each step rounds as an operation of its own would.
template <class T>
void finish(const Call<T>& c, const float* totals, const float* more, int64_t rows, int64_t m, int64_t n) {
  const int64_t stride = c.weight.outputs / (c.gated ? 2 : 1);
  const int count = int(std::min<int64_t>(PANEL, stride - n));
  for (int64_t i = 0; i < rows; i++, totals += PANEL, more += PANEL)
    for (int j = 0; j < count; j += LANES) {
      const int64_t at = (m + i) * stride + n + j;
      F32 v = load(totals + j);
      if (c.gated) v = rounded<T>(silu(rounded<T>(v))) * rounded<T>(load(more + j));
      if (c.residual) v = rounded<T>(v) + load_some(c.residual + at, count - j);
      store_some(c.out + at, v, count - j);
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

// Adds k to stop, which `numbers` are of, to the totals [32][32] of a group of rows. The sums of a part that goes on in the
// next piece wait in `sums` [4][32][32] for it, and it is the only one then.
template <class X>
void multiply_piece(const Weight& w, int64_t n, const Rows<X>& x, int64_t group, int count, const X* numbers, int64_t k,
                    int64_t stop, int64_t part, const float* x_sums, float* sums, float* totals) {
  const Flushing flushing(std::is_same_v<X, bf16>);
  const int64_t parts = w.width / part;
  for (int64_t i = k; i < stop; i += ADDED * part) {
    const int many = int(std::min<int64_t>(ADDED, (stop - i + part - 1) / part));
    for (int j = 0; j < many; j++) {
      const int64_t from = i + j * part, until = std::min(stop, from + part);
      const X* const rows = x.data + group * x.group + from / STEP * x.step;
      multiply(x, rows, count, numbers + (from - k) * PANEL, int((until - from) / STEP), from % part == 0, sums + j * GROUP * PANEL);
    }
    if (stop % part) return;
    const float* row_sums = x_sums ? x_sums + group * GROUP * parts + i / part : nullptr;
    if (many == ADDED) add_parts<ADDED>(w, n, i, part, row_sums, parts, sums, count, totals);
    for (int j = 0; many < ADDED && j < many; j++)
      add_parts<1>(w, n, i + j * part, part, row_sums ? row_sums + j : nullptr, parts, sums + j * GROUP * PANEL, count, totals);
  }
}

// Totals [rows][32] of a panel and the groups of rows from `begin` on; `done` takes a group, how many rows it has, and where
// its totals are.
template <class X, class F>
void multiply_panel(const Weight& w, int64_t n, const Rows<X>& x, int64_t rows, int64_t begin, int64_t end, int64_t part,
                    const float* x_sums, float* totals, const F& done) {
  const uint8_t* codes = (const uint8_t*)w.codes + n * row_bytes(w) * PANEL;
  alignas(LINE) X numbers[PIECE * PANEL];
  alignas(LINE) float sums[MOST_GROUPS * GROUP * PANEL];
  std::fill_n(totals, (std::min(rows, end * GROUP) - begin * GROUP) * PANEL, 0.0f);
  for (int64_t k = 0; k < w.width; k += PIECE) {
    const int64_t stop = std::min<int64_t>(w.width, k + PIECE);
    if (w.bits == 8) widen_piece<8>(codes + k * PANEL, int(stop - k), numbers);
    else widen_piece<4>(codes + k / 2 * PANEL, int(stop - k), numbers);
#if defined(HAS_AMX)
    finish_stores();
#endif
    for (int64_t g = begin; g < end; g++) {
      const int count = int(std::min<int64_t>(GROUP, rows - g * GROUP));
      const int64_t at = (g - begin) * GROUP * PANEL;
      multiply_piece(w, n, x, g, count, numbers, k, stop, part, x_sums, sums + (part < PIECE ? 0 : at), totals + at);
      if (stop == w.width) done(g, count, at);
    }
  }
}

// The same of a single row.
void multiply_panel(const Weight& w, int64_t n, const float* x, bool tiles, int64_t part, const float* x_sums, float* totals) {
  const auto multiply = w.bits == 8 ? tiles ? row_of_panel<8, true> : row_of_panel<8, false>
                                    : tiles ? row_of_panel<4, true> : row_of_panel<4, false>;
  multiply(w, n, x, x_sums, part, totals);
}

// Threads share the panels. Where rows are more than a core's cache holds, panels pass by several times.
template <class T, class X> void run(const Call<T>& c, const Rows<X>& x) {
  const Weight& w = c.weight;
  const bool even = w.group == w.width || w.group % PIECE == 0 || PIECE % w.group == 0;
  const int64_t part = even ? w.group : STEP;  // k of one scale that are summed at a time
  const int64_t rows = c.rows, panels = num_panels(w), groups = (rows + GROUP - 1) / GROUP, halves = c.gated ? 2 : 1;
  const int64_t most = std::clamp<int64_t>(CACHE / (w.width * int64_t(sizeof(X))) / GROUP, 1, MOST_GROUPS);
  const int64_t passes = (groups + most - 1) / most;
  std::vector<float> memory(w.zeros ? rows * (w.width / part) : 0);
  const float* const x_sums = w.zeros ? memory.data() : nullptr;
#pragma omp parallel num_threads(c.num_threads)
  {
    const int first = int(std::min<int64_t>(16, rows)), second = int(std::clamp<int64_t>(rows - 16, 1, 16));
    [[maybe_unused]] Tiles configured(first, second);
    if (w.zeros) {
#pragma omp for schedule(static)
      for (int64_t m = 0; m < rows; m++) sum_parts(x, m, w.width, part, memory.data() + m * (w.width / part));
    }
    alignas(LINE) float totals[2][MOST_GROUPS * GROUP * PANEL];
    for (int64_t pass = 0; pass < passes; pass++) {
      const int64_t begin = groups * pass / passes, end = groups * (pass + 1) / passes;
#pragma omp for schedule(static) nowait
      for (int64_t n = 0; n < panels / halves; n++)
        for (int64_t half = 0; half < halves; half++) {
          const int64_t panel = n + half * panels / 2;
          const auto done = [&](int64_t g, int count, int64_t at) {
            if (half + 1 == halves) finish(c, totals[0] + at, totals[1] + at, count, g * GROUP, n * PANEL);
          };
          if constexpr (std::is_same_v<X, float>)
            if (rows == 1) {
              multiply_panel(w, panel, x.data, std::is_same_v<T, bf16> && tiles_allowed(), part, x_sums, totals[half]);
              done(0, 1, 0);
              continue;
            }
          multiply_panel(w, panel, x, rows, begin, end, part, x_sums, totals[half], done);
        }
    }
  }
}

// Rows as X, in groups of 32, or of all if they are fewer: [M' / 32][K / 32][32][32].
template <class T, class X> void multiply_rows(const Call<T>& c) {
  const int64_t rows = c.rows, width = c.weight.width, together = std::min<int64_t>(rows, GROUP) * STEP;
  if constexpr (std::is_same_v<T, X>)
    if (rows <= GROUP && !c.norm) return run<T, X>(c, {c.x, width, 0, STEP});
  thread_local Workspace workspace;
  X* const packed = workspace.take<X>((rows + GROUP) * width);
#pragma omp parallel num_threads(rows * width < 1 << 16 ? 1 : c.num_threads)
  {
    std::vector<T> normed(c.norm ? width : 0);
#pragma omp for schedule(static)
    for (int64_t m = 0; m < rows; m++) {
      const T* from = c.x + m * width;
      if (c.norm) {
        norm_row(from, c.norm, width, c.eps, normed.data());
        from = normed.data();
      }
      X* to = packed + m / GROUP * GROUP * width + m % GROUP * STEP;
      for (int64_t k = 0; k < width; k += STEP, to += together)
        for (int i = 0; i < STEP; i++) to[i] = converted<T, X>(from[k + i]);
    }
  }
  run<T, X>(c, {packed, STEP, GROUP * width, together});
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

// x [M][K] -> out, all of `dtype`; see `Call`.
extern "C" void engine_multiply_quantised(const Weight* w, const void* x, int64_t rows, void* out, const void* norm, float eps,
                                          const void* residual, int32_t gated, int32_t dtype, int32_t num_threads) {
  using X = std::conditional_t<MULTIPLIES_BF16, bf16, float>;
  if (rows == 0) return;
  const bool tiles = tiles_allowed();  // asked for before other threads need them
  const auto call = [&](auto t) {
    using T = decltype(t);
    return Call<T>{*w, rows, (const T*)x, (T*)out, (const T*)norm, (const T*)residual, eps, gated != 0, num_threads};
  };
  if (dtype == FLOAT32) multiply_rows<float, float>(call(0.0f));
  if (dtype == FLOAT16) multiply_rows<f16, float>(call(f16{}));
  if (dtype == BFLOAT16 && rows == 1 && tiles) multiply_rows<bf16, float>(call(bf16{}));
  else if (dtype == BFLOAT16) multiply_rows<bf16, X>(call(bf16{}));
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

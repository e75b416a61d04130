// Products with packed weights of bf16, which are read once and in order, for any number of rows.
//
// Letters: M rows, N outputs, K width. A weight lies in panels of 32 outputs; N' and K' are multiples of 32, zero beyond:
//
//     [N' / 32][K' / 2][32][2]      a vector is a pair of k for several outputs; 32 k of a panel are two tiles
//
// Rows are read as they lie where there are few, else in groups of 32:
//
//     [M' / 32][K' / 32][32][32]    32 k of a group are two tiles
//
// An output is summed over k in order and by itself, so a row's bits depend neither on other rows nor on threads.

#include "products.h"

#include <algorithm>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

struct Product {  // the same as `_Product` in linear.py
  const bf16* weight;
  const bf16* bias;  // or null
  int64_t outputs, width;
};

using X = std::conditional_t<MULTIPLIES_BF16, bf16, float>;  // what rows are made of

struct Rows {
  const X* data;
  int64_t row, group, step;  // elements from row to row, from 32 rows to the next, from 32 k to the next
};

constexpr int PANEL = 32, GROUP = 32, STEP = 32, LINE = 64;

// Rows that stay in a core's second cache while panels pass by, and how many groups at most; how much of a panel, in
// steps of 32 k, stays in its first cache while several groups pass by.
constexpr int64_t CACHE = 1 << 20, MOST_GROUPS = 32, BLOCK = 8;

constexpr int64_t ceil_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Memory that will be read soon, fetched some lines a step.
struct Ahead {
  const char* next;
  int lines;
  INLINE void fetch() {
    for (int i = 0; i < lines; i++) __builtin_prefetch(next + i * LINE, 0, 2);
    next += lines * LINE;
  }
};

#if defined(HAS_AMX)
// sums [32 or 16][32] = rows x panel for some steps, added to what is there unless they are the first.
template <bool TWO>
INLINE void multiply_tiles(const Rows& x, const X* rows, const bf16* panel, int64_t steps, bool first, Ahead ahead,
                           float* sums) {
  finish_stores();
  if (first) clear_sums<TWO>();
  else load_sums<TWO>(sums, PANEL);
  for (int64_t i = 0; i < steps; i++, rows += x.step, panel += PANEL * STEP) {
    ahead.fetch();
    multiply_step<TWO>(rows, x.row, panel, PANEL * 2);
  }
  store_sums<TWO>(sums, PANEL);
}
#endif

// The same on vectors, for R rows.
template <int R>
INLINE void multiply_vectors(const Rows& x, const X* rows, const bf16* panel, int64_t steps, bool first, Ahead ahead,
                             float* sums) {
  constexpr int V = PANEL / LANES;
  F32 total[R][V];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < V; j++) total[r][j] = first ? F32{} : load(sums + r * PANEL + j * LANES);
  for (int64_t i = 0; i < steps; i++, rows += x.step) {
    ahead.fetch();
    for (int k = 0; k < STEP; k += 2, panel += PANEL * 2) multiply_one(total, rows + k, x.row, panel);
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < V; j++) store(sums + r * PANEL + j * LANES, total[r][j]);
}

// The same for `count` rows, 32 at most.
void multiply(const Rows& x, const X* rows, int count, const bf16* panel, int64_t steps, bool first, Ahead ahead,
              float* sums) {
#if defined(HAS_AMX)
  if (tiles_allowed()) {
    if (count > 16) multiply_tiles<true>(x, rows, panel, steps, first, ahead, sums);
    else multiply_tiles<false>(x, rows, panel, steps, first, ahead, sums);
    return;
  }
#endif
  constexpr int R = std::max(1, MOST_SUMS / (PANEL / LANES));
  int m = 0;
  for (; m + R <= count; m += R, ahead.lines = 0)
    multiply_vectors<R>(x, rows + m * x.row, panel, steps, first, ahead, sums + m * PANEL);
  for (; m < count; m++, ahead.lines = 0)
    multiply_vectors<1>(x, rows + m * x.row, panel, steps, first, ahead, sums + m * PANEL);
}

void store_rows(const Product& p, const float* sums, int rows, int64_t n, bf16* out) {
  const int count = int(std::min<int64_t>(PANEL, p.outputs - n));
  const bf16* bias = p.bias ? p.bias + n : nullptr;
  for (int m = 0; m < rows; m++, sums += PANEL, out += p.outputs) {
    int j = 0;
    for (; j + LANES <= count; j += LANES) store(out + n + j, bias ? load(sums + j) + load(bias + j) : load(sums + j));
    for (; j < count; j++) from_float(bias ? sums[j] + to_float(bias[j]) : sums[j], out + n + j);
  }
}

// Threads share the panels. Where rows are more than a core's cache holds, panels pass by several times.
void run(const Product& p, const Rows& x, int64_t rows, bf16* out, int num_threads) {
  const int64_t width = ceil_to(p.width, STEP), steps = width / STEP, panels = (p.outputs + PANEL - 1) / PANEL;
  const int64_t most = std::clamp<int64_t>(CACHE / (GROUP * width * int64_t(sizeof(X))), 1, MOST_GROUPS);
  const int64_t groups = (rows + GROUP - 1) / GROUP, passes = (groups + most - 1) / most;
  const int first = int(std::min<int64_t>(16, rows)), second = int(std::clamp<int64_t>(rows - 16, 1, 16));
#pragma omp parallel num_threads(num_threads)
  {
    [[maybe_unused]] Tiles configured(first, second);
    alignas(LINE) float sums[MOST_GROUPS * GROUP * PANEL];
    for (int64_t pass = 0; pass < passes; pass++) {
      const int64_t begin = groups * pass / passes, end = groups * (pass + 1) / passes;
      const int64_t block = end - begin > 1 ? BLOCK : steps;
      const int lines = int((STEP * PANEL * 2 / LINE + end - begin - 1) / (end - begin));
#pragma omp for schedule(static) nowait
      for (int64_t n = 0; n < panels; n++) {
        const bf16* panel = p.weight + n * width * PANEL;
        for (int64_t k = 0; k < steps; k += block, panel += block * PANEL * STEP) {
          const int64_t length = std::min(block, steps - k);
          Ahead ahead = {(const char*)(panel + BLOCK * PANEL * STEP), lines};  // each group fetches a part of what follows
          for (int64_t g = begin; g < end; g++, ahead.next += length * lines * LINE) {
            const int count = int(std::min<int64_t>(GROUP, rows - g * GROUP));
            float* to = sums + (g - begin) * GROUP * PANEL;
            multiply(x, x.data + g * x.group + k * x.step, count, panel, length, k == 0, ahead, to);
            if (k + length == steps) store_rows(p, to, count, n * PANEL, out + g * GROUP * p.outputs);
          }
        }
      }
    }
  }
}

}  // namespace

// Large pages for memory that was not touched yet, where the system has them: fewer look-ups of addresses.
extern "C" void engine_large_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  const uintptr_t page = 1 << 12, from = (uintptr_t(data) + page - 1) / page * page, to = (uintptr_t(data) + bytes) / page * page;
  if (to > from) madvise((void*)from, to - from, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// weight [N][K] -> packed.
extern "C" void engine_pack(const void* weight_, int64_t outputs, int64_t width, void* packed_, int32_t num_threads) {
  const bf16* weight = (const bf16*)weight_;
  const int64_t padded = ceil_to(width, STEP), panels = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t n = 0; n < panels; n++) {
    bf16* panel = (bf16*)packed_ + n * padded * PANEL;
    for (int64_t k = 0; k < padded; k++)
      for (int64_t j = 0; j < PANEL; j++) {
        const bool inside = n * PANEL + j < outputs && k < width;
        panel[(k / 2 * PANEL + j) * 2 + k % 2] = inside ? weight[(n * PANEL + j) * width + k] : bf16{0};
      }
  }
}

// x [M][K] of bf16 -> out [M][N].
extern "C" void engine_linear(const Product* p, const void* x_, int64_t rows, void* out, int32_t num_threads) {
  const bf16* x = (const bf16*)x_;
  const int64_t width = ceil_to(p->width, STEP), groups = (rows + GROUP - 1) / GROUP;
  if (rows == 0) return;
  tiles_allowed();  // asked for before other threads need them
  if (MULTIPLIES_BF16 && rows <= GROUP && p->width == width)
    return run(*p, {(const X*)x, width, 0, STEP}, rows, (bf16*)out, num_threads);
  thread_local std::vector<X> memory;
  const size_t needed = groups * GROUP * width + LINE;
  if (memory.size() < needed) memory.resize(needed);
  X* const packed = (X*)((uintptr_t(memory.data()) + LINE - 1) / LINE * LINE);
#pragma omp parallel for schedule(static) num_threads(rows * width < 1 << 16 ? 1 : num_threads)
  for (int64_t m = 0; m < groups * GROUP; m++) {
    X* to = packed + m / GROUP * GROUP * width + m % GROUP * STEP;
    for (int64_t k = 0; k < width; k += STEP, to += GROUP * STEP) {
      const bf16* from = x + m * p->width + k;
      if (m < rows && k + STEP <= p->width) {
        for (int i = 0; i < STEP; i++) to[i] = converted<bf16, X>(from[i]);
      } else {
        for (int i = 0; i < STEP; i++) to[i] = m < rows && k + i < p->width ? converted<bf16, X>(from[i]) : X{};
      }
    }
  }
  run(*p, {packed, STEP, GROUP * width, GROUP * STEP}, rows, (bf16*)out, num_threads);
}

// Rows `ids` of a packed weight -> out [count][K]. Gives how many ids are none of its rows; their rows of out are left.
extern "C" int64_t engine_lookup(const Product* p, const int64_t* ids, int64_t count, void* out, int32_t num_threads) {
  const int64_t steps = ceil_to(p->width, STEP) / STEP;
  int64_t strange = 0;
#pragma omp parallel for schedule(static) num_threads(count < 8 ? 1 : num_threads) reduction(+ : strange)
  for (int64_t i = 0; i < count; i++) {
    if (ids[i] < 0 || ids[i] >= p->outputs) {
      strange++;
      continue;
    }
    const bf16* from = p->weight + ids[i] / PANEL * PANEL * steps * STEP + ids[i] % PANEL * 2;
    bf16* to = (bf16*)out + i * p->width;
    for (int64_t k = 0; k < p->width; k++) to[k] = from[k / 2 * PANEL * 2 + k % 2];
  }
  return strange;
}

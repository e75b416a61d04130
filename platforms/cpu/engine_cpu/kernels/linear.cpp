// Products with packed weights of bf16, which are read once and in order, for any number of rows.
//
// Letters: M rows, N outputs, K width. A weight lies in panels of 32 outputs; N' and K' are multiples of 32, zero beyond:
//
//     [N' / 32][K' / 2][32][2]      a vector is a pair of k for several outputs; 32 k of a panel are two tiles
//
// Rows are read as they lie where there are few and nothing comes before, else in groups of 32, or of all if they are fewer:
//
//     [M' / 32][K' / 32][32][32]    32 k of a group are two tiles
//
// An output is summed over k in order and by itself, so a row's bits depend neither on other rows nor on threads.

#include "interface.h"
#include "rows.h"

#include <algorithm>
#include <vector>

namespace {

using X = std::conditional_t<MULTIPLIES_BF16, bf16, float>;  // what rows are made of

// A product with what comes before and after it in a model.
struct Call {
  const Product* product;
  int64_t rows;
  const bf16* x;         // [M][K], or null where the rows are packed already
  bf16* out;             // [M][N], or [M][N / 2] where gated; null where the next product takes it
  X* packed;             // what `out` is for the next product: rows in groups
  const bf16* norm;      // weight [K] of an RMS norm of the rows, or null
  const bf16* residual;  // [M][N] that is added, or null
  float eps;
  bool gated;            // silu(the first half of the outputs) * the second; both are whole panels
  int num_threads;
  bool past = false;     // results pass the caches by
};

struct Rows {
  const X* data;
  int64_t row, group, step;  // elements from row to row, from 32 rows to the next, from 32 k to the next
};

constexpr int PANEL = 32, GROUP = 32, STEP = 32, LINE = 64;

// Rows that stay in a core's second cache while panels pass by, and how many groups at most. How much of a panel, in steps
// of 32 k, stays in its first cache while several groups pass by: 32 KiB where these leave it alone, and else 16. Results
// beyond `LARGE` are more than the second cache holds.
constexpr int64_t CACHE = 1 << 20, MOST_GROUPS = 16, TILE_BLOCK = 16, VECTOR_BLOCK = 8, LARGE = 1 << 21;

constexpr int64_t ceil_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Memory that will be read soon, fetched some lines a step; where it is read in order, the processor finds those between.
struct Ahead {
  const char* next;
  int lines, apart;
  INLINE void fetch() {
    for (int i = 0; i < lines; i += apart) __builtin_prefetch(next + i * LINE, 0, 2);
    next += lines * LINE;
  }
};

// How many rows a group of packed rows has.
INLINE int64_t together(int64_t rows) { return std::min<int64_t>(rows, GROUP); }

// A panel's results of a row. What is more than caches hold goes past them, a line at once, which need not be read before.
INLINE void store_line(bf16* p, const F32 (&v)[PANEL / LANES], [[maybe_unused]] bool past) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
  const __m512i line = (__m512i)_mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]);
  if (past) _mm512_stream_si512((__m512i*)p, line);
  else _mm512_storeu_si512((__m512i*)p, line);
#else
  for (int j = 0; j < PANEL / LANES; j++) store(p + j * LANES, v[j]);
#endif
}

// Sums [rows][32] of the outputs from n on, and `more` of those half of all outputs later where gated, to rows from m on.
template <bool GATED, bool ADDED, bool WHOLE>
void finish(const Call& c, const float* sums, const float* more, int rows, int64_t m, int64_t n) {
  constexpr int V = PANEL / LANES;
  const Product& p = *c.product;
  const int64_t half = p.outputs / 2, stride = GATED ? half : p.outputs;
  const int count = WHOLE ? PANEL : int(stride - n);
  F32 bias[2][V] = {};
  for (int j = 0; j < V && p.bias; j++) {
    bias[0][j] = load_some(p.bias + n + j * LANES, count - j * LANES);
    if (GATED) bias[1][j] = load(p.bias + half + n + j * LANES);
  }
  // Where the next product takes them, rows of a panel lie together.
  bf16* out = c.out ? c.out + m * stride + n : nullptr;
  X* packed = c.packed ? c.packed + m / GROUP * GROUP * stride + n * together(c.rows) + m % GROUP * PANEL : nullptr;
  const bf16* residual = ADDED ? c.residual + m * stride + n : nullptr;
  for (int i = 0; i < rows; i++, sums += PANEL, more += PANEL, out += stride, packed += PANEL, residual += stride) {
    F32 results[V];
    for (int j = 0; j < V; j++) {
      F32 v = load(sums + j * LANES) + bias[0][j];
      if (GATED) v = rounded<bf16>(silu(rounded<bf16>(v))) * rounded<bf16>(load(more + j * LANES) + bias[1][j]);
      if (ADDED) v = rounded<bf16>(v) + load_some(residual + j * LANES, count - j * LANES);
      results[j] = v;
    }
    if (c.packed)
      for (int j = 0; j < V; j++) store(packed + j * LANES, rounded<bf16>(results[j]));
    else if (WHOLE)
      store_line(out, results, c.past);
    else
      for (int j = 0; j < V; j++) store_some(out + j * LANES, results[j], count - j * LANES);
  }
}

void finish_rows(const Call& c, const float* sums, const float* more, int rows, int64_t m, int64_t n) {
  const bool whole = n + PANEL <= c.product->outputs;
  if (c.gated) finish<true, false, true>(c, sums, more, rows, m, n);
  else if (c.residual && whole) finish<false, true, true>(c, sums, more, rows, m, n);
  else if (c.residual) finish<false, true, false>(c, sums, more, rows, m, n);
  else if (whole) finish<false, false, true>(c, sums, more, rows, m, n);
  else finish<false, false, false>(c, sums, more, rows, m, n);
}

// Sums that are complete. They become results some rows at a time, while tiles are busy with the next.
struct Finish {
  const Call& call;
  const float *sums = nullptr, *more = nullptr;
  int64_t m = 0, n = 0, rows = 0;
  void begin(const float* first, const float* second, int count, int64_t row, int64_t column) {
    sums = first, more = second, m = row, n = column, rows = count;
  }
  INLINE void some(int64_t most) {
    const int count = int(std::min(most, rows));
    if (count == 0) return;
    finish_rows(call, sums, more, count, m, n);
    sums += count * PANEL, more += count * PANEL, m += count, rows -= count;
  }
};

// Some steps of a panel, which all groups of rows pass by; the first of them begin the sums. A group that is alone passes by
// panels instead.
struct Block {
  const bf16* panel;
  int64_t steps;
  bool first, alone;
};

#if defined(HAS_AMX)
// sums [32 or 16][32] = rows x block, added to what is there unless it is the first.
template <bool TWO, Kept KEPT>
INLINE void multiply_tiles(const Rows& x, const X* rows, const Block& b, Ahead ahead, Finish& before, float* sums) {
  finish_stores();
  if (b.first) clear_sums<TWO>();
  else load_sums<TWO>(sums, PANEL);
  const bf16* panel = b.panel;
  const int64_t some = (before.rows + b.steps - 1) / b.steps;
  for (int64_t i = 0; i < b.steps; i++, rows += x.step, panel += PANEL * STEP) {
    ahead.fetch();
    multiply_step<TWO, KEPT>(rows, x.row, panel, PANEL * 2);
    before.some(some);
  }
  store_sums<TWO>(sums, PANEL);
}
#endif

// The same on vectors, for R rows.
template <int R>
INLINE void multiply_vectors(const Rows& x, const X* rows, const Block& b, Ahead ahead, float* sums) {
  constexpr int V = PANEL / LANES;
  F32 total[R][V];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < V; j++) total[r][j] = b.first ? F32{} : load(sums + r * PANEL + j * LANES);
  const bf16* panel = b.panel;
  for (int64_t i = 0; i < b.steps; i++, rows += x.step) {
    ahead.fetch();
    for (int k = 0; k < STEP; k += 2, panel += PANEL * 2) multiply_one(total, rows + k, x.row, panel);
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < V; j++) store(sums + r * PANEL + j * LANES, total[r][j]);
}

// The same for `count` rows, 32 at most, and what came `before` is finished.
void multiply(const Rows& x, const X* rows, int count, const Block& b, Ahead ahead, Finish& before, float* sums) {
#if defined(HAS_AMX)
  if (tiles_allowed()) {
    if (count > 16 && b.alone) multiply_tiles<true, Kept::ROWS>(x, rows, b, ahead, before, sums);
    else if (count > 16) multiply_tiles<true, Kept::COLUMNS>(x, rows, b, ahead, before, sums);
    else if (b.alone) multiply_tiles<false, Kept::ROWS>(x, rows, b, ahead, before, sums);
    else multiply_tiles<false, Kept::COLUMNS>(x, rows, b, ahead, before, sums);
    return;
  }
#endif
  before.some(GROUP);
  constexpr int R = std::max(1, MOST_SUMS / (PANEL / LANES));
  int m = 0;
  for (; m + R <= count; m += R, ahead.lines = 0) multiply_vectors<R>(x, rows + m * x.row, b, ahead, sums + m * PANEL);
  for (; m < count; m++, ahead.lines = 0) multiply_vectors<1>(x, rows + m * x.row, b, ahead, sums + m * PANEL);
}

// Rows as X in groups, where they do not lie so already; each thread of a team does some, and waits for the others.
void pack_rows(const Call& c, X* packed) {
  const int64_t inputs = c.product->width, width = ceil_to(inputs, STEP);
  std::vector<bf16> normed(c.norm ? inputs : 0);
#pragma omp for schedule(static)
  for (int64_t m = 0; m < c.rows; m++) {
    const bf16* from = c.x + m * inputs;
    if (c.norm) {
      norm_row(from, c.norm, inputs, c.eps, normed.data());
      from = normed.data();
    }
    X* to = packed + m / GROUP * GROUP * width + m % GROUP * STEP;
    int64_t k = 0;
    for (; k + STEP <= inputs; k += STEP, to += together(c.rows) * STEP)
      for (int i = 0; i < STEP; i++) to[i] = converted<bf16, X>(from[k + i]);
    for (int i = 0; k < width && i < STEP; i++) to[i] = k + i < inputs ? converted<bf16, X>(from[k + i]) : X{};
  }
}

// Threads share the panels. Where rows are more than a core's cache holds, panels pass by several times.
void run(const Call& c, const Rows& x, X* packed) {
  const Product& p = *c.product;
  const int64_t width = ceil_to(p.width, STEP), steps = width / STEP, rows = c.rows;
  const int64_t panels = (p.outputs + PANEL - 1) / PANEL, parts = c.gated ? 2 : 1;
  const int64_t most = std::clamp<int64_t>(CACHE / (GROUP * width * int64_t(sizeof(X))), 1, MOST_GROUPS);
  const int64_t groups = (rows + GROUP - 1) / GROUP, passes = (groups + most - 1) / most;
  const int64_t most_steps = tiles_allowed() ? TILE_BLOCK : VECTOR_BLOCK;
  const int first = int(std::min<int64_t>(16, rows)), second = int(std::clamp<int64_t>(rows - 16, 1, 16));
#pragma omp parallel num_threads(c.num_threads)
  {
    if (packed && c.x) pack_rows(c, packed);
    [[maybe_unused]] Tiles configured(first, second);
    alignas(LINE) float sums[2][MOST_GROUPS * GROUP * PANEL];
    Finish before{c};
    for (int64_t pass = 0; pass < passes; pass++) {
      const int64_t begin = groups * pass / passes, end = groups * (pass + 1) / passes;
      const bool alone = end - begin == 1;
      const int64_t block = alone ? steps : most_steps, apart = alone ? VECTOR_BLOCK : block;
      const int lines = int((STEP * PANEL * 2 / LINE + end - begin - 1) / (end - begin));
#pragma omp for schedule(static) nowait
      for (int64_t n = 0; n < panels / parts; n++) {
        for (int64_t part = 0; part < parts; part++) {
          const bf16* panel = p.weight + (n + part * panels / 2) * width * PANEL;
          for (int64_t k = 0; k < steps; k += block, panel += block * PANEL * STEP) {
            const Block some = {panel, std::min(block, steps - k), k == 0, alone};
            // Each group fetches a part of what follows.
            Ahead ahead = {(const char*)(panel + apart * PANEL * STEP), lines, alone ? 4 : 1};
            for (int64_t g = begin; g < end; g++, ahead.next += some.steps * lines * LINE) {
              const int count = int(std::min<int64_t>(GROUP, rows - g * GROUP));
              const int64_t at = (g - begin) * GROUP * PANEL;
              multiply(x, x.data + g * x.group + k * x.step, count, some, ahead, before, sums[part] + at);
              if (k + some.steps == steps && part + 1 == parts)
                before.begin(sums[0] + at, sums[1] + at, count, g * GROUP, n * PANEL);
            }
          }
        }
      }
    }
    before.some(GROUP);
#if defined(__x86_64__)
    if (c.past) _mm_sfence();
#endif
  }
}

}  // namespace

// weight [N][K] -> packed.
extern "C" void engine_pack(const void* weight_, int64_t outputs, int64_t width, void* packed_, int32_t num_threads) {
  const bf16* weight = (const bf16*)weight_;
  const int64_t padded = ceil_to(width, STEP), panels = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t n = 0; n < panels; n++) {
    const bf16* rows = weight + n * PANEL * width;
    bf16* panel = (bf16*)packed_ + n * padded * PANEL;
    const int64_t inside = std::min<int64_t>(PANEL, outputs - n * PANEL);
    for (int64_t k = 0; k < padded; k += 2)
      for (int64_t j = 0; j < PANEL; j++, panel += 2) {
        const bf16* pair = rows + j * width + k;
        if (inside == PANEL && width == padded) std::memcpy(panel, pair, 2 * sizeof(bf16));
        else panel[0] = j < inside && k < width ? pair[0] : bf16{0}, panel[1] = j < inside && k + 1 < width ? pair[1] : bf16{0};
      }
  }
}

// x [M][K] -> out; see `Call`.
extern "C" void engine_linear(const Product* p, const bf16* x, int64_t rows, bf16* out, const bf16* norm, float eps,
                              const bf16* residual, int32_t num_threads) {
  if (rows == 0) return;
  tiles_allowed();  // asked for before other threads need them
  const bool past = rows * p->outputs * int64_t(sizeof(bf16)) > LARGE && (uintptr_t(out) | p->outputs * sizeof(bf16)) % LINE == 0;
  const Call call = {p, rows, x, out, nullptr, norm, residual, eps, false, num_threads, past};
  const int64_t width = ceil_to(p->width, STEP);
  if (MULTIPLIES_BF16 && rows <= GROUP && p->width == width && !norm)
    return run(call, {(const X*)x, width, 0, STEP}, nullptr);
  thread_local Workspace workspace;
  X* const packed = workspace.take<X>(ceil_to(rows, GROUP) * width);
  run(call, {packed, STEP, GROUP * width, together(rows) * STEP}, packed);
}

// x [M][K] -> out [M][K], x + down(silu(gate) * up), where gate_up makes both of the norm of x. Both halves of its
// outputs are whole panels.
extern "C" void engine_gated(const Product* gate_up, const Product* down, const bf16* x, int64_t rows, bf16* out,
                             const bf16* norm, float eps, int32_t num_threads) {
  if (rows == 0) return;
  tiles_allowed();
  thread_local Workspace before, between;
  const int64_t width = ceil_to(gate_up->width, STEP);
  X* const first = before.take<X>(ceil_to(rows, GROUP) * width);
  X* const second = between.take<X>(ceil_to(rows, GROUP) * down->width);
  run({gate_up, rows, x, nullptr, second, norm, nullptr, eps, true, num_threads},
      {first, STEP, GROUP * width, together(rows) * STEP}, first);
  run({down, rows, nullptr, out, nullptr, nullptr, x, 0, false, num_threads},
      {second, STEP, GROUP * down->width, together(rows) * STEP}, nullptr);
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

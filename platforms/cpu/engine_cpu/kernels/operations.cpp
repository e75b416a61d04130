// Operations on rows, each in one pass over memory, and products with few rows of weights that lie row by row.

#include "products.h"

#include <algorithm>
#include <vector>

namespace {

struct Rows {  // a tensor [outer, inner, width]; the same as `_Rows` in operations.py
  const void* data;
  int64_t outer_stride, inner_stride;  // elements
};

struct Shape {  // the same as `_Shape` in operations.py
  int64_t outer, inner, width;
  int32_t dtype, num_threads;
};

template <class T> const T* row(const Rows& x, const Shape& shape, int64_t i) {
  return (const T*)x.data + i / shape.inner * x.outer_stride + i % shape.inner * x.inner_stride;
}

// Calls f(i) for the rows, on as many threads as the work is worth.
template <class F> void each_row(const Shape& shape, F&& f) {
  const int64_t num = shape.outer * shape.inner;
  const bool alone = num * shape.width < 1 << 15;
#pragma omp parallel for schedule(static) num_threads(alone ? 1 : shape.num_threads)
  for (int64_t i = 0; i < num; i++) f(i);
}

template <class T> void rms_norm(const Shape& shape, const Rows& x, const T* weight, T* out, float eps) {
  const int64_t width = shape.width, whole = width / LANES * LANES;
  each_row(shape, [&](int64_t i) {
    const T* from = row<T>(x, shape, i);
    T* to = out + i * width;
    F32 squares = F32{};
    for (int64_t d = 0; d < whole; d += LANES) squares += load(from + d) * load(from + d);
    float total = sum(squares);
    for (int64_t d = whole; d < width; d++) total += to_float(from[d]) * to_float(from[d]);
    const float factor = 1 / std::sqrt(total / float(width) + eps);
    T rounded[LANES];  // once before the weight, as models do
    for (int64_t d = 0; d < whole; d += LANES) {
      store(rounded, load(from + d) * factor);
      store(to + d, load(rounded) * load(weight + d));
    }
    for (int64_t d = whole; d < width; d++) {
      from_float(to_float(from[d]) * factor, rounded);
      from_float(to_float(rounded[0]) * to_float(weight[d]), to + d);
    }
  });
}

template <class T> void silu_and_mul(const Shape& shape, const Rows& gate, const Rows& up, T* out) {
  const int64_t width = shape.width, whole = width / LANES * LANES;
  each_row(shape, [&](int64_t i) {
    const T *g = row<T>(gate, shape, i), *u = row<T>(up, shape, i);
    T *to = out + i * width, rounded[LANES];
    const auto activated = [](F32 x) { return x / (1.0f + exp(-x)); };
    for (int64_t d = 0; d < whole; d += LANES) {
      store(rounded, activated(load(g + d)));
      store(to + d, load(rounded) * load(u + d));
    }
    for (int64_t d = whole; d < width; d++) {
      from_float(activated(splat(to_float(g[d])))[0], rounded);
      from_float(to_float(rounded[0]) * to_float(u[d]), to + d);
    }
  });
}

// out[m][n] = sum of x[m][k] * weight[n][k], in bf16, for up to 64 rows of x and `width` a multiple of 32: weights are
// read once, in the order in which they lie.

constexpr int GROUP = 16;  // rows of weights at a time

#if defined(HAS_AMX)
void group_on_tiles(const bf16* weight, const bf16* columns, int64_t width, int64_t ahead, int num_columns, float* sums) {
  // The weights are the rows of a product, and pairs of x its columns: [M / 16][width / 2][16][2].
  for (int c = 0; c < 4; c++) {
    if (c == 0) _tile_zero(0);
    if (c == 1) _tile_zero(1);
    if (c == 2) _tile_zero(2);
    if (c == 3) _tile_zero(3);
  }
  for (int64_t k = 0; k < width; k += 32) {
    for (int i = 0; i < GROUP; i++) __builtin_prefetch(weight + ahead + k * GROUP + i * 32);
    _tile_loadd(4, weight + k, width * 2);
    const bf16* column = columns + k * 16;
    _tile_loadd(5, column, 64);
    _tile_dpbf16ps(0, 4, 5);
    if (num_columns > 1) { _tile_loadd(6, column + 16 * width, 64); _tile_dpbf16ps(1, 4, 6); }
    if (num_columns > 2) { _tile_loadd(7, column + 32 * width, 64); _tile_dpbf16ps(2, 4, 7); }
    if (num_columns > 3) { _tile_loadd(5, column + 48 * width, 64); _tile_dpbf16ps(3, 4, 5); }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
}
#endif

#if defined(__AVX512BF16__) && defined(__AVX512F__)
template <int R> void few(const bf16* x, const bf16* weight, int64_t width, int64_t ahead, float* sums) {
  for (int n = 0; n < GROUP; n += 4) {
    __m512 total[R][4] = {};
    for (int64_t k = 0; k < width; k += 32) {
      __m512bh w[4];
      for (int j = 0; j < 4; j++) {
        __builtin_prefetch(weight + ahead + (n + j) * width + k);
        w[j] = (__m512bh)_mm512_loadu_si512(weight + (n + j) * width + k);
      }
      for (int r = 0; r < R; r++) {
        const __m512bh row = (__m512bh)_mm512_loadu_si512(x + r * width + k);
        for (int j = 0; j < 4; j++) total[r][j] = _mm512_dpbf16_ps(total[r][j], row, w[j]);
      }
    }
    for (int r = 0; r < R; r++)
      for (int j = 0; j < 4; j++) sums[(n + j) * 16 + r] = _mm512_reduce_add_ps(total[r][j]);
  }
}

void group_on_vectors(const bf16* x, int rows, const bf16* weight, int64_t width, int64_t ahead, float* sums) {
  for (int r = 0; r < rows;) {
    float* to = sums + r / 16 * 256 + r % 16;
    if (rows - r >= 4) few<4>(x + r * width, weight, width, ahead, to), r += 4;
    else few<1>(x + r * width, weight, width, ahead, to), r += 1;
  }
}
#endif

}  // namespace

extern "C" void engine_rms_norm(const Shape* shape, const Rows* x, const void* weight, void* out, float eps) {
  if (shape->dtype == FLOAT32) rms_norm(*shape, *x, (const float*)weight, (float*)out, eps);
  if (shape->dtype == BFLOAT16) rms_norm(*shape, *x, (const bf16*)weight, (bf16*)out, eps);
  if (shape->dtype == FLOAT16) rms_norm(*shape, *x, (const f16*)weight, (f16*)out, eps);
}

extern "C" void engine_silu_and_mul(const Shape* shape, const Rows* gate, const Rows* up, void* out) {
  if (shape->dtype == FLOAT32) silu_and_mul(*shape, *gate, *up, (float*)out);
  if (shape->dtype == BFLOAT16) silu_and_mul(*shape, *gate, *up, (bf16*)out);
  if (shape->dtype == FLOAT16) silu_and_mul(*shape, *gate, *up, (f16*)out);
}

extern "C" int engine_multiplies_bf16() { return MULTIPLIES_BF16; }

extern "C" void engine_few_rows(const void* x_, const void* weight_, void* out_, int64_t rows, int64_t outputs,
                                int64_t width, int32_t num_threads) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
  const bf16 *x = (const bf16*)x_, *weight = (const bf16*)weight_;
  bf16* out = (bf16*)out_;
  [[maybe_unused]] const int num_columns = int((rows + 15) / 16);
  const bool on_tiles = tiles_allowed();
  std::vector<bf16> columns;
  if (on_tiles) {
    columns.resize(size_t(num_columns) * 16 * width, bf16{0});
    for (int64_t m = 0; m < rows; m++)
      for (int64_t k = 0; k < width; k++)
        columns[m / 16 * 16 * width + (k / 2 * 16 + m % 16) * 2 + k % 2] = x[m * width + k];
  }
  const int64_t groups = (outputs + GROUP - 1) / GROUP;
#pragma omp parallel num_threads(num_threads)
  {
    [[maybe_unused]] Tiles configured;
    alignas(64) float sums[64 * 16];
#pragma omp for schedule(static)
    for (int64_t g = 0; g < groups; g++) {
      // The last group begins earlier, so that it is whole: some outputs are computed twice, with the same bits.
      const int64_t first = std::min(g * GROUP, outputs - GROUP);
      const int64_t ahead = first + 2 * GROUP <= outputs ? GROUP * width : 0;
#if defined(HAS_AMX)
      if (on_tiles) group_on_tiles(weight + first * width, columns.data(), width, ahead, num_columns, sums);
#endif
      if (!on_tiles) group_on_vectors(x, int(rows), weight + first * width, width, ahead, sums);
      for (int64_t m = 0; m < rows; m++)
        for (int n = std::max<int64_t>(0, g * GROUP - first); n < GROUP; n++)
          from_float(sums[m / 16 * 256 + n * 16 + m % 16], out + m * outputs + first + n);
    }
  }
#else
  (void)x_, (void)weight_, (void)out_, (void)rows, (void)outputs, (void)width, (void)num_threads;
#endif
}

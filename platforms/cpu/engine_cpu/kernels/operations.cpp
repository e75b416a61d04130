// Operations on rows, each in one pass over memory.

#include "interface.h"
#include "rows.h"

#include <algorithm>
#include <type_traits>
#include <vector>

namespace {

struct Rows {  // a tensor [outer, inner, width]
  const void* data;
  int64_t outer_stride, inner_stride;  // elements
};

struct Shape {
  int64_t outer, inner, width;
  int32_t num_threads;
};

// Calls f with a null pointer to what the elements are.
template <class F> void with_type(int32_t dtype, F&& f) {
  if (dtype == FLOAT32) f((float*)nullptr);
  if (dtype == BFLOAT16) f((bf16*)nullptr);
  if (dtype == FLOAT16) f((f16*)nullptr);
}

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
  each_row(shape, [&](int64_t i) { norm_row(row<T>(x, shape, i), weight, shape.width, eps, out + i * shape.width); });
}

template <class T> void silu_and_mul(const Shape& shape, const Rows& gate, const Rows& up, T* out) {
  const int64_t width = shape.width, whole = width / LANES * LANES;
  each_row(shape, [&](int64_t i) {
    const T *g = row<T>(gate, shape, i), *u = row<T>(up, shape, i);
    T* to = out + i * width;
    for (int64_t d = 0; d < whole; d += LANES) store(to + d, rounded<T>(silu(load(g + d))) * load(u + d));
    for (int64_t d = whole; d < width; d++) {
      T once;
      from_float(silu(splat(to_float(g[d])))[0], &once);
      from_float(to_float(once) * to_float(u[d]), to + d);
    }
  });
}

// Rows of x [heads, tokens, width] turned by cos and sin [tokens][width]; `out` is [tokens][heads][width].
template <class T> void rotary(const Shape& shape, const Rows& x, const T* cos, const T* sin, T* out) {
  const int64_t width = shape.width;
  each_row(shape, [&](int64_t i) {
    const int64_t head = i / shape.inner, token = i % shape.inner;
    T* to = out + (token * shape.outer + head) * width;
    turn_row(row<T>(x, shape, i), cos + token * width, sin + token * width, width, to);
  });
}

// Queries and keys of x [tokens][heads][width] normed, and turned, where they lie.
template <class T>
void prepare(const Heads& h, int64_t tokens, const T* cos, const T* sin, T* x, int32_t num_threads) {
  const int64_t turned = h.queries + h.keys, stride = (turned + h.keys) * h.width;
  each_row({1, tokens, turned * h.width, num_threads}, [&](int64_t token) {
    T* at = x + token * stride;
    for (int64_t head = 0; head < turned; head++, at += h.width) {
      const bool query = head < h.queries;
      const T* norm = (const T*)(query ? h.query_norm : h.key_norm);
      if (norm) norm_row(at, norm, h.width, query ? h.query_eps : h.key_eps, at);
      turn_row(at, cos + token * h.width, sin + token * h.width, h.width, at);
    }
  });
}

struct Largest {
  float value = -INF;
  bool strange = false;  // there is a NaN
};

template <class T> Largest largest_of(const T* x, int64_t count) {
  F32 most = splat(-INF);
  I32 strange = {};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const F32 v = load(x + i);
    strange |= v != v;
    most = max(most, v);
  }
  Largest found = {largest(most)};
  for (int lane = 0; lane < LANES; lane++) found.strange |= strange[lane] != 0;
  for (; i < count; i++) {
    const float v = to_float(x[i]);
    found.strange |= v != v;
    found.value = std::max(found.value, v);
  }
  return found;
}

// The first NaN of each row of x [rows][width], or else the first of its largest.
template <class T> void choose(const T* x, int64_t rows, int64_t width, int64_t stride, int64_t* out, int32_t num_threads) {
  constexpr int64_t PIECE = 1 << 13;
  const int64_t pieces = (width + PIECE - 1) / PIECE;
  std::vector<Largest> found(rows * pieces);
  const auto size = [&](int64_t p) { return std::min(PIECE, width - p * PIECE); };
#pragma omp parallel num_threads(rows * width < 1 << 15 ? 1 : num_threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows * pieces; i++)
      found[i] = largest_of(x + i / pieces * stride + i % pieces * PIECE, size(i % pieces));
#pragma omp for schedule(static)
    for (int64_t m = 0; m < rows; m++) {
      const Largest* all = &found[m * pieces];
      int64_t best = 0;
      for (int64_t p = 1; p < pieces && !all[best].strange; p++)
        if (all[p].strange || all[p].value > all[best].value) best = p;
      const T* piece = x + m * stride + best * PIECE;
      int64_t i = 0;
      for (float v; i + 1 < size(best); i++)
        if (v = to_float(piece[i]), all[best].strange ? v != v : v == all[best].value) break;
      out[m] = best * PIECE + i;
    }
  }
}

}  // namespace

extern "C" void engine_choose(const void* x, int64_t rows, int64_t width, int64_t stride, int64_t* out, int32_t dtype,
                              int32_t num_threads) {
  with_type(dtype, [&](auto* of) {
    using T = std::remove_reference_t<decltype(*of)>;
    choose((const T*)x, rows, width, stride, out, num_threads);
  });
}

extern "C" void engine_rms_norm(const void* x, const void* weight, void* out, int64_t outer, int64_t inner, int64_t width,
                                int64_t outer_stride, int64_t inner_stride, float eps, int32_t dtype,
                                int32_t num_threads) {
  with_type(dtype, [&](auto* of) {
    using T = std::remove_reference_t<decltype(*of)>;
    rms_norm({outer, inner, width, num_threads}, {x, outer_stride, inner_stride}, (const T*)weight, (T*)out, eps);
  });
}

extern "C" void engine_silu_and_mul(const void* gate, const void* up, void* out, int64_t outer, int64_t inner,
                                    int64_t width, int64_t gate_outer, int64_t gate_inner, int64_t up_outer,
                                    int64_t up_inner, int32_t dtype, int32_t num_threads) {
  with_type(dtype, [&](auto* of) {
    using T = std::remove_reference_t<decltype(*of)>;
    silu_and_mul({outer, inner, width, num_threads}, {gate, gate_outer, gate_inner}, {up, up_outer, up_inner}, (T*)out);
  });
}

extern "C" void engine_rotary(const void* x, const void* cos, const void* sin, void* out, int64_t heads, int64_t tokens,
                              int64_t width, int64_t head_stride, int64_t token_stride, int32_t dtype,
                              int32_t num_threads) {
  with_type(dtype, [&](auto* of) {
    using T = std::remove_reference_t<decltype(*of)>;
    rotary({heads, tokens, width, num_threads}, {x, head_stride, token_stride}, (const T*)cos, (const T*)sin, (T*)out);
  });
}

extern "C" void engine_prepare(const Heads* heads, void* x, const void* cos, const void* sin, int64_t tokens,
                               int32_t dtype, int32_t num_threads) {
  with_type(dtype, [&](auto* of) {
    using T = std::remove_reference_t<decltype(*of)>;
    prepare(*heads, tokens, (const T*)cos, (const T*)sin, (T*)x, num_threads);
  });
}

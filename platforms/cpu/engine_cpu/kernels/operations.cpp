// Operations on rows, each in one pass over memory.

#include "products.h"

#include <type_traits>

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

// Halves of the rows of x [heads, tokens, width] turned against each other, by cos and sin [tokens][width]; `out` is
// [tokens][heads][width].
template <class T> void rotary(const Shape& shape, const Rows& x, const T* cos, const T* sin, T* out) {
  const int64_t width = shape.width, half = width / 2, whole = half / LANES * LANES;
  each_row(shape, [&](int64_t i) {
    const int64_t head = i / shape.inner, token = i % shape.inner;
    const T *a = row<T>(x, shape, i), *b = a + half, *c = cos + token * width, *s = sin + token * width;
    T* to = out + (token * shape.outer + head) * width;
    for (int64_t d = 0; d < whole; d += LANES) {
      const F32 first = load(a + d), second = load(b + d);
      store(to + d, first * load(c + d) - second * load(s + d));
      store(to + half + d, second * load(c + half + d) + first * load(s + half + d));
    }
    for (int64_t d = whole; d < half; d++) {
      const float first = to_float(a[d]), second = to_float(b[d]);
      from_float(first * to_float(c[d]) - second * to_float(s[d]), to + d);
      from_float(second * to_float(c[half + d]) + first * to_float(s[half + d]), to + half + d);
    }
  });
}

}  // namespace

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

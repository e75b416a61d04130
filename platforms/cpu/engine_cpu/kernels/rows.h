// What is computed row by row, for kernels of its own and for those that do it on the way.

#pragma once

#include "vector.h"

// x as it is once it has been stored as T.
template <class T> INLINE F32 rounded(F32 x) {
  T stored[LANES];
  store(stored, x);
  return load(stored);
}
template <> INLINE F32 rounded<float>(F32 x) { return x; }
template <> INLINE F32 rounded<bf16>(F32 x) { return widen(narrow_bf16(x)); }

// `count` columns of a row, as many as a vector would have, beyond which nothing is touched.
template <class T> INLINE F32 load_some(const T* p, int count) {
  if (count >= LANES) return load(p);
  T whole[LANES] = {};
  std::memcpy(whole, p, (count > 0 ? count : 0) * sizeof(T));
  return load(whole);
}
template <class T> INLINE void store_some(T* p, F32 v, int count) {
  if (count >= LANES) return store(p, v);
  T whole[LANES];
  store(whole, v);
  std::memcpy(p, whole, (count > 0 ? count : 0) * sizeof(T));
}

INLINE F32 silu(F32 x) { return x / (1.0f + exp(-x)); }

// to = from / sqrt(mean(from^2) + eps) * weight, rounded once before the weight, as models do; they may be the same.
template <class T> INLINE void norm_row(const T* from, const T* weight, int64_t width, float eps, T* to) {
  const int64_t whole = width / LANES * LANES;
  F32 squares = F32{};
  for (int64_t d = 0; d < whole; d += LANES) squares += load(from + d) * load(from + d);
  float total = sum(squares);
  for (int64_t d = whole; d < width; d++) total += to_float(from[d]) * to_float(from[d]);
  const float factor = 1 / std::sqrt(total / float(width) + eps);
  for (int64_t d = 0; d < whole; d += LANES) store(to + d, rounded<T>(load(from + d) * factor) * load(weight + d));
  for (int64_t d = whole; d < width; d++) {
    T once;
    from_float(to_float(from[d]) * factor, &once);
    from_float(to_float(once) * to_float(weight[d]), to + d);
  }
}

// Halves of a row turned against each other, by cos and sin [width]; they may be the same row.
template <class T> INLINE void turn_row(const T* from, const T* cos, const T* sin, int64_t width, T* to) {
  const int64_t half = width / 2, whole = half / LANES * LANES;
  for (int64_t d = 0; d < whole; d += LANES) {
    const F32 first = load(from + d), second = load(from + half + d);
    store(to + d, first * load(cos + d) - second * load(sin + d));
    store(to + half + d, second * load(cos + half + d) + first * load(sin + half + d));
  }
  for (int64_t d = whole; d < half; d++) {
    const float first = to_float(from[d]), second = to_float(from[half + d]);
    from_float(first * to_float(cos[d]) - second * to_float(sin[d]), to + d);
    from_float(second * to_float(cos[half + d]) + first * to_float(sin[half + d]), to + half + d);
  }
}

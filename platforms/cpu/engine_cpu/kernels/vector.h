// Vectors as wide as the processor's registers, through the compiler's vector extensions.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr float INF = __builtin_inff();

typedef float F32 __attribute__((vector_size(LANES * 4)));
typedef int32_t I32 __attribute__((vector_size(LANES * 4)));
typedef uint32_t U32 __attribute__((vector_size(LANES * 4)));
typedef uint16_t U16 __attribute__((vector_size(LANES * 2)));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

INLINE F32 splat(float x) { return F32{} + x; }
INLINE F32 max(F32 a, F32 b) { return a > b ? a : b; }

template <class V, class T> INLINE V load_raw(const T* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
template <class V, class T> INLINE void store_raw(T* p, V v) { std::memcpy(p, &v, sizeof v); }

// Sums and maxima over lanes, always in this order: halves are folded, so that results do not depend on the caller.
INLINE float sum(F32 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
#endif
}
INLINE float largest(F32 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) v[i] = v[i] > v[i + half] ? v[i] : v[i + half];
  return v[0];
#endif
}

// Conversions round to nearest, ties to even; NaN stays NaN.

INLINE F32 widen(U16 bits) {
#if defined(__AVX512F__)
  return (F32)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)bits), 16);  // compilers convert in halves
#else
  return (F32)(__builtin_convertvector(bits, U32) << 16);
#endif
}
INLINE U16 narrow_bf16(F32 v) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
  return (U16)_mm512_cvtneps_pbh((__m512)v);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  return (U16)vcvt_bf16_f32((float32x4_t)v);
#else
  U32 u = (U32)v;
  U32 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  U32 quiet = (u >> 16) | 0x40;
  return __builtin_convertvector((U32)(v == v ? (I32)rounded : (I32)quiet), U16);
#endif
}
INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) { uint32_t u = uint32_t(x.bits) << 16; float f; std::memcpy(&f, &u, 4); return f; }
INLINE float to_float(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#elif defined(__ARM_FP16_FORMAT_IEEE)
  __fp16 h; std::memcpy(&h, &x, 2); return h;
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023;
  const float magnitude = exponent == 31 ? (mantissa ? __builtin_nanf("") : INF)
                          : exponent ? std::ldexp(float(1024 + mantissa), int(exponent) - 25)
                                     : std::ldexp(float(mantissa), -24);
  return sign ? -magnitude : magnitude;
#endif
}
INLINE void from_float(float x, float* p) { *p = x; }
INLINE void from_float(float x, bf16* p) {
  uint32_t u; std::memcpy(&u, &x, 4);
  p->bits = x == x ? uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16) : uint16_t((u >> 16) | 0x40);
}
INLINE void from_float(float x, f16* p) {
#if defined(__F16C__)
  p->bits = uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__ARM_FP16_FORMAT_IEEE)
  __fp16 h = x; std::memcpy(p, &h, 2);
#else
  uint32_t u; std::memcpy(&u, &x, 4);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000);
  const float magnitude = std::fabs(x);
  if (!(x == x)) { p->bits = sign | 0x7e00; return; }
  if (magnitude >= 65520.0f) { p->bits = sign | 0x7c00; return; }
  int exponent; std::frexp(magnitude, &exponent);
  const int shift = exponent - 1 < -14 ? -14 : exponent - 1;  // of the last place: 2^(shift - 10)
  const uint32_t units = uint32_t(std::nearbyint(std::ldexp(magnitude, 10 - shift)));
  p->bits = uint16_t(sign | (magnitude == 0 ? 0 : ((uint32_t(shift + 14) << 10) + units)));
#endif
}

template <class S, class C> INLINE C converted(S x) {
  if constexpr (std::is_same_v<S, C>) return x;  // bits are kept
  C y;
  from_float(to_float(x), &y);
  return y;
}

INLINE F32 load(const float* p) { return load_raw<F32>(p); }
INLINE F32 load(const bf16* p) { return widen(load_raw<U16>(p)); }
INLINE F32 load(const f16* p) {
#if defined(__AVX512F__)
  return (F32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__) && defined(__F16C__)
  return (F32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
  return (F32)vcvt_f32_f16(load_raw<float16x4_t>(p));
#else
  F32 v;
  for (int i = 0; i < LANES; i++) v[i] = to_float(p[i]);
  return v;
#endif
}
INLINE void store(float* p, F32 v) { store_raw(p, v); }
INLINE void store(bf16* p, F32 v) { store_raw(p, narrow_bf16(v)); }
INLINE void store(f16* p, F32 v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  store_raw(p, vcvt_f16_f32((float32x4_t)v));
#else
  for (int i = 0; i < LANES; i++) from_float(v[i], p + i);
#endif
}

// e^x to about one unit in the last place for x <= 88.3; 0 below -87.3, where e^x is no normal number; NaN stays NaN.
// Cody and Waite's reduction to |r| <= log(2) / 2, then Cephes' polynomial.
INLINE F32 exp(F32 x) {
#if defined(__AVX512F__)
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.3f), _CMP_NLT_UQ);
#else
  const I32 low = x < splat(-87.3f);
#endif
  x = splat(-87.3f) > x ? splat(-87.3f) : x;
#if defined(__AVX512F__)
  const F32 n = (F32)_mm512_roundscale_ps((__m512)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT);
#else
  x = x > splat(88.3f) ? splat(88.3f) : x;
  const F32 rounder = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which is in the low bits then
  const F32 shifted = x * 1.44269504f + rounder;
  const F32 n = shifted - rounder;
#endif
  const F32 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F32 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
  return (F32)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
  const F32 scaled = (F32)((I32)p + ((I32)shifted << 23));
  return low ? F32{} : scaled;
#endif
}

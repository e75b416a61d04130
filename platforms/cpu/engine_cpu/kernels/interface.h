// What Python hands to the kernels, and those of them that others call.

#pragma once

#include "products.h"

#include <cstddef>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

struct Product {  // a weight of bf16; the same as `_Product` in linear.py
  const bf16* weight;
  const bf16* bias;  // or null
  int64_t outputs, width;
};

struct Weight {  // of 8 or 4 bits; the same as `_Weight` in quantised.py
  const void *codes, *scales;
  const int8_t* zeros;  // or null
  int64_t outputs, width, group;
  int32_t bits, scale_dtype;
};

struct Heads {  // the same as `_Heads` in operations.py
  int64_t queries, keys, width;          // a token has queries, keys and as many values, of `width` each
  const void *query_norm, *key_norm;     // weights [width], or null
  float query_eps, key_eps;
};

struct AttentionSpec;  // see attention.cpp
struct AttentionStep;

struct AttentionCall {  // of a layer in a step; `_CALL` in attention.py
  const void *q, *k, *v;  // k and v null: read only
  char* cache;            // block 0
  void* out;              // [N, H, E]
  const float *sinks, *slopes;
  float* lse;     // [N, H] or null
  float* partial; // [parts, H, E' + 2], of requests that are cut
  int64_t q_token, q_head, k_token, k_head, v_token, v_head;  // strides in elements
  int64_t out_token, out_head, lse_token, block_bytes;        // the latter: of a block in this cache, padding included
};

extern "C" {
void engine_linear(const Product* p, const bf16* x, int64_t rows, bf16* out, const bf16* norm, float eps, const bf16* residual,
                   int32_t num_threads);
void engine_gated(const Product* gate_up, const Product* down, const bf16* x, int64_t rows, bf16* out, const bf16* norm,
                  float eps, int32_t num_threads);
void engine_multiply_quantised(const Weight* w, const void* x, int64_t rows, void* out, const void* norm, float eps,
                               const void* residual, int32_t gated, int32_t dtype, int32_t num_threads);
void engine_prepare(const Heads* heads, void* x, const void* cos, const void* sin, int64_t tokens, int32_t dtype,
                    int32_t num_threads);
void engine_attention(const AttentionSpec* s, const AttentionStep* step, const AttentionCall* call);
}

// Memory of a thread, kept from call to call, in large pages where the system has them: fewer look-ups of addresses. A
// sanitizer finds what is touched beyond it.
class Workspace {
 public:
  ~Workspace() { std::free(data); }
  template <class T> T* take(size_t count) {
#if defined(__SANITIZE_ADDRESS__)
    constexpr size_t PAGE = 64;
#else
    constexpr size_t PAGE = 1 << 21;
#endif
    if (bytes < count * sizeof(T)) {
      std::free(data);
      bytes = (count * sizeof(T) + PAGE - 1) / PAGE * PAGE;
      data = std::aligned_alloc(PAGE, bytes);
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
      madvise(data, bytes, MADV_HUGEPAGE);
#endif
    }
    return (T*)data;
  }

 private:
  void* data = nullptr;
  size_t bytes = 0;
};

// A decoder layer of the common structure, in one call, or in two around attention that is somebody else's:
//
//     qkv = norm(x) @ W  ->  heads normed and turned where they lie  ->  attention  ->  h = attended @ W + x
//     h + (silu(gate) * up) @ W, gate and up = norm(h) @ W
//
// Each step is the kernel that computes it elsewhere, so its bits are the same.

#include "interface.h"

namespace {

struct Linear {  // one of both; the same as `_Linear` in layers.py
  const Product* product;
  const Weight* quantised;
  int64_t outputs() const { return product ? product->outputs : quantised->outputs; }
};

struct Norm {
  const void* weight;
  float eps;
};

struct Layer {  // the same as `_Layer` in layers.py
  Linear qkv, o, gate_up, down;
  Norm before_attention, before_feed_forward;
  Heads heads;
  int32_t dtype;
};

size_t element(const Layer& l) { return l.dtype == FLOAT32 ? sizeof(float) : sizeof(bf16); }

// x [N][in] -> out [N][outputs], or half of these where gated; `added` is of the result's shape, or null.
void multiply(const Layer& l, const Linear& by, const void* x, int64_t rows, void* out, const Norm& norm, const void* added,
              bool gated, int32_t num_threads) {
  if (by.quantised)
    engine_multiply_quantised(by.quantised, x, rows, out, norm.weight, norm.eps, added, gated, l.dtype, num_threads);
  else
    engine_linear(by.product, (const bf16*)x, rows, (bf16*)out, (const bf16*)norm.weight, norm.eps, (const bf16*)added, num_threads);
}

}  // namespace

// x [N][hidden] -> parts [N][H + 2K][D], queries, keys and values as attention takes them; cos and sin [N][D].
extern "C" void engine_before_attention(const Layer* l, const void* x, int64_t rows, void* parts, const void* cos,
                                        const void* sin, int32_t num_threads) {
  multiply(*l, l->qkv, x, rows, parts, l->before_attention, nullptr, false, num_threads);
  engine_prepare(&l->heads, parts, cos, sin, rows, l->dtype, num_threads);
}

// attended [N][H][D], and the layer's own x -> out [N][hidden], the layer's result.
extern "C" void engine_after_attention(const Layer* l, const void* attended, const void* x, int64_t rows, void* out,
                                       int32_t num_threads) {
  multiply(*l, l->o, attended, rows, out, {}, x, false, num_threads);
  // From here on `out` is h, to which the last product adds where it lies.
  const Norm& norm = l->before_feed_forward;
  if (l->gate_up.product)
    return engine_gated(l->gate_up.product, l->down.product, (bf16*)out, rows, (bf16*)out, (const bf16*)norm.weight, norm.eps,
                        num_threads);
  thread_local Workspace workspace;
  void* const between = workspace.take<char>(rows * l->gate_up.outputs() / 2 * element(*l));
  multiply(*l, l->gate_up, out, rows, between, norm, nullptr, true, num_threads);
  multiply(*l, l->down, between, rows, out, {}, out, false, num_threads);
}

// x [N][hidden] -> out [N][hidden]; see `AttentionCall` for the rest.
extern "C" void engine_layer(const Layer* l, const void* x, int64_t rows, void* out, const void* cos, const void* sin,
                             const AttentionSpec* spec, const AttentionStep* step, char* cache, int64_t block_bytes,
                             float* partial, int32_t num_threads) {
  const Heads& h = l->heads;
  const int64_t token = (h.queries + 2 * h.keys) * h.width, attended_token = h.queries * h.width;
  thread_local Workspace workspace;
  char* const q = workspace.take<char>(rows * (token + attended_token) * element(*l));
  char *const k = q + attended_token * element(*l), *const v = k + h.keys * h.width * element(*l);
  char* const attended = q + rows * token * element(*l);
  engine_before_attention(l, x, rows, q, cos, sin, num_threads);
  const AttentionCall call = {
      q, k, v, cache, attended, nullptr, nullptr, nullptr, partial,
      token, h.width, token, h.width, token, h.width, attended_token, h.width, 0, block_bytes,
  };
  engine_attention(spec, step, &call);
  engine_after_attention(l, attended, x, rows, out, num_threads);
}

// Paged attention with a C interface and no header of torch's. engine_cpu/attention.py calls it and says what a plan is.
//
// Letters: N tokens, R requests, H query heads, K key/value heads, G = H / K, D and E head sizes of keys and values, B
// tokens a block. A block holds, for each key/value head, its keys and then, after the keys of all heads, its values,
// in panels of 16 columns of a product:
//
//     keys     [B' / 16, D' / P, 16, P]    a vector is one dimension of 16 tokens, or P dimensions side by side
//     values   [E' / 16, B' / P, 16, P]    a vector is 16 dimensions of one token, or of P tokens side by side
//
// P is 2 for bf16, whose dot product takes pairs, and 1 else. D' and B' are multiples of P, E' of 16: what is beyond B
// and E is never read as a number, what is beyond D is zero. So neither operand of a matrix product needs packing, and a
// tile is 1 KiB of memory in order. Where B' is no multiple of 16, there is one panel of B' tokens, and vectors of keys
// reach into what follows them, which gives scores that are masked.
//
// A tile is M = T * G rows: T tokens of a request, the G heads that share a key/value head. Keys come in steps of about
// 256 tokens that begin at multiples of it, so that a row's sums have one order, whatever else is in the batch:
//
//     scores [M, step] = rows x keys     softmax of each row, rescaled as its maximum grows     out [M, E] += p x values
//
// Decodes of long requests are cut into parts at multiples of a fixed length, which are merged in order.
//
// Threads share the key/value heads, so that all tiles of a prompt find a head's keys in the cache of one core, and a
// core that wrote a key reads it.

#include "interface.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <type_traits>
#include <vector>

extern "C" int omp_get_thread_num(void);

struct AttentionSpec {  // of a layer and its cache; `_SPEC` in attention.py
  int32_t num_heads, num_kv_heads, head_dim, v_head_dim;
  int32_t dtype, kv_dtype, causal, block_size;
  int32_t window, chunk;  // 0 without
  float scale, softcap;   // 0 without
  int32_t relative;       // reach of a learned bias, whose table [H, 2 * relative + 1] comes as slopes; -1 without
  int32_t num_threads;
};

struct Item {  // queries of a request; the same as the rows of `Plan.items`
  int32_t request, token, num_tokens;  // `token` is the first's index in the step
  int32_t position, length;            // of the first token in the request; the request's tokens
  int32_t begin, end;                  // keys to read
  int32_t part, num_parts, merges;     // of a cut request: index among all parts, their number, whether it is the first
};

struct AttentionStep {  // of a step; `_STEP` in attention.py
  const int32_t* block_table;  // [R, table_stride]
  const int64_t* slots;        // [N]
  const Item* items;
  int64_t num_tokens, num_items, table_stride;
};

namespace {

using Spec = AttentionSpec;
using Step = AttentionStep;
using Call = AttentionCall;

constexpr int WIDTH = 16;  // of a panel; E', and the scores of a block, are multiples of it

constexpr int ceil_to(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Where the columns of a product lie: elements from pair to pair, and from 16 columns to the next 16.
struct Panels {
  int64_t pair, panel;
  template <class C> C* at(C* from, int64_t column) const {
    return from + column / WIDTH * panel + column % WIDTH * PAIR<std::remove_const_t<C>>;
  }
};

template <class C> struct Shape {  // of a cache of C
  static constexpr int P = PAIR<C>;
  int D, E, B, scores;                   // padded; scores: that a block gives
  int64_t key_head, value_head, values;  // elements: from head to head, and where values begin
  Panels keys_of_head, values_of_head;
  explicit Shape(const Spec& s)
      : D(ceil_to(s.head_dim, P)), E(ceil_to(s.v_head_dim, WIDTH)), B(ceil_to(s.block_size, P)),
        scores(ceil_to(s.block_size, WIDTH)),
        key_head(int64_t(D) * B), value_head(int64_t(E) * B), values(key_head * s.num_kv_heads),
        keys_of_head(B % WIDTH ? Panels{B * P, WIDTH * P} : Panels{WIDTH * P, int64_t(D) * WIDTH}),
        values_of_head{WIDTH * P, int64_t(B) * WIDTH} {}
};

// Writing: a head's tokens one after the other, as those of a block share its lines of memory; 16 at a time where they
// fill whole lines.

constexpr int RUN = WIDTH;

INLINE void transpose(uint32_t (&lines)[RUN][RUN]) {
#if defined(__AVX512F__)
  static_assert(LANES == RUN);
  U32 x[RUN], lanes;
  for (int i = 0; i < RUN; i++) x[i] = load_raw<U32>(lines[i]), lanes[i] = i;
  for (int half = 1; half < RUN; half *= 2) {  // exchange quarters of squares of 2 * half
    const U32 upper = (lanes & half) != 0 ? U32{} - 1u : U32{};
    const U32 first = upper ? lanes - half + RUN : lanes, second = upper ? lanes + RUN : lanes + half;
    for (int i = 0; i < RUN; i++) {
      if (i & half) continue;
      const U32 a = x[i], b = x[i + half];
      x[i] = (U32)_mm512_permutex2var_epi32((__m512i)a, (__m512i)first, (__m512i)b);
      x[i + half] = (U32)_mm512_permutex2var_epi32((__m512i)a, (__m512i)second, (__m512i)b);
    }
  }
  for (int i = 0; i < RUN; i++) store_raw(lines[i], x[i]);
#else
  for (int i = 0; i < RUN; i++)
    for (int j = 0; j < i; j++) std::swap(lines[i][j], lines[j][i]);
#endif
}

template <class S, class C> struct Writer {
  const Spec& s;
  const Step& step;
  const Call& call;
  const Shape<C> shape;
  static constexpr int P = PAIR<C>;
  static constexpr bool COPIES = P == 2 && std::is_same_v<S, C>;  // pairs of bits are moved as they are

  const S* key(int64_t n, int64_t head) const { return (const S*)call.k + n * call.k_token + head * call.k_head; }
  const S* value(int64_t n, int64_t head) const { return (const S*)call.v + n * call.v_token + head * call.v_head; }
  C* place(int64_t n) const { return (C*)(call.cache + step.slots[n] / s.block_size * call.block_bytes); }

  C* key_place(int64_t n, int64_t head) const {
    return shape.keys_of_head.at(place(n) + head * shape.key_head, step.slots[n] % s.block_size);
  }
  C* value_place(int64_t n, int64_t head) const {
    const int64_t at = step.slots[n] % s.block_size;
    return place(n) + shape.values + head * shape.value_head + at / P * shape.values_of_head.pair + at % P;
  }

  void one(int64_t n, int64_t head) const {
    const S *k = key(n, head), *v = value(n, head);
    C *keys = key_place(n, head), *values = value_place(n, head);
    const int64_t pair = shape.keys_of_head.pair;
    int d = 0;
    if constexpr (COPIES)
      for (; d + 2 <= s.head_dim; d += 2) std::memcpy((void*)(keys + d / 2 * pair), k + d, sizeof(C) * 2);
    for (; d < shape.D; d++) keys[d / P * pair + d % P] = d < s.head_dim ? converted<S, C>(k[d]) : C{};
    int e = 0;
#if defined(__AVX512BW__)
    if constexpr (COPIES)  // not the other token's bits, as another thread may write these
      for (; e + LANES <= s.v_head_dim; e += LANES)
        _mm512_mask_storeu_epi16(shape.values_of_head.at(values, e), 0x55555555,
                                 _mm512_cvtepu16_epi32((__m256i)load_raw<U16>(v + e)));
#endif
    for (; e < s.v_head_dim; e++) *shape.values_of_head.at(values, e) = converted<S, C>(v[e]);
  }

  // Asks for where a token goes: the first lines of its keys, from where processors go on, and all of its values.
  void expect(int64_t n, int64_t head) const {
    const C *keys = key_place(n, head), *values = value_place(n, head);
    for (int d = 0; d < std::min(shape.D, 32); d += 2) __builtin_prefetch(keys + d / P * shape.keys_of_head.pair, 1, 2);
    for (int e = 0; e < shape.E; e += WIDTH) __builtin_prefetch(shape.values_of_head.at(values, e), 1);
  }

  bool fills_lines(int64_t n, int64_t end) const {
    if (!COPIES || n + RUN > end || s.head_dim % 2 || s.block_size % RUN || step.slots[n] % RUN) return false;
    for (int i = 1; i < RUN; i++)
      if (step.slots[n + i] != step.slots[n] + i) return false;
    return true;
  }

  void many(int64_t n, int64_t head) const {
    C *keys = key_place(n, head), *to = value_place(n, head);
    for (int d = 0; d < s.head_dim; d += 2 * RUN) {
      const int pairs = std::min(RUN, (s.head_dim - d) / 2);
      alignas(64) uint32_t lines[RUN][RUN];
      for (int i = 0; i < RUN; i++) {
        const S* from = key(n + i, head) + d;
        if (pairs == RUN) std::memcpy(lines[i], from, sizeof lines[i]);
        else std::memcpy(lines[i], from, pairs * sizeof(uint32_t));
      }
      transpose(lines);
      for (int i = 0; i < pairs; i++)
        std::memcpy((void*)(keys + (d / 2 + i) * shape.keys_of_head.pair), lines[i], sizeof lines[i]);
    }
    for (int i = 0; i < RUN; i += 2) {
      const S *a = value(n + i, head), *b = value(n + i + 1, head);
      C* values = to + i / 2 * shape.values_of_head.pair;
      int e = 0;
      for (; e + LANES <= s.v_head_dim; e += LANES)
        store_raw(shape.values_of_head.at(values, e), __builtin_convertvector(load_raw<U16>(a + e), U32) |
                                                          __builtin_convertvector(load_raw<U16>(b + e), U32) << 16);
      for (; e < s.v_head_dim; e++) {
        C* pair = shape.values_of_head.at(values, e);
        pair[0] = converted<S, C>(a[e]), pair[1] = converted<S, C>(b[e]);
      }
    }
  }
};

// New keys and values, written by who reads a head first, and whoever comes meanwhile: nobody waits for other heads.
template <class S, class C> class Writes {
 public:
  Writes(const Spec& s, const Step& step, const Call& call)
      : writer{s, step, call, Shape<C>(s)}, pieces(call.k ? (step.num_tokens + PIECE - 1) / PIECE : 0),
        heads(s.num_kv_heads) {}

  // Returns when all tokens of the head are written.
  void finish(int head) {
    Head& of = heads[head];
    if (of.done.load(std::memory_order_acquire) == pieces) return;
    for (int64_t i; (i = of.next++) < pieces; of.done.fetch_add(1, std::memory_order_release))
      piece(head, i * PIECE, std::min(writer.step.num_tokens, (i + 1) * PIECE));
    while (of.done.load(std::memory_order_acquire) < pieces) std::this_thread::yield();
  }

 private:
  static constexpr int64_t PIECE = 4 * RUN;  // tokens that a thread takes at a time
  struct alignas(64) Head { std::atomic<int64_t> next{0}, done{0}; };

  void piece(int head, int64_t n, int64_t end) {
    while (n < end) {
      if (writer.fills_lines(n, end)) writer.many(n, head), n += RUN;
      else {
        if (n + 2 < end) writer.expect(n + 2, head);
        writer.one(n, head), n++;
      }
    }
  }

  const Writer<S, C> writer;
  const int64_t pieces;
  std::vector<Head> heads;
};

// Memory that will be read soon, as large as what is read now: fetched meanwhile, line by line, in the same order, as
// processors go on by themselves from lines that follow one another. Null for none.
template <class C> struct Ahead { const C *keys = nullptr, *values = nullptr; };

// Sums of R rows and V vectors of columns, in groups that lie in one panel.
template <int V> constexpr int GROUP = V * LANES < WIDTH ? V : WIDTH / LANES;
template <int R, int V> using Sums = F32[V / GROUP<V>][R][GROUP<V>];

// `multiply_one` for all i < count; the second of an odd count's last pair is not read as a number.
template <class X, class C, int R, int V, int G>
INLINE void multiply(F32 (&sums)[V][R][G], const X* rows, int64_t row_stride, const C* columns, Panels panels,
                     int count, Ahead<C> ahead = {}) {
  constexpr int P = PAIR<C>;
  int i = 0;
  for (; i + P <= count; i += P, columns += panels.pair) {
    if (ahead.keys) {
      for (int c = 0; c < V * G; c++) {
        const int64_t at = i / P * panels.pair + c / G * panels.panel + c % G * P * LANES;
        __builtin_prefetch(ahead.keys + at), __builtin_prefetch(ahead.values + at);
      }
    }
    for (int g = 0; g < V; g++) multiply_one(sums[g], rows + i, row_stride, columns + g * panels.panel);
  }
  if (i < count)
    for (int g = 0; g < V; g++) multiply_one(sums[g], rows + i, row_stride, columns + g * panels.panel, false);
}

// Products on AMX's tiles of 16 rows of 64 bytes: 0 to 3 are sums, 4 and 5 rows, 6 and 7 columns.

#if defined(HAS_AMX)
// sums[32 or 16][32] += rows x columns of two panels for `count`, a multiple of 32; strides in elements.
template <bool TWO>
INLINE void multiply_tiles(const bf16* rows, int64_t row_stride, const bf16* columns, int64_t panel, int count) {
  finish_stores();
  for (int i = 0; i < count; i += 32)
    multiply_step<TWO>(rows + i, row_stride, columns + i * WIDTH, WIDTH * 2, panel);
}
#endif

// Attention of tiles of queries, in a thread's own memory. X is what rows are made of, C what the cache is made of.

INLINE F32 tanh(F32 x) {  // Cephes' polynomial near 0
  const F32 z = x * x;
  F32 p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const F32 small = p * z * x + x, size = x < F32{} ? -x : x;
  const F32 large = 1.0f - 2.0f / (exp(size + size) + 1.0f);
  return size < splat(0.625f) ? small : x < F32{} ? -large : large;
}

// e^(score * scale - maximum), for weights of X.
template <class X> struct Exponent {
  float scale, maximum;
  Exponent(float scale, float maximum) : scale(scale), maximum(maximum) {}
  INLINE F32 operator()(F32 score) const { return exp(score * scale - maximum); }
};
#if defined(__AVX512BF16__) && defined(__AVX512F__)
// Weights that are rounded to 8 bits need no more: 2^n is exact, and of 2^f, 0 <= f < 1, a polynomial is off by 2^-18.
template <> struct Exponent<bf16> {
  float scale, maximum;
  Exponent(float scale, float maximum) : scale(scale * 1.44269504f), maximum(maximum * 1.44269504f) {}
  INLINE F32 operator()(F32 score) const {
    const F32 x = score * scale - maximum;
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126), _CMP_NLT_UQ);
    const F32 f = (F32)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    F32 p = splat(1.35341671e-2f);
    p = p * f + 5.20114652e-2f;
    p = p * f + 2.41442752e-1f;
    p = p * f + 6.93003836e-1f;
    p = p * f + 1.00000259f;
    return (F32)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)x);
  }
};
#endif

// Indices in as many ranges as there are threads: each takes its own, and then what is left of the others'.
class Work {
 public:
  Work(int64_t count, int num_threads) : ranges(num_threads) {
    for (int t = 0; t < num_threads; t++)
      ranges[t].next = count * t / num_threads, ranges[t].end = count * (t + 1) / num_threads;
  }
  // The next of the range `at`, or of those after it, to which `at` is moved; -1 when there is none.
  int64_t take(int& at) {
    for (size_t tried = 0; tried < ranges.size(); tried++, at = (at + 1) % int(ranges.size())) {
      Range& range = ranges[at];
      if (range.next >= range.end) continue;
      const int64_t i = range.next++;
      if (i < range.end) return i;
    }
    return -1;
  }
  // What `take` will probably give then.
  int64_t peek(int at) const {
    const int64_t next = ranges[at].next;
    return next < ranges[at].end ? next : -1;
  }

 private:
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Range> ranges;
};

template <class X, class C> class Tile {
 public:
  Tile(const Spec& s, const Step& step, const Call& call, int most_tokens)
      : s(s), step(step), call(call), shape(s), G(s.num_heads / s.num_kv_heads),
        num_blocks(std::max(1, STEP / s.block_size)), span(num_blocks * s.block_size), D(ceil_to(shape.D, 32)),
        columns(num_blocks * shape.scores), score_row(columns + GAP), out_row(shape.E + GAP),
        on_tiles(std::is_same_v<X, bf16> && tiles_allowed() && shape.D % 32 == 0 && shape.E % 32 == 0 &&
                 s.block_size % 32 == 0) {
    const size_t rows = ceil_to(most_tokens * G, 32);
    thread_local std::vector<char> memory;
    char* at = nullptr;
    for (int pass = 0; pass < 2; pass++) {  // count, then place
      char* const start = at;
      const auto place = [&](auto*& pointer, size_t count) {
        pointer = (std::remove_reference_t<decltype(pointer)>)at;
        at += (count * sizeof *pointer + 63) / 64 * 64;
      };
      place(queries, rows * D), place(scores, rows * score_row), place(out, rows * out_row);
      place(totals, rows * LANES), place(row, rows), place(offsets, columns), place(cleared, shape.value_head);
      place(blocks, num_blocks);
      if (pass) break;
      if (memory.size() < size_t(at - start) + 64) memory.resize(at - start + 64);
      at = memory.data() + (64 - uintptr_t(memory.data()) % 64) % 64;
    }
    for (int b = 0, c = 0; b < num_blocks; b++)
      for (int i = 0; i < shape.scores; i++, c++) offsets[c] = i < s.block_size ? b * s.block_size + i : 1 << 30;
  }

  // `next` is what this thread does then, if anything.
  template <class S> void run(const Item& item, int head, const Item* next, int next_head) {
    begin<S>(item, head);
    for (int at = first / span * span; at < last; at += span) {
      const bool ends = at + span >= last;
      find_blocks(item, head, at);
      const C* then = !ends ? keys_of(item, head, at + span) : next ? keys_of(*next, next_head, next->begin) : nullptr;
      multiply_keys();
      float found = look(0, at, item.position, head);
      for (int m = 0; m < M; m++) {
        if (ends) {  // rows to write now and to read then: arithmetic leaves memory idle
          fetch<1>(result<S>(item, head, m), s.v_head_dim);
          if (next && m < next->num_tokens * G) fetch<0>(query<S>(*next, next_head, m), s.head_dim);
        }
        const float largest = found;
        if (m + 1 < M) found = look(m + 1, at, item.position + (m + 1) / G, head);  // while this one's are on their way
        weigh(m, largest);
      }
      multiply_values(then);
      started = true;
    }
    if (!started) std::memset(out, 0, sizeof(float) * M * out_row);
    for (int m = 0; m < M; m++) {
      const float sum = ::sum(load(totals + m * LANES));
      item.num_parts ? keep(item, head, m, sum) : finish<S>(item, head, m, sum);
    }
  }

  // Merge the parts of a request, in their order; `item` is the first.
  template <class S> void merge(const Item& item, int head) {
    for (int g = 0; g < G; g++) {
      float maximum = -INF, total = 0, *sum = out + g * out_row;
      for (int part = 0; part < item.num_parts; part++)
        maximum = std::max(maximum, partial(item.part + part, head, g)[shape.E]);
      for (int e = 0; e < shape.E; e++) sum[e] = 0;
      for (int part = 0; part < item.num_parts; part++) {
        const float* p = partial(item.part + part, head, g);
        const float factor = p[shape.E] == -INF ? 0 : std::exp(p[shape.E] - maximum);
        total += factor * p[shape.E + 1];
        for (int e = 0; e < shape.E; e++) sum[e] += factor * p[e];
      }
      row[g].maximum = maximum;
      finish<S>(item, head, g, total);
    }
  }

 private:
  static constexpr int STEP = 256;  // keys between two looks at the softmax, about; `_SPAN` in attention.py
  static constexpr int GAP = 16;    // floats between rows, which would else lie in the same sets of a cache

  struct Row { float maximum; int32_t low, high; };     // high: one past the last key that it sees
  struct Block {
    const C *keys, *values;
    int count, written;  // tokens: that are read, none without pointers; that may be read
  };

  const Spec& s;
  const Step& step;
  const Call& call;
  const Shape<C> shape;
  const int G, num_blocks, span, D, columns, score_row, out_row;  // span: tokens of a step over keys
  const bool on_tiles;
  int M = 0, first = 0, last = 0;        // rows in use, keys that any of them sees
  int begin_column = 0, end_column = 0;  // of the step's blocks that are there
  bool started = false;                  // whether sums are there
  X* queries;                            // [rows, D]
  float *scores, *out, *totals;  // [rows, score_row], of which weights take the place; [rows, out_row]; [rows, LANES]
  Row* row;
  int32_t* offsets;  // [columns], tokens since the step's first; huge where there is none
  C* cleared;        // values of a block of which some are not to be read, for products that read all
  Block* blocks;
  [[maybe_unused]] Tiles tiles;
  int tile_rows = 16;  // that they are configured for

  float* partial(int part, int head, int g) const {
    return call.partial + (int64_t(part) * s.num_heads + head * G + g) * (shape.E + 2);
  }
  X* weights(int m) const { return (X*)(scores + m * score_row); }
  int64_t weight_row() const { return score_row * int64_t(sizeof(float) / sizeof(X)); }

  template <class S> const S* query(const Item& item, int head, int m) const {
    return (const S*)call.q + (item.token + m / G) * call.q_token + (head * G + m % G) * call.q_head;
  }

  template <class S> S* result(const Item& item, int head, int m) const {
    return (S*)call.out + (item.token + m / G) * call.out_token + (head * G + m % G) * call.out_head;
  }
  template <int WRITES, class S> static void fetch(const S* row, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / sizeof(S)) __builtin_prefetch(row + i, WRITES);
  }

  template <class S> void begin(const Item& item, int head) {
    M = item.num_tokens * G, started = false;
    if (on_tiles && tile_rows != std::min(M, 16)) tiles.configure(tile_rows = std::min(M, 16), 16);
    first = item.end, last = item.begin;
    for (int m = 0; m < M; m++) {
      const int position = item.position + m / G;
      const S* q = query<S>(item, head, m);
      if constexpr (std::is_same_v<S, X>) std::memcpy((void*)(queries + m * D), q, sizeof(X) * s.head_dim);
      else for (int d = 0; d < s.head_dim; d++) queries[m * D + d] = converted<S, X>(q[d]);
      for (int d = s.head_dim; d < D; d++) queries[m * D + d] = X{};
      row[m] = {-INF, item.begin, std::min(item.end, s.causal ? position + 1 : item.length)};
      if (s.window && !s.causal) row[m].high = std::min(row[m].high, position + s.window);
      if (s.window) row[m].low = std::max(row[m].low, position - s.window + 1);
      if (s.chunk) row[m].low = std::max(row[m].low, position / s.chunk * s.chunk);
      first = std::min(first, row[m].low), last = std::max(last, row[m].high);
      store(totals + m * LANES, F32{});
    }
  }

  const C* block_of(const Item& item, int token) const {
    const int32_t* table = step.block_table + item.request * step.table_stride;
    return (const C*)(call.cache + table[token / s.block_size] * call.block_bytes);
  }
  const C* keys_of(const Item& item, int head, int token) const {
    return block_of(item, token) + head * shape.key_head;
  }

  void find_blocks(const Item& item, int head, int at) {
    for (int b = 0; b < num_blocks; b++) {
      const int from = at + b * s.block_size;
      blocks[b] = {nullptr, nullptr, 0, 0};
      if (from + s.block_size <= first || from >= last) continue;
      const C* block = block_of(item, from);
      blocks[b] = {block + head * shape.key_head, block + shape.values + head * shape.value_head,
                   std::min(s.block_size, last - from), std::min(s.block_size, item.length - from)};
    }
    begin_column = (std::max(first, at) - at) / s.block_size * shape.scores;
    end_column = (std::min(last, at + span) - at + s.block_size - 1) / s.block_size * shape.scores;
  }

  // Processors go on by themselves from the first lines of a page, with more under way than they let a program ask for.
  static void fetch_start(const C* piece, int64_t count) {
    for (int64_t page = 0; page < count * int64_t(sizeof(C)); page += 4096)
      for (int line = 0; line < 8; line++) __builtin_prefetch((const char*)piece + page + line * 64, 0, 2);
  }

  const C* values_of(int b, int e) const { return shape.values_of_head.at(blocks[b].values, e); }
  const C* first_values() const { return blocks[begin_column / shape.scores].values; }

  void multiply_keys() {
#if defined(HAS_AMX)
    if constexpr (std::is_same_v<X, bf16>) {
      if (on_tiles) {
        for (int b = 0; b < num_blocks; b++) {
          if (!blocks[b].count) continue;
          const bool more = b + 1 < num_blocks && blocks[b + 1].count;
          more ? fetch_start(blocks[b + 1].keys, shape.key_head) : fetch_start(first_values(), shape.value_head);
          for (int n = 0; n < blocks[b].count; n += 32) {
            if (M <= 16) few_on_tiles(b, n);
            else for (int m = 0; m < M; m += 32) keys_on_tiles(b, m, n);
          }
        }
        return;
      }
    }
#endif
    for (int b = 0; b < num_blocks; b++) {
      if (!blocks[b].count) continue;
      Ahead<C> ahead;
      if (M <= MOST_ROWS && shape.D == shape.E)
        ahead = {blocks[b + (b + 1 < num_blocks && blocks[b + 1].count)].keys, blocks[b].values};
      const auto product = [&](auto& sums, int r, int c) {
        const auto part = [&](const C* of) { return of ? shape.keys_of_head.at(of, c * LANES) : nullptr; };
        multiply(sums, queries + r * D, D, part(blocks[b].keys), shape.keys_of_head, shape.D,
                 {part(ahead.keys), part(ahead.values)});
      };
      over_rows(scores + b * shape.scores, score_row, shape.scores / LANES, false, product);
    }
  }

  // `then` are keys that will be read next, or null.
  void multiply_values(const C* then) {
#if defined(HAS_AMX)
    if constexpr (std::is_same_v<X, bf16>) {
      if (on_tiles) {
        for (int b = 0; b < num_blocks; b++) clear_unwritten(b);
        for (int e = 0; e < shape.E; e += 32) {
          for (int m = 0; m < M; m += 32) M > 16 ? values_on_tiles<true>(m, e) : values_on_tiles<false>(m, e);
          if (then && e + 32 < shape.E) fetch<0>(then + e * 32, 32 * WIDTH);  // a tile's worth each time
        }
        return;
      }
    }
#endif
    const auto product = [&](auto& sums, int r, int c) {
      for (int b = 0; b < num_blocks; b++)
        if (blocks[b].count)
          multiply(sums, weights(r) + b * shape.scores, weight_row(), values_of(b, c * LANES), shape.values_of_head,
                   blocks[b].count);
    };
    over_rows(out, out_row, shape.E / LANES, started, product);
  }

  // Cut [M, num vectors] into pieces that fit into registers, and let `product` add to each; `to` is where sums are.
  template <class Product> INLINE void over_rows(float* to, int64_t stride, int num, bool add, const Product& product) {
    int r = 0;
    over<MOST_ROWS>(r, to, stride, num, add, product);
    over<MOST_ROWS / 2>(r, to, stride, num, add, product);
    if constexpr (MOST_ROWS > 4) over<MOST_ROWS / 4>(r, to, stride, num, add, product);
    over<1>(r, to, stride, num, add, product);
  }
  template <int R, class Product>
  INLINE void over(int& r, float* to, int64_t stride, int num, bool add, const Product& product) {
    for (; r + R <= M; r += R) {
      int c = 0;
      over_columns<R, std::min(8, MOST_SUMS / R)>(r, c, to, stride, num, add, product);
    }
  }
  template <int R, int V, class Product>
  INLINE void over_columns(int r, int& c, float* to, int64_t stride, int num, bool add, const Product& product) {
    for (; c + V <= num; c += V) {
      constexpr int G = GROUP<V>;
      Sums<R, V> sums;
      for (int i = 0; i < R; i++)
        for (int j = 0; j < V; j++)
          sums[j / G][i][j % G] = add ? load(to + (r + i) * stride + (c + j) * LANES) : F32{};
      product(sums, r, c);
      for (int i = 0; i < R; i++)
        for (int j = 0; j < V; j++) store(to + (r + i) * stride + (c + j) * LANES, sums[j / G][i][j % G]);
    }
    if constexpr (V > 1) over_columns<R, V / 2>(r, c, to, stride, num, add, product);
  }

#if defined(HAS_AMX)
  void keys_on_tiles(int b, int m, int n) {
    clear_sums<true>();
    const int64_t panel = shape.keys_of_head.panel;
    multiply_tiles<true>(queries + m * D, D, blocks[b].keys + n / WIDTH * panel, panel, shape.D);
    store_sums<true>(scores + m * score_row + b * shape.scores + n, score_row);
  }
  // The same for up to 16 rows, one panel after the other, as a processor fetches ahead what is read in order.
  void few_on_tiles(int b, int n) {
    finish_stores();
    const bf16* panel = blocks[b].keys + n / WIDTH * shape.keys_of_head.panel;
    clear_sums<false>();
    for (int d = 0; d < shape.D; d += 32) {
      _tile_loadd(6, panel + d * WIDTH, WIDTH * 4);
      _tile_loadd(4, queries + d, D * 2);
      _tile_dpbf16ps(0, 4, 6);
    }
    if (n + WIDTH < blocks[b].count) {
      panel += shape.keys_of_head.panel;
      for (int d = 0; d < shape.D; d += 32) {
        _tile_loadd(7, panel + d * WIDTH, WIDTH * 4);
        _tile_loadd(4, queries + d, D * 2);
        _tile_dpbf16ps(1, 4, 7);
      }
    }
    store_sums<false>(scores + b * shape.scores + n, score_row);
  }
  template <bool TWO> void values_on_tiles(int m, int e) {
    float* sums = out + m * out_row + e;
    const int64_t panel = shape.values_of_head.panel;
    started ? load_sums<TWO>(sums, out_row) : clear_sums<TWO>();
    for (int b = 0; b < num_blocks; b++)
      if (blocks[b].count)
        multiply_tiles<TWO>(weights(m) + b * shape.scores, weight_row(), values_of(b, e), panel,
                            ceil_to(blocks[b].count, 32));
    store_sums<TWO>(sums, out_row);
  }
#endif

  // What was never written weighs nothing, but may be NaN.
  void clear_unwritten(int b) {
    const int written = blocks[b].written;
    if (!blocks[b].count || written == s.block_size) return;
    const int64_t whole = shape.values_of_head.panel, kept = int64_t((written + 1) / 2) * WIDTH * 2;
    for (int e = 0; e < shape.E; e += WIDTH) {
      C* to = cleared + e / WIDTH * whole;
      std::memcpy((void*)to, values_of(b, e), sizeof(C) * kept);
      std::memset((void*)(to + kept), 0, sizeof(C) * (whole - kept));
      if (written % 2)
        for (int i = 1; i < WIDTH * 2; i += 2) to[kept - i] = C{};
    }
    blocks[b].values = cleared;
  }

  bool plain() const { return s.softcap == 0 && !call.slopes && s.scale > 0; }  // the scale can wait

  // Row m's products as scores, but for the scale where they are plain: cap, bias and mask. The largest, scaled.
  float look(int m, int at, int position, int head) {
    const Row& row = this->row[m];
    float* score = scores + m * score_row;
    const bool plain = this->plain();
    int from = begin_column, to = begin_column;  // between these every score is seen, and plain
    if (plain && shape.scores == s.block_size) {
      from = std::clamp(ceil_to(row.low - at, LANES), begin_column, end_column);
      to = std::clamp((row.high - at) / LANES * LANES, from, end_column);
    }
    F32 most = splat(-INF), other = most;
    const auto mask = [&](int begin, int end) {
      for (int c = begin; c < end; c += LANES) {
        const I32 key = load_raw<I32>(offsets + c) + at;
        F32 x = load(score + c);
        if (!plain) x = changed(x, key - position, head * G + m % G);
        x = ((key >= row.low) & (key < row.high)) ? x : splat(-INF);
        store(score + c, x);
        most = max(most, x);
      }
    };
    mask(begin_column, from);
    int c = from;
    for (; c + 2 * LANES <= to; c += 2 * LANES)
      most = max(most, load(score + c)), other = max(other, load(score + c + LANES));
    if (c < to) most = max(most, load(score + c));
    mask(to, end_column);
    return largest(max(most, other)) * (plain ? s.scale : 1);
  }

  // From row m's scores, `largest` among them, to weights: the softmax so far.
  void weigh(int m, float largest) {
    Row& row = this->row[m];
    float* sum = out + m * out_row;
    const float maximum = std::max(row.maximum, largest);
    const float factor = row.maximum == maximum ? 1 : row.maximum == -INF ? 0 : std::exp(row.maximum - maximum);
    row.maximum = maximum;
    F32 total = load(totals + m * LANES) * factor;
    const Exponent<X> exponent(plain() ? s.scale : 1, maximum == -INF ? 0 : maximum);
    to_weights(weights(m), scores + m * score_row, exponent, total);
    store(totals + m * LANES, total);
    if (started && factor != 1)
      for (int e = 0; e < shape.E; e += LANES) store(sum + e, load(sum + e) * factor);
  }

  template <class T> INLINE static void store_both(T* to, F32 a, F32 b) { store(to, a), store(to + LANES, b); }
#if defined(__AVX512BF16__) && defined(__AVX512F__)
  INLINE static void store_both(bf16* to, F32 a, F32 b) { store_raw(to, _mm512_cvtne2ps_pbh((__m512)b, (__m512)a)); }
#endif
  void to_weights(X* weight, const float* score, const Exponent<X> exponent, F32& total) const {
    F32 other = F32{};
    int c = begin_column;
    for (; c + 2 * LANES <= end_column; c += 2 * LANES) {
      const F32 a = exponent(load(score + c)), b = exponent(load(score + c + LANES));
      total += a, other += b;
      store_both(weight + c, a, b);
    }
    for (; c < end_column; c += LANES) {
      const F32 a = exponent(load(score + c));
      total += a;
      store(weight + c, a);
    }
    total += other;
  }

  // Scaled scores, with what makes them other than products.
  F32 changed(F32 x, I32 distance, int h) const {
    x = x * s.scale;
    if (s.softcap != 0) x = tanh(x / s.softcap) * s.softcap;
    if (!call.slopes) return x;
    return x + (s.relative < 0 ? call.slopes[h] * __builtin_convertvector(distance, F32) : learned(distance, h));
  }

  F32 learned(I32 distance, int h) const {
    const float* middle = call.slopes + int64_t(h) * (2 * s.relative + 1) + s.relative;
    F32 bias;
    for (int i = 0; i < LANES; i++) bias[i] = middle[std::max(-s.relative, std::min(int32_t(distance[i]), s.relative))];
    return bias;
  }

  void keep(const Item& item, int head, int m, float sum) {
    float* to = partial(item.part, head, m);
    std::memcpy(to, out + m * out_row, sizeof(float) * shape.E);
    to[shape.E] = row[m].maximum;
    to[shape.E + 1] = sum;
  }

  template <class S> void finish(const Item& item, int head, int m, float sum) {
    const int64_t token = item.token + m / G, h = head * G + m % G;
    float maximum = row[m].maximum, factor = 1;
    if (call.sinks && call.sinks[h] != -INF) {
      const float with = std::max(maximum, call.sinks[h]);
      factor = std::exp(maximum - with);
      sum = sum * factor + std::exp(call.sinks[h] - with);
      maximum = with;
    }
    if (call.lse) call.lse[token * call.lse_token + h] = maximum + std::log(sum);
    const float* from = out + m * out_row;
    S* to = result<S>(item, head, m);
    factor /= sum;
    int e = 0;
    for (; e + LANES <= s.v_head_dim; e += LANES) store(to + e, load(from + e) * factor);
    for (; e < s.v_head_dim; e++) from_float(from[e] * factor, to + e);
  }
};

template <class S, class C> void attend(const Spec& s, const Step& step, const Call& call) {
  using X = std::conditional_t<MULTIPLIES_BF16 && std::is_same_v<S, bf16> && std::is_same_v<C, bf16>, bf16, float>;
  int most_tokens = 1;
  bool cut = false;
  for (int64_t i = 0; i < step.num_items; i++) {
    most_tokens = std::max(most_tokens, step.items[i].num_tokens);
    cut |= step.items[i].merges;
  }
  const int64_t num = step.num_items * s.num_kv_heads;
  Work work(num, s.num_threads);
  Writes<S, C> writes(s, step, call);
  tiles_allowed();  // asked for before other threads need them
#pragma omp parallel num_threads(s.num_threads)
  {
    Tile<X, C> tile(s, step, call, most_tokens);
    int range = omp_get_thread_num();
    for (int64_t i; (i = work.take(range)) >= 0;) {  // a head's items follow one another, as they read the same
      const int64_t j = work.peek(range);
      const Item* next = j < 0 ? nullptr : &step.items[j % step.num_items];
      const int head = int(i / step.num_items);
      writes.finish(head);
      tile.template run<S>(step.items[i % step.num_items], head, next, int(j / step.num_items));
    }
    if (cut) {
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < num; i++) {
        const Item& item = step.items[i / s.num_kv_heads];
        if (item.merges) tile.template merge<S>(item, int(i % s.num_kv_heads));
      }
    }
  }
}

template <class S> void attend(const Spec& s, const Step& step, const Call& call) {
  if (s.kv_dtype == FLOAT32) attend<S, float>(s, step, call);
  if (s.kv_dtype == BFLOAT16) attend<S, bf16>(s, step, call);
  if (s.kv_dtype == FLOAT16) attend<S, f16>(s, step, call);
}

}  // namespace

extern "C" void engine_attention(const Spec* s, const Step* step, const Call* call) {
  if (s->dtype == FLOAT32) attend<float>(*s, *step, *call);
  if (s->dtype == BFLOAT16) attend<bf16>(*s, *step, *call);
  if (s->dtype == FLOAT16) attend<f16>(*s, *step, *call);
}

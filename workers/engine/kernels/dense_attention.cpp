// Attention over sequences whose keys and values lie in one piece, in bfloat16, for CPUs that multiply it (AVX512-BF16).
// Called through ctypes, so it knows nothing of torch.
//
// A task takes some rows of one sequence and the query heads of one kv head. It lays out keys and values in pairs, as
// the processor's product wants them, and then takes six rows at a time: scores in float over all tokens that these rows
// see, their softmax, and the values weighted by it, rounded to bfloat16 as torch's own kernel does it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

struct Call {            // must match `_Call` in dense_attention.py; strides in elements
    void *out;                          // [rows, heads, head_dim], contiguous
    const void *query, *key, *value;    // query [rows, heads, head_dim], the others [tokens, kv_heads, head_dim]
    const int64_t *row_ends, *token_ends;  // [sequences]: each begins where the one before it ends
    int64_t query_row, query_head, key_row, key_head, value_row, value_head;
    int64_t sequences, heads, kv_heads, head_dim, threads;
    int64_t causal;                     // the rows are a sequence's last, and each sees the tokens up to its own
    int64_t window;                     // and so many of them at most
    float scale;
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

constexpr int64_t LANES = 16, ROWS = 6, TILE = 4;  // 6 x 4 vectors of sums leave room for what they are made of
constexpr int64_t LEAST_ROWS = 64;                  // of a task: each lays out the keys and values anew
typedef uint16_t Bits;                              // of a bfloat16

static inline int64_t up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

// e^x for x <= 0, within 2 ulp; NaN gives NaN.
static inline __m512 exp_negative(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);  // the second operand where one is NaN
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(1.9875691500e-4f), _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

// sums[R, N vectors] = left [R, 2 * pairs] x right, of which `right` holds, pair by pair of rows, their columns in turn.
template <int R, int N>
static inline void multiply(const Bits *left, int64_t left_row, const uint32_t *right, int64_t right_row, int64_t pairs,
                            float *sums, int64_t sums_row) {
    __m512 sum[R][N];
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) sum[r][n] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs; ++pair) {
        __m512bh columns[N];
        for (int n = 0; n < N; ++n) columns[n] = (__m512bh)_mm512_loadu_si512(right + pair * right_row + n * LANES);
        for (int r = 0; r < R; ++r) {
            int32_t both;
            std::memcpy(&both, left + r * left_row + 2 * pair, sizeof both);
            const __m512bh row = (__m512bh)_mm512_set1_epi32(both);
            for (int n = 0; n < N; ++n) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], row, columns[n]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) _mm512_storeu_ps(sums + r * sums_row + n * LANES, sum[r][n]);
}

// The same over all of `columns`, a multiple of 16.
template <int R>
static void product(const Bits *left, int64_t left_row, const uint32_t *right, int64_t right_row, int64_t pairs,
                    int64_t columns, float *sums, int64_t sums_row) {
    int64_t at = 0;
    for (; at + TILE * LANES <= columns; at += TILE * LANES)
        multiply<R, TILE>(left, left_row, right + at, right_row, pairs, sums + at, sums_row);
    for (; at < columns; at += LANES)
        multiply<R, 1>(left, left_row, right + at, right_row, pairs, sums + at, sums_row);
}
using Product = void (*)(const Bits *, int64_t, const uint32_t *, int64_t, int64_t, int64_t, float *, int64_t);
static const Product PRODUCTS[] = {product<1>, product<2>, product<3>, product<4>, product<5>, product<6>};

// Memory of one thread.
struct Scratch {
    std::vector<uint32_t> keys, values;  // [dim / 2, tokens] and [tokens / 2, dim], in pairs
    std::vector<Bits> queries, weights;  // [ROWS, dim] and [ROWS, tokens]
    std::vector<float> scores, mixed;    // [ROWS, tokens] and [ROWS, dim]
};

struct Part {  // what a task does
    int64_t sequence, kv_head, first, last;  // rows of the sequence
};

// Lays out `count` keys in pairs of their numbers: [pairs of head_dim][tokens].
static void lay_out_keys(const Call &call, const Bits *keys, int64_t count, int64_t width, uint32_t *to) {
    for (int64_t block = 0; block < width; block += LANES)
        for (int64_t d = 0; d < call.head_dim; d += 2) {
            uint32_t *column = to + d / 2 * width + block;
            for (int64_t t = 0; t < LANES; ++t) {
                const Bits *pair = keys + (block + t) * call.key_row + d;
                const bool inside = block + t < count;
                column[t] = inside ? pair[0] : 0;
                if (inside && d + 1 < call.head_dim) column[t] |= static_cast<uint32_t>(pair[1]) << 16;
            }
        }
}

// Lays out `count` values in pairs of tokens: [pairs of tokens][head_dim].
static void lay_out_values(const Call &call, const Bits *values, int64_t count, int64_t width, uint32_t *to) {
    for (int64_t pair = 0; pair < up(count, LANES) / 2; ++pair) {
        const Bits *even = values + 2 * pair * call.value_row, *odd = even + call.value_row;
        uint32_t *row = to + pair * width;
        std::fill(row, row + width, 0);  // weights of 0 must not meet NaN
        if (2 * pair + 1 < count)
            for (int64_t d = 0; d < call.head_dim; ++d) row[d] = even[d] | static_cast<uint32_t>(odd[d]) << 16;
        else if (2 * pair < count)
            for (int64_t d = 0; d < call.head_dim; ++d) row[d] = even[d];
    }
}

// Turns scores of tokens [from, to) of one row into weights, bfloat16 up to `width`; returns their sum.
static float soften(float *scores, int64_t from, int64_t to, int64_t width, float scale, Bits *weights) {
    for (int64_t t = 0; t < from; ++t) scores[t] = -INFINITY;
    for (int64_t t = to; t < width; ++t) scores[t] = -INFINITY;
    __m512 highest = _mm512_set1_ps(-INFINITY);
    for (int64_t t = 0; t < width; t += LANES) highest = _mm512_max_ps(_mm512_loadu_ps(scores + t), highest);
    const __m512 factor = _mm512_set1_ps(scale), base = _mm512_set1_ps(scale * _mm512_reduce_max_ps(highest));
    __m512 sum = _mm512_setzero_ps();
    for (int64_t t = 0; t < width; t += LANES) {
        const __m512 score = _mm512_loadu_ps(scores + t);
        const __mmask16 seen = _mm512_cmp_ps_mask(score, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
        const __m512 weight = _mm512_maskz_mov_ps(seen, exp_negative(_mm512_fmsub_ps(score, factor, base)));
        sum = _mm512_add_ps(sum, weight);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(weights + t), (__m256i)_mm512_cvtneps_pbh(weight));
    }
    return _mm512_reduce_add_ps(sum);
}

static void store(const float *mixed, float factor, int64_t dim, Bits *to) {
    const __m512 by = _mm512_set1_ps(factor);
    for (int64_t d = 0; d < dim; d += LANES) {
        const __m256i half = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(mixed + d), by));
        const __mmask16 inside = dim - d >= LANES ? 0xFFFF : (1u << (dim - d)) - 1;
        _mm256_mask_storeu_epi16(to + d, inside, half);
    }
}

static void attend(const Call &call, const Part &part, Scratch &scratch) {
    const int64_t dim = call.head_dim, even_dim = up(dim, 2), wide_dim = up(dim, LANES);
    const int64_t group = call.heads / call.kv_heads, sequence = part.sequence;
    const int64_t row0 = sequence ? call.row_ends[sequence - 1] : 0;
    const int64_t token0 = sequence ? call.token_ends[sequence - 1] : 0;
    const int64_t tokens = call.token_ends[sequence] - token0;
    const int64_t before = tokens - (call.row_ends[sequence] - row0);  // tokens before the first row, if causal
    const int64_t end = call.causal ? before + part.last : tokens, width = up(end, LANES);
    scratch.keys.resize(even_dim / 2 * width);
    scratch.values.resize(width / 2 * wide_dim);
    scratch.queries.assign(ROWS * even_dim, 0);
    scratch.weights.resize(ROWS * width);
    scratch.scores.resize(ROWS * width);
    scratch.mixed.resize(ROWS * wide_dim);
    lay_out_keys(call, static_cast<const Bits *>(call.key) + token0 * call.key_row + part.kv_head * call.key_head, end,
                 width, scratch.keys.data());
    lay_out_values(call, static_cast<const Bits *>(call.value) + token0 * call.value_row + part.kv_head * call.value_head,
                   end, wide_dim, scratch.values.data());
    for (int64_t head = part.kv_head * group; head < (part.kv_head + 1) * group; ++head)
        for (int64_t row = part.first; row < part.last; row += ROWS) {
            const int64_t count = std::min(ROWS, part.last - row);
            for (int64_t r = 0; r < count; ++r)
                std::memcpy(scratch.queries.data() + r * even_dim,
                            static_cast<const Bits *>(call.query) + (row0 + row + r) * call.query_row +
                                head * call.query_head,
                            dim * sizeof(Bits));
            // Whole tiles of what the last of these rows sees.
            const int64_t last_seen = call.causal ? before + row + count : tokens, seen = up(last_seen, LANES);
            float sums[ROWS], *scores = scratch.scores.data();
            const Product product = PRODUCTS[count - 1];
            product(scratch.queries.data(), even_dim, scratch.keys.data(), width, even_dim / 2, seen, scores, width);
            for (int64_t r = 0; r < count; ++r) {
                const int64_t to = call.causal ? before + row + r + 1 : tokens;
                const int64_t from = call.causal ? std::max<int64_t>(0, to - call.window) : 0;
                sums[r] = soften(scores + r * width, from, to, seen, call.scale, scratch.weights.data() + r * width);
            }
            product(scratch.weights.data(), width, scratch.values.data(), wide_dim, seen / 2, wide_dim,
                    scratch.mixed.data(), wide_dim);
            for (int64_t r = 0; r < count; ++r)
                store(scratch.mixed.data() + r * wide_dim, 1.0f / sums[r], dim,
                      static_cast<Bits *>(call.out) + ((row0 + row + r) * call.heads + head) * dim);
        }
}

// Returns 0; 1 where the processor can't.
extern "C" int64_t epd_dense_attention(const Call *call) {
    std::vector<Part> parts;
    const int64_t pairs = call->sequences * call->kv_heads;
    const int64_t cuts = call->threads > 1 ? std::max<int64_t>(1, 2 * call->threads / pairs) : 1;
    for (int64_t sequence = 0; sequence < call->sequences; ++sequence) {
        const int64_t rows = call->row_ends[sequence] - (sequence ? call->row_ends[sequence - 1] : 0);
        const int64_t step = std::max(LEAST_ROWS, up((rows + cuts - 1) / cuts, ROWS));
        for (int64_t kv_head = 0; kv_head < call->kv_heads; ++kv_head)
            for (int64_t first = 0; first < rows; first += step)
                parts.push_back({sequence, kv_head, first, std::min(rows, first + step)});
    }
#pragma omp parallel num_threads(call->threads) if (call->threads > 1 && parts.size() > 1)
    {
        static thread_local Scratch scratch;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < static_cast<int64_t>(parts.size()); ++i) attend(*call, parts[i], scratch);
    }
    return 0;
}
#else
extern "C" int64_t epd_dense_attention(const Call *) { return 1; }
#endif

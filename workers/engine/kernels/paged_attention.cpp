// Attention of decoding rows over the paged KV cache, for CPUs. Called through ctypes, so it knows nothing of torch.
//
// Each row attends over the blocks of its own sequence where they lie: nothing is gathered, padded or masked. The query
// heads that share a kv head are computed together, so that a key or value is read and converted once, and so are all kv
// heads of some tokens, which lie side by side: memory gives whole blocks faster than every other piece of them. Work is
// cut into (row, share of the kv heads, partition of the context), kv heads only where there are too few rows for the
// threads. Partitions are merged by their maxima and sums, as FlashDecoding does.
//
// The storage type and the head size are template arguments, so that the inner loops become straight vector code.
// Products are in float, or in bfloat16 with sums in float where that is stored and the processor multiplies it
// (AVX512-BF16). Then the weights of the values are rounded to bfloat16, as torch's own kernels do it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_BF16_PRODUCTS 1
#include <immintrin.h>
#else
#define HAS_BF16_PRODUCTS 0
#endif

struct Step {            // what all layers of a step share; must match `_Step` in paged_attention.py
    const int64_t *slots;         // [tokens]: where the keys and values of each row go
    const int32_t *block_tables;  // [rows, table_width]
    const int32_t *lengths;       // [rows]: tokens that a row sees, its own included
    float *partials;              // [rows * shares * partitions, heads / shares * (head_dim + 2)]
    int64_t tokens, rows, table_width;
    int64_t heads, kv_heads, head_dim, block_size, shares, partitions, threads, dtype;
};

struct Call {            // what one layer adds; must match `_Call`; strides in elements
    void *out;                    // [tokens, heads, head_dim], contiguous
    const void *query, *key, *value;
    void *key_cache, *value_cache;  // [blocks, block_size, kv_heads, head_dim]
    int64_t query_row, query_head, key_row, key_head, value_row, value_head;
    int64_t window;               // tokens that a row sees at most
    float scale;
};

// Sixteen lanes, whatever the processor has: compilers split them where registers are shorter.
constexpr int64_t LANES = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

struct BFloat16 { uint16_t bits; };

static inline float to_float(float x) { return x; }
static inline float to_float(_Float16 x) { return static_cast<float>(x); }
static inline float to_float(BFloat16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
template <typename T>
static inline Floats load(const T *from) {
    Floats lanes;
    for (int64_t i = 0; i < LANES; ++i) lanes[i] = to_float(from[i]);
    return lanes;
}
template <>
inline Floats load(const float *from) {
    Floats lanes;
    std::memcpy(&lanes, from, sizeof lanes);
    return lanes;
}
template <>
inline Floats load(const BFloat16 *from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
}
static inline void store(float *to, float x) { *to = x; }
static inline void store(_Float16 *to, float x) { *to = static_cast<_Float16>(x); }
static inline void store(BFloat16 *to, float x) {  // to the nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    to->bits = static_cast<uint16_t>(x != x ? 0x7FC0 : rounded);
}

// e^x for x <= 0, within 2 ulp; NaN gives NaN.
static inline Floats exp_negative(Floats x) {
    x = x < -87.0f ? Floats{} - 87.0f : x;
    const Floats n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounded to a whole number
    const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
    return p * reinterpret_cast<Floats>(power);
}
static inline float exp_negative(float x) { return exp_negative(Floats{} + x)[0]; }

static inline float highest_of(Floats lanes) {
    float highest = lanes[0];
    for (int64_t i = 1; i < LANES; ++i) highest = lanes[i] > highest ? lanes[i] : highest;
    return highest;
}
static inline float sum_of(Floats lanes) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < LANES; ++i) sum += lanes[i];
    return sum;
}

// One stage of a transposition: exchanges lanes with bit STEP between rows with and without that bit.
template <int STEP>
static inline void exchange(Floats *rows) {
    Ints low, high;
    for (int32_t i = 0; i < LANES; ++i) {
        low[i] = i & STEP ? i - STEP + static_cast<int32_t>(LANES) : i;
        high[i] = i & STEP ? i + static_cast<int32_t>(LANES) : i + STEP;
    }
    for (int64_t row = 0; row < LANES; ++row) {
        if (row & STEP) continue;
        const Floats a = rows[row], b = rows[row + STEP];
        rows[row] = __builtin_shuffle(a, b, low);
        rows[row + STEP] = __builtin_shuffle(a, b, high);
    }
}
static inline void transpose(Floats *rows) {
    exchange<1>(rows);
    exchange<2>(rows);
    exchange<4>(rows);
    exchange<8>(rows);
}

template <typename T, int D>
static void write_cache(const Step &step, const Call &call, int64_t token) {
    const int64_t dim = D ? D : step.head_dim, width = step.kv_heads * dim;
    T *keys = static_cast<T *>(call.key_cache) + step.slots[token] * width;
    T *values = static_cast<T *>(call.value_cache) + step.slots[token] * width;
    for (int64_t head = 0; head < step.kv_heads; ++head) {
        const T *key = static_cast<const T *>(call.key) + token * call.key_row + head * call.key_head;
        const T *value = static_cast<const T *>(call.value) + token * call.value_row + head * call.value_head;
        std::memcpy(keys + head * dim, key, dim * sizeof(T));
        std::memcpy(values + head * dim, value, dim * sizeof(T));
    }
}

// scores[g] = queries[g] · key of each of 16 tokens; `keys` is [padded dim] by token, `queries` [G, padded dim].
template <int G>
static void score(const float *queries, const Floats *keys, int64_t padded, Floats *scores) {
    Floats sums[G] = {};
    for (int64_t d = 0; d < padded; ++d)
        for (int g = 0; g < G; ++g) sums[g] += queries[g * padded + d] * keys[d];
    for (int g = 0; g < G; ++g) scores[g] = sums[g];
}

// mixed[g] += the values of `count` tokens, weighted; `values` is [16, padded dim], `mixed` [G, padded dim].
template <int G>
static void mix(const Floats *weights, const Floats *values, int64_t padded, int64_t count, Floats *mixed) {
    const int64_t chunks = padded / LANES;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        Floats sums[G];
        for (int g = 0; g < G; ++g) sums[g] = mixed[g * chunks + chunk];
        for (int64_t t = 0; t < count; ++t)
            for (int g = 0; g < G; ++g) sums[g] += weights[g][t] * values[t * chunks + chunk];
        for (int g = 0; g < G; ++g) mixed[g * chunks + chunk] = sums[g];
    }
}

using Score = void (*)(const float *, const Floats *, int64_t, Floats *);
using Mix = void (*)(const Floats *, const Floats *, int64_t, int64_t, Floats *);
constexpr int64_t MOST_HEADS = 8;  // that are computed at once: their sums fit into registers
static const Score SCORES[] = {score<1>, score<2>, score<3>, score<4>, score<5>, score<6>, score<7>, score<8>};
static const Mix MIXES[] = {mix<1>, mix<2>, mix<3>, mix<4>, mix<5>, mix<6>, mix<7>, mix<8>};

// Memory of one thread. Head sizes are padded with zeros to whole vectors.
struct Scratch {
    std::vector<Floats> queries, keys, values, weights, mixed;
    std::vector<float> maxima, sums;
    int64_t padded;
    Scratch(int64_t heads, int64_t dim)
        : maxima(heads), sums(heads), padded((dim + LANES - 1) / LANES * LANES) {
        const int64_t chunks = padded / LANES;
        queries.resize(heads * chunks);
        mixed.resize(heads * chunks);
        values.resize(LANES * chunks);
        keys.resize(padded);
        weights.resize(heads);
    }
};

template <typename T, int D>
static inline void load_row(const T *from, int64_t dim, int64_t chunks, Floats *to) {
    if (D) {
        for (int64_t chunk = 0; chunk < D / LANES; ++chunk) to[chunk] = load(from + chunk * LANES);
        return;
    }
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t count = std::min(LANES, dim - chunk * LANES);
        to[chunk] = Floats{};
        for (int64_t i = 0; i < count; ++i) to[chunk][i] = to_float(from[chunk * LANES + i]);
    }
}

// Blocks lie anywhere, so the processor does not foresee where the next tokens come from. `width` numbers of each.
template <typename T>
static inline void prefetch(const T *from, int64_t stride, int64_t width, int64_t count) {
    if (stride == width) width *= std::exchange(count, 1);
    for (int64_t t = 0; t < count; ++t)
        for (int64_t d = 0; d < width; d += 64 / static_cast<int64_t>(sizeof(T)))
            __builtin_prefetch(from + t * stride + d);
}

// What `attend` computes of 16 tokens and the query heads [first, last) of one kv head, in float. `at` is where each
// token's key and value lie; those behind `count` repeat another one, and count for nothing.
template <typename T, int D>
struct InFloat {
    static void load_query(const T *from, int64_t dim, float scale, int64_t g, Scratch &scratch) {
        const int64_t chunks = (D ? D : scratch.padded) / LANES;
        Floats *to = scratch.queries.data() + g * chunks;
        load_row<T, D>(from, dim, chunks, to);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) to[chunk] *= scale;
    }
    static void score_tokens(const T *keys, const int64_t *at, int64_t dim, int64_t first, int64_t last, float,
                             Scratch &scratch) {
        const int64_t padded = D ? D : scratch.padded, chunks = padded / LANES;
        Floats rows[LANES];
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            for (int64_t t = 0; t < LANES; ++t)
                load_row<T, D ? LANES : 0>(keys + at[t] + chunk * LANES, dim - chunk * LANES, 1, rows + t);
            transpose(rows);
            for (int64_t d = 0; d < LANES; ++d) scratch.keys[chunk * LANES + d] = rows[d];
        }
        for (int64_t g = first; g < last; g += MOST_HEADS) {
            const int64_t heads = std::min(MOST_HEADS, last - g);
            const float *queries = reinterpret_cast<const float *>(scratch.queries.data() + g * chunks);
            SCORES[heads - 1](queries, scratch.keys.data(), padded, scratch.weights.data() + g);
        }
    }
    static void mix_values(const T *values, const int64_t *at, int64_t dim, int64_t first, int64_t last, int64_t count,
                           Scratch &scratch) {
        const int64_t padded = D ? D : scratch.padded, chunks = padded / LANES;
        Floats *loaded = scratch.values.data();
        for (int64_t t = 0; t < count; ++t) load_row<T, D>(values + at[t], dim, chunks, loaded + t * chunks);
        for (int64_t g = first; g < last; g += MOST_HEADS) {
            const int64_t heads = std::min(MOST_HEADS, last - g);
            MIXES[heads - 1](scratch.weights.data() + g, loaded, padded, count, scratch.mixed.data() + g * chunks);
        }
    }
    static void finish(int64_t, Scratch &) {}
};

#if HAS_BF16_PRODUCTS
// The same in bfloat16, two numbers a lane: of queries and keys two of a head, of weights and values two tokens' own.
template <int D>
struct InPairs {
    static constexpr int64_t PAIRS = D / 2, CHUNKS = D / LANES;

    static void load_query(const BFloat16 *from, int64_t, float, int64_t g, Scratch &scratch) {
        std::memcpy(scratch.queries.data() + g * CHUNKS, from, D * sizeof(BFloat16));
    }
    static void score_tokens(const BFloat16 *keys, const int64_t *at, int64_t, int64_t first, int64_t last, float scale,
                             Scratch &scratch) {
        Floats columns[PAIRS];  // of all 16 tokens, pair by pair
        for (int64_t pair = 0; pair < PAIRS; pair += LANES) {
            for (int64_t t = 0; t < LANES; ++t)
                std::memcpy(columns + pair + t, keys + at[t] + 2 * pair, sizeof(Floats));
            transpose(columns + pair);
        }
        for (int64_t g = first; g < last; ++g) {
            const int32_t *query = reinterpret_cast<const int32_t *>(scratch.queries.data() + g * CHUNKS);
            __m512 sums[4] = {};  // a single one would wait for itself
            for (int64_t pair = 0; pair < PAIRS; pair += 4)
                for (int64_t i = 0; i < 4; ++i)
                    sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)_mm512_set1_epi32(query[pair + i]),
                                               (__m512bh)columns[pair + i]);
            scratch.weights[g] = (Floats)((sums[0] + sums[1]) + (sums[2] + sums[3])) * scale;
        }
    }
    template <int G>
    static void mix_heads(const BFloat16 *values, const int64_t *at, const int32_t *weights, __m512 *mixed) {
        for (int64_t chunk = 0; chunk < CHUNKS; chunk += 2) {
            __m512 low[G], high[G];
            for (int g = 0; g < G; ++g) low[g] = mixed[g * CHUNKS + chunk], high[g] = mixed[g * CHUNKS + chunk + 1];
            for (int64_t t = 0; t < LANES; t += 2) {
                const __m512i even = _mm512_loadu_si512(values + at[t] + chunk * LANES);
                const __m512i odd = _mm512_loadu_si512(values + at[t + 1] + chunk * LANES);
                const __m512bh first = (__m512bh)_mm512_unpacklo_epi16(even, odd);
                const __m512bh second = (__m512bh)_mm512_unpackhi_epi16(even, odd);
                for (int g = 0; g < G; ++g) {
                    const __m512bh weight = (__m512bh)_mm512_set1_epi32(weights[g * LANES / 2 + t / 2]);
                    low[g] = _mm512_dpbf16_ps(low[g], weight, first);
                    high[g] = _mm512_dpbf16_ps(high[g], weight, second);
                }
            }
            for (int g = 0; g < G; ++g) mixed[g * CHUNKS + chunk] = low[g], mixed[g * CHUNKS + chunk + 1] = high[g];
        }
    }
    static void mix_values(const BFloat16 *values, const int64_t *at, int64_t, int64_t first, int64_t last, int64_t,
                           Scratch &scratch) {
        using Mix = void (*)(const BFloat16 *, const int64_t *, const int32_t *, __m512 *);
        static constexpr Mix MIXES[] = {mix_heads<1>, mix_heads<2>, mix_heads<3>, mix_heads<4>,
                                        mix_heads<5>, mix_heads<6>, mix_heads<7>, mix_heads<8>};
        for (int64_t g = first; g < last; g += MOST_HEADS) {
            const int64_t heads = std::min(MOST_HEADS, last - g);
            alignas(64) int32_t weights[MOST_HEADS * LANES / 2];
            for (int64_t i = 0; i < heads; ++i)
                _mm256_store_si256(reinterpret_cast<__m256i *>(weights + i * LANES / 2),
                                   (__m256i)_mm512_cvtneps_pbh((__m512)scratch.weights[g + i]));
            MIXES[heads - 1](values, at, weights, reinterpret_cast<__m512 *>(scratch.mixed.data() + g * CHUNKS));
        }
    }
    // Pairs of tokens leave the numbers of two vectors in fours: 0-3, 8-11, … in one, 4-7, 12-15, … in the other.
    static void finish(int64_t heads, Scratch &scratch) {
        const __m512i lower = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(8));
        for (int64_t chunk = 0; chunk < heads * CHUNKS; chunk += 2) {
            const __m512 low = (__m512)scratch.mixed[chunk], high = (__m512)scratch.mixed[chunk + 1];
            scratch.mixed[chunk] = (Floats)_mm512_permutex2var_ps(low, lower, high);
            scratch.mixed[chunk + 1] = (Floats)_mm512_permutex2var_ps(low, upper, high);
        }
    }
};
template <typename T, int D>
using Products = std::conditional_t<std::is_same_v<T, BFloat16> && D != 0, InPairs<D ? D : 64>, InFloat<T, D>>;
#else
template <typename T, int D>
using Products = InFloat<T, D>;
#endif

// Attends with the queries of one row and some kv heads over tokens [first, last) of its sequence. Leaves in `scratch`
// maxima and sums [heads], and mixed [heads, padded dim]: the values weighted by e^(score - maximum).
template <typename T, int D>
static void attend(const Step &step, const Call &call, int64_t row, int64_t share, int64_t first, int64_t last,
                   Scratch &scratch) {
    const int64_t dim = D ? D : step.head_dim, group = step.heads / step.kv_heads, size = step.block_size;
    const int64_t padded = D ? D : scratch.padded, chunks = padded / LANES;
    const int64_t kv_heads = step.kv_heads / step.shares, heads = kv_heads * group;
    for (int64_t g = 0; g < heads; ++g) {
        const T *query = static_cast<const T *>(call.query) + row * call.query_row +
                         (share * heads + g) * call.query_head;
        Products<T, D>::load_query(query, dim, call.scale, g, scratch);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) scratch.mixed[g * chunks + chunk] = Floats{};
        scratch.maxima[g] = -INFINITY;
        scratch.sums[g] = 0;
    }
    const int32_t *table = step.block_tables + row * step.table_width;
    const int64_t stride = step.kv_heads * dim, width = kv_heads * dim;
    const T *keys = static_cast<const T *>(call.key_cache) + share * width;
    const T *values = static_cast<const T *>(call.value_cache) + share * width;
    Floats *weights = scratch.weights.data();
    int64_t block = first / size, offset = first % size, at[LANES];
    for (int64_t begin = first; begin < last; begin += LANES) {
        const int64_t count = std::min(LANES, last - begin);
        for (int64_t t = 0; t < count; ++t) {
            at[t] = (table[block] * size + offset) * stride;
            if (++offset == size) {
                offset = 0;
                ++block;
            }
        }
        for (int64_t t = count; t < LANES; ++t) at[t] = at[0];  // masked below
        const bool has_next = begin + LANES < last;
        const int64_t next = has_next ? (table[block] * size + offset) * stride : 0;
        const int64_t next_count = has_next ? std::min(LANES, size - offset) : 0;
        prefetch(keys + next, stride, width, next_count);
        for (int64_t g = 0; g < heads; g += group)
            Products<T, D>::score_tokens(keys + g / group * dim, at, dim, g, g + group, call.scale, scratch);
        prefetch(values + next, stride, width, next_count);
        for (int64_t g = 0; g < heads; ++g) {
            for (int64_t t = count; t < LANES; ++t) weights[g][t] = -INFINITY;
            const float before = scratch.maxima[g], highest = std::max(before, highest_of(weights[g]));
            // Scores of -inf alone would give -inf - -inf; NaN is left to spread.
            const float base = highest == -INFINITY ? 0.0f : highest;
            weights[g] = exp_negative(weights[g] - base);
            for (int64_t t = count; t < LANES; ++t) weights[g][t] = 0;
            if (highest != before) {
                const float shrink = exp_negative(before - base);
                scratch.sums[g] *= shrink;
                for (int64_t chunk = 0; chunk < chunks; ++chunk) scratch.mixed[g * chunks + chunk] *= shrink;
                scratch.maxima[g] = highest;
            }
            scratch.sums[g] += sum_of(weights[g]);
        }
        for (int64_t g = 0; g < heads; g += group)
            Products<T, D>::mix_values(values + g / group * dim, at, dim, g, g + group, count, scratch);
    }
    Products<T, D>::finish(heads, scratch);
}

// Merges the partitions of one row and share of the kv heads into the output.
template <typename T>
static void merge(const Step &step, const Call &call, int64_t pair, int64_t dim) {
    const int64_t heads = step.heads / step.shares, record = heads * (dim + 2), parts = step.partitions;
    const float *partial = step.partials + pair * parts * record;
    T *out = static_cast<T *>(call.out) + pair * heads * dim;
    std::vector<float> mixed(dim);
    for (int64_t g = 0; g < heads; ++g) {
        float highest = -INFINITY, total = 0;
        for (int64_t p = 0; p < parts; ++p) highest = std::max(highest, partial[p * record + g]);
        const float base = highest == -INFINITY ? 0.0f : highest;
        std::fill(mixed.begin(), mixed.end(), 0.0f);
        for (int64_t p = 0; p < parts; ++p) {
            const float *from = partial + p * record;
            const float share = exp_negative(from[g] - base);
            total += from[heads + g] * share;
            for (int64_t d = 0; d < dim; ++d) mixed[d] += from[2 * heads + g * dim + d] * share;
        }
        for (int64_t d = 0; d < dim; ++d) store(out + g * dim + d, mixed[d] / total);
    }
}

template <typename T, int D>
static void decode(const Step &step, const Call &call) {
    const int64_t dim = D ? D : step.head_dim, heads = step.heads / step.shares;
    const int64_t record = heads * (dim + 2), pairs = step.rows * step.shares, parts = step.partitions;
#pragma omp parallel num_threads(static_cast<int>(step.threads)) if (step.threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t token = 0; token < step.tokens; ++token) write_cache<T, D>(step, call, token);
        Scratch scratch(heads, dim);
        const float *mixed = reinterpret_cast<const float *>(scratch.mixed.data());
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < pairs * parts; ++task) {
            const int64_t pair = task / parts, row = pair / step.shares, length = step.lengths[row];
            const int64_t seen_from = length > call.window ? length - call.window : 0, seen = length - seen_from;
            const int64_t first = seen_from + seen * (task % parts) / parts;
            const int64_t last = seen_from + seen * (task % parts + 1) / parts;
            attend<T, D>(step, call, row, pair % step.shares, first, last, scratch);
            if (parts == 1) {
                T *out = static_cast<T *>(call.out) + pair * heads * dim;
                for (int64_t g = 0; g < heads; ++g)
                    for (int64_t d = 0; d < dim; ++d)
                        store(out + g * dim + d, mixed[g * scratch.padded + d] / scratch.sums[g]);
                continue;
            }
            float *out = step.partials + task * record;
            for (int64_t g = 0; g < heads; ++g) {
                out[g] = scratch.maxima[g];
                out[heads + g] = scratch.sums[g];
                std::memcpy(out + 2 * heads + g * dim, mixed + g * scratch.padded, dim * sizeof(float));
            }
        }
        if (parts > 1) {
#pragma omp for schedule(static)
            for (int64_t pair = 0; pair < pairs; ++pair) merge<T>(step, call, pair, dim);
        }
    }
}

template <typename T>
static int by_head_dim(const Step &step, const Call &call) {
    switch (step.head_dim) {
        case 64: decode<T, 64>(step, call); return 0;
        case 128: decode<T, 128>(step, call); return 0;
        default: decode<T, 0>(step, call); return 0;
    }
}

// Writes the new keys and values of all tokens to the cache, then attends with the first `rows` of them.
extern "C" int epd_paged_decode(const Step *step, const Call *call) {
    switch (step->dtype) {
        case 0: return by_head_dim<float>(*step, *call);
        case 1: return by_head_dim<BFloat16>(*step, *call);
        case 2: return by_head_dim<_Float16>(*step, *call);
        default: return 1;
    }
}

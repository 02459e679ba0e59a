// Attention of decoding rows over the paged KV cache, for CPUs. Called through ctypes, so it knows nothing of torch.
//
// Each row attends over the blocks of its own sequence where they lie: nothing is gathered, padded or masked. The query
// heads that share a kv head are computed together, so that a key or value is read and converted once. Work is cut
// into (row, kv head, partition of the context); partitions are merged by their maxima and sums, as FlashDecoding does.
//
// The storage type and the head size are template arguments, so that the inner loops become straight vector code.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

struct Step {            // what all layers of a step share; must match `_Step` in paged_attention.py
    const int64_t *slots;         // [tokens]: where the keys and values of each row go
    const int32_t *block_tables;  // [rows, table_width]
    const int32_t *lengths;       // [rows]: tokens that a row sees, its own included
    float *partials;              // [rows * kv_heads * partitions, group * (head_dim + 2)]
    int64_t tokens, rows, table_width;
    int64_t heads, kv_heads, head_dim, block_size, partitions, threads, dtype;
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
    Scratch(int64_t group, int64_t dim)
        : maxima(group), sums(group), padded((dim + LANES - 1) / LANES * LANES) {
        const int64_t chunks = padded / LANES;
        queries.resize(group * chunks);
        mixed.resize(group * chunks);
        values.resize(LANES * chunks);
        keys.resize(padded);
        weights.resize(group);
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

// Blocks lie anywhere, so the processor does not foresee where the next tokens come from.
template <typename T>
static inline void prefetch(const Step &step, const T *keys, const T *values, int64_t block, int64_t offset,
                            int64_t dim) {
    const int64_t stride = step.kv_heads * dim, count = std::min(LANES, step.block_size - offset);
    const int64_t start = (block * step.block_size + offset) * stride;
    for (int64_t t = 0; t < count; ++t)
        for (int64_t d = 0; d < dim; d += 64 / static_cast<int64_t>(sizeof(T))) {
            __builtin_prefetch(keys + start + t * stride + d);
            __builtin_prefetch(values + start + t * stride + d);
        }
}

// Attends with the queries of one row and kv head over tokens [first, last) of its sequence. Leaves in `scratch`
// maxima and sums [group], and mixed [group, padded dim]: the values weighted by e^(score - maximum).
template <typename T, int D>
static void attend(const Step &step, const Call &call, int64_t row, int64_t kv_head, int64_t first, int64_t last,
                   Scratch &scratch) {
    const int64_t dim = D ? D : step.head_dim, group = step.heads / step.kv_heads, size = step.block_size;
    const int64_t padded = D ? D : scratch.padded, chunks = padded / LANES;
    for (int64_t g = 0; g < group; ++g) {
        const T *query = static_cast<const T *>(call.query) + row * call.query_row +
                         (kv_head * group + g) * call.query_head;
        Floats *to = scratch.queries.data() + g * chunks;
        load_row<T, D>(query, dim, chunks, to);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            to[chunk] *= call.scale;
            scratch.mixed[g * chunks + chunk] = Floats{};
        }
        scratch.maxima[g] = -INFINITY;
        scratch.sums[g] = 0;
    }
    const int32_t *table = step.block_tables + row * step.table_width;
    const int64_t stride = step.kv_heads * dim;
    const T *key_cache = static_cast<const T *>(call.key_cache) + kv_head * dim;
    const T *value_cache = static_cast<const T *>(call.value_cache) + kv_head * dim;
    Floats rows[LANES], *values = scratch.values.data(), *weights = scratch.weights.data();
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
        if (begin + LANES < last) prefetch<T>(step, key_cache, value_cache, table[block], offset, dim);
        for (int64_t t = 0; t < count; ++t)
            load_row<T, D>(value_cache + at[t], dim, chunks, values + t * chunks);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            for (int64_t t = 0; t < LANES; ++t)
                load_row<T, D ? LANES : 0>(key_cache + at[t] + chunk * LANES, dim - chunk * LANES, 1, rows + t);
            transpose(rows);
            for (int64_t d = 0; d < LANES; ++d) scratch.keys[chunk * LANES + d] = rows[d];
        }
        for (int64_t g = 0; g < group; g += MOST_HEADS) {
            const int64_t heads = std::min(MOST_HEADS, group - g);
            const float *queries = reinterpret_cast<const float *>(scratch.queries.data() + g * chunks);
            SCORES[heads - 1](queries, scratch.keys.data(), padded, weights + g);
        }
        for (int64_t g = 0; g < group; ++g) {
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
        for (int64_t g = 0; g < group; g += MOST_HEADS) {
            const int64_t heads = std::min(MOST_HEADS, group - g);
            MIXES[heads - 1](weights + g, values, padded, count, scratch.mixed.data() + g * chunks);
        }
    }
}

// Merges the partitions of one row and kv head into the output.
template <typename T>
static void merge(const Step &step, const Call &call, int64_t pair, int64_t dim) {
    const int64_t group = step.heads / step.kv_heads, record = group * (dim + 2), parts = step.partitions;
    const float *partial = step.partials + pair * parts * record;
    T *out = static_cast<T *>(call.out) + pair * group * dim;
    std::vector<float> mixed(dim);
    for (int64_t g = 0; g < group; ++g) {
        float highest = -INFINITY, total = 0;
        for (int64_t p = 0; p < parts; ++p) highest = std::max(highest, partial[p * record + g]);
        const float base = highest == -INFINITY ? 0.0f : highest;
        std::fill(mixed.begin(), mixed.end(), 0.0f);
        for (int64_t p = 0; p < parts; ++p) {
            const float *from = partial + p * record;
            const float share = exp_negative(from[g] - base);
            total += from[group + g] * share;
            for (int64_t d = 0; d < dim; ++d) mixed[d] += from[2 * group + g * dim + d] * share;
        }
        for (int64_t d = 0; d < dim; ++d) store(out + g * dim + d, mixed[d] / total);
    }
}

template <typename T, int D>
static void decode(const Step &step, const Call &call) {
    const int64_t dim = D ? D : step.head_dim, group = step.heads / step.kv_heads;
    const int64_t record = group * (dim + 2), pairs = step.rows * step.kv_heads, parts = step.partitions;
#pragma omp parallel num_threads(static_cast<int>(step.threads)) if (step.threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t token = 0; token < step.tokens; ++token) write_cache<T, D>(step, call, token);
        Scratch scratch(group, dim);
        const float *mixed = reinterpret_cast<const float *>(scratch.mixed.data());
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < pairs * parts; ++task) {
            const int64_t pair = task / parts, row = pair / step.kv_heads, length = step.lengths[row];
            const int64_t seen_from = length > call.window ? length - call.window : 0, seen = length - seen_from;
            const int64_t first = seen_from + seen * (task % parts) / parts;
            const int64_t last = seen_from + seen * (task % parts + 1) / parts;
            attend<T, D>(step, call, row, pair % step.kv_heads, first, last, scratch);
            if (parts == 1) {
                T *out = static_cast<T *>(call.out) + pair * group * dim;
                for (int64_t g = 0; g < group; ++g)
                    for (int64_t d = 0; d < dim; ++d)
                        store(out + g * dim + d, mixed[g * scratch.padded + d] / scratch.sums[g]);
                continue;
            }
            float *out = step.partials + task * record;
            for (int64_t g = 0; g < group; ++g) {
                out[g] = scratch.maxima[g];
                out[group + g] = scratch.sums[g];
                std::memcpy(out + 2 * group + g * dim, mixed + g * scratch.padded, dim * sizeof(float));
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

// Linear layers in eight bits, for CPUs with AVX512-VNNI. Called through ctypes, so it knows nothing of torch.
//
// Rows of activations are rounded to signed bytes, each row with a scale of its own; weights were rounded before, with
// a scale for each output. One instruction multiplies 64 pairs of bytes and adds them up by fours, but takes one side
// without sign: the weights are stored with 128 added, and the sums start at what that adds too much. Sums are exact.
//
// Weights lie in panels of 64 outputs: [outputs / 64][inputs / 4][64][4], so that a step with few rows, which waits
// for memory, reads all of them from front to back. Rows are computed MOST_ROWS at a time, whose sums fill the
// registers; a panel then comes from the cache for all rows but the first ones.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

struct Product {         // must match `_Product` in int8_kernel.py
    void *out;                    // [rows, outputs], of the type of `rows`
    const void *rows;             // [rows, inputs]
    const uint8_t *weight;        // panels
    const float *scales;          // [outputs]
    const float *bias;            // [outputs], or null
    int64_t num_rows, inputs, outputs, threads, dtype;
};

constexpr int64_t PANEL = 64;     // outputs
constexpr int64_t LANES = 16;
constexpr int64_t VECTORS = PANEL / LANES;
constexpr int64_t LINE = 64;      // bytes: a cache line, and a register
constexpr int64_t MOST_ROWS = 6;  // 24 sums, 4 weights, and one number of the rows: 29 of 32 registers
constexpr int64_t AHEAD = 4096;   // bytes that weights are asked for early

// Without it, sums are not kept in registers.
#define UNROLL _Pragma("GCC unroll 8")

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

static inline __m512 load(const float *from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }
static inline __m512 load(const BFloat16 *from, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}
static inline __m512 load(const Float16 *from, __mmask16 mask) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from));
}
static inline void store(float *to, __m512 x, __mmask16 mask) { _mm512_mask_storeu_ps(to, mask, x); }
static inline void store(Float16 *to, __m512 x, __mmask16 mask) {
    _mm256_mask_storeu_epi16(to, mask, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void store(BFloat16 *to, __m512 x, __mmask16 mask) {  // to the nearest, ties to even; NaN stays NaN
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000));
    _mm256_mask_storeu_epi16(to, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
}

static inline void store(const Product &product, int64_t index, __m512 values, __mmask16 mask) {
    switch (product.dtype) {
        case 0: return store(static_cast<float *>(product.out) + index, values, mask);
        case 1: return store(static_cast<BFloat16 *>(product.out) + index, values, mask);
        default: return store(static_cast<Float16 *>(product.out) + index, values, mask);
    }
}

static inline int64_t fours_of(const Product &product) { return (product.inputs + 3) / 4; }
static inline __mmask16 mask_of(int64_t left) { return left >= LANES ? 0xFFFF : (1u << left) - 1; }

struct Rounded {                  // all rows in eight bits
    std::vector<int8_t> codes;    // [rows, stride]; zeros behind the inputs
    std::vector<float> scales;
    std::vector<int32_t> starts;  // what sums start at
    int64_t stride;
};

template <typename T>
static void round_row(const Product &product, Rounded &rounded, int64_t row) {
    const int64_t inputs = product.inputs;
    const T *from = static_cast<const T *>(product.rows) + row * inputs;
    int8_t *to = rounded.codes.data() + row * rounded.stride;
    // As integers, the bits of a NaN without its sign are the largest of all, and so it spreads over its row.
    __m512i highest = _mm512_setzero_si512();
    const __m512i no_sign = _mm512_set1_epi32(0x7FFFFFFF);
    for (int64_t i = 0; i < inputs; i += LANES) {
        const __m512i bits = _mm512_castps_si512(load(from + i, mask_of(inputs - i)));
        highest = _mm512_max_epi32(highest, _mm512_and_si512(bits, no_sign));
    }
    const int32_t bits = _mm512_reduce_max_epi32(highest);
    float largest;
    std::memcpy(&largest, &bits, sizeof largest);
    if (largest < 1e-12f) largest = 1e-12f;
    const __m512 factor = _mm512_set1_ps(127.0f / largest);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < rounded.stride; i += LANES) {
        const __mmask16 mask = i < inputs ? mask_of(inputs - i) : 0;
        const __m512i codes = _mm512_cvtps_epi32(_mm512_mul_ps(load(from + i, mask), factor));
        sum = _mm512_add_epi32(sum, codes);
        _mm_storeu_si128(reinterpret_cast<__m128i *>(to + i), _mm512_cvtsepi32_epi8(codes));
    }
    rounded.scales[row] = largest / 127.0f;
    rounded.starts[row] = -128 * _mm512_reduce_add_epi32(sum);
}

// `_mm512_dpbusd_epi32`, which some compilers (GCC 12) surround with copies of registers, at half the speed.
static inline void add_products(__m512i &sums, __m512i weights, __m512i inputs) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(inputs));
}

// Rows [row, row + ROWS) times one panel. Meanwhile asks for `LINES` * inputs / 4 cache lines from `ahead` on.
template <int ROWS, int LINES>
static void multiply(const Product &product, const Rounded &rounded, int64_t row, int64_t panel,
                     const uint8_t *ahead) {
    const int64_t stride = rounded.stride, fours = fours_of(product);
    const uint8_t *weight = product.weight + panel * fours * LINE * VECTORS;
    const int8_t *codes = rounded.codes.data() + row * stride;
    __m512i sums[ROWS][VECTORS];
    UNROLL for (int64_t r = 0; r < ROWS; ++r)
        UNROLL for (int64_t v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_set1_epi32(rounded.starts[row + r]);
    for (int64_t four = 0; four < fours; ++four, weight += LINE * VECTORS, ahead += LINE * LINES) {
        UNROLL for (int64_t line = 0; line < LINES; ++line) __builtin_prefetch(ahead + line * LINE, 0, 2);
        __m512i weights[VECTORS];
        UNROLL for (int64_t v = 0; v < VECTORS; ++v) weights[v] = _mm512_loadu_si512(weight + v * LINE);
        UNROLL for (int64_t r = 0; r < ROWS; ++r) {
            int32_t bytes;
            std::memcpy(&bytes, codes + r * stride + four * 4, sizeof bytes);
            const __m512i inputs = _mm512_set1_epi32(bytes);
            UNROLL for (int64_t v = 0; v < VECTORS; ++v) add_products(sums[r][v], weights[v], inputs);
        }
    }
    UNROLL for (int64_t v = 0; v < VECTORS; ++v) {
        const int64_t column = panel * PANEL + v * LANES;
        if (column >= product.outputs) break;
        const __mmask16 mask = mask_of(product.outputs - column);
        const __m512 scales = load(product.scales + column, mask);
        const __m512 bias = product.bias ? load(product.bias + column, mask) : _mm512_setzero_ps();
        UNROLL for (int64_t r = 0; r < ROWS; ++r) {
            const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(rounded.scales[row + r]));
            const __m512 values = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][v]), scale, bias);
            store(product, (row + r) * product.outputs + column, values, mask);
        }
    }
}

template <int LINES, int ROWS = MOST_ROWS>
static void multiply_rows(const Product &product, const Rounded &rounded, int64_t row, int64_t count, int64_t panel,
                          const uint8_t *ahead) {
    if (count == ROWS) return multiply<ROWS, LINES>(product, rounded, row, panel, ahead);
    if constexpr (ROWS > 1) multiply_rows<LINES, ROWS - 1>(product, rounded, row, count, panel, ahead);
}

// All rows times one panel. With many rows, those that find the panel in the cache ask for the next one.
static void multiply_panel(const Product &product, const Rounded &rounded, int64_t panel) {
    const int64_t rows = product.num_rows, tiles = (rows + MOST_ROWS - 1) / MOST_ROWS, fours = fours_of(product);
    const uint8_t *next = product.weight + (panel + 1) * fours * LINE * VECTORS;
    if (tiles == 1) return multiply_rows<VECTORS>(product, rounded, 0, rows, panel, next - fours * LINE * VECTORS + AHEAD);
    const int64_t lines = tiles < VECTORS ? 2 : 1;
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = rows * tile / tiles, count = rows * (tile + 1) / tiles - first;
        const uint8_t *ahead = next + tile * fours * LINE * lines;
        if (tile * lines >= VECTORS)
            multiply_rows<0>(product, rounded, first, count, panel, ahead);
        else if (lines == 1)
            multiply_rows<1>(product, rounded, first, count, panel, ahead);
        else
            multiply_rows<2>(product, rounded, first, count, panel, ahead);
    }
}

template <typename T>
static void run(const Product &product) {
    static thread_local Rounded rounded;
    Rounded &shared = rounded;    // the calling thread's, for all threads
    const int64_t rows = product.num_rows, panels = (product.outputs + PANEL - 1) / PANEL;
    shared.stride = (product.inputs + PANEL - 1) / PANEL * PANEL;
    if (static_cast<int64_t>(shared.scales.size()) < rows) {
        shared.scales.resize(rows);
        shared.starts.resize(rows);
    }
    if (static_cast<int64_t>(shared.codes.size()) < rows * shared.stride) shared.codes.resize(rows * shared.stride);
#pragma omp parallel num_threads(static_cast<int>(product.threads)) if (product.threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) round_row<T>(product, shared, row);
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < panels; ++panel) multiply_panel(product, shared, panel);
    }
}

// Returns 0; 1 for a type that it doesn't know.
extern "C" int epd_int8_linear(const Product *product) {
    switch (product->dtype) {
        case 0: run<float>(*product); return 0;
        case 1: run<BFloat16>(*product); return 0;
        case 2: run<Float16>(*product); return 0;
        default: return 1;
    }
}

// Linear layers in bfloat16, for CPUs that multiply it in vectors (AVX512-BF16) but not in tiles. Called through ctypes,
// so it knows nothing of torch.
//
// Weights lie in panels of 64 outputs, by pairs of inputs: [outputs / 64][inputs / 2][64][2], so that a step with few
// rows, which waits for memory, reads all of them from front to back. Rows are computed MOST_ROWS at a time, whose sums
// fill the registers; a panel then comes from the cache for all rows but the first ones. Sums are floats, taken in the
// order of the inputs: what a row gives depends on that row alone, whatever it is computed with.

#include <algorithm>
#include <cstdint>
#include <cstring>

struct Product {         // must match `_Product` in bf16_kernel.py
    void *out;                    // [rows, outputs]
    const void *rows;             // [rows, inputs]
    const void *weight;           // panels
    const void *bias;             // [outputs], or null
    int64_t num_rows, inputs, outputs, threads;
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

constexpr int64_t PANEL = 64;     // outputs
constexpr int64_t LANES = 16;
constexpr int64_t VECTORS = PANEL / LANES;
constexpr int64_t LINE = 64;      // bytes: a cache line, and a register
constexpr int64_t MOST_ROWS = 6;  // 24 sums, 4 weights, and one pair of the rows: 29 of 32 registers
constexpr int64_t AHEAD = 4096;   // bytes that weights are asked for early
constexpr int64_t TURNS = 4;      // of a thread in one product: who was interrupted leaves the rest to the others
typedef uint16_t Bits;            // of a bfloat16

// Without it, sums are not kept in registers.
#define UNROLL _Pragma("GCC unroll 8")

static inline __mmask16 mask_of(int64_t left) { return left >= LANES ? 0xFFFF : (1u << left) - 1; }

// Rows [row, row + ROWS) times one panel. Meanwhile asks for `LINES` * inputs / 2 cache lines from `ahead` on.
template <int ROWS, int LINES>
static void multiply(const Product &product, int64_t row, int64_t panel, const char *ahead) {
    const int64_t inputs = product.inputs, pairs = inputs / 2;
    const char *weight = static_cast<const char *>(product.weight) + panel * pairs * LINE * VECTORS;
    const Bits *rows = static_cast<const Bits *>(product.rows) + row * inputs;
    __m512 sums[ROWS][VECTORS];
    UNROLL for (int64_t r = 0; r < ROWS; ++r)
        UNROLL for (int64_t v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs; ++pair, weight += LINE * VECTORS, ahead += LINE * LINES) {
        UNROLL for (int64_t line = 0; line < LINES; ++line) __builtin_prefetch(ahead + line * LINE, 0, 2);
        __m512bh weights[VECTORS];
        UNROLL for (int64_t v = 0; v < VECTORS; ++v) weights[v] = (__m512bh)_mm512_loadu_si512(weight + v * LINE);
        UNROLL for (int64_t r = 0; r < ROWS; ++r) {
            int32_t both;
            std::memcpy(&both, rows + r * inputs + pair * 2, sizeof both);
            const __m512bh values = (__m512bh)_mm512_set1_epi32(both);
            UNROLL for (int64_t v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], values, weights[v]);
        }
    }
    UNROLL for (int64_t v = 0; v < VECTORS; ++v) {
        const int64_t column = panel * PANEL + v * LANES;
        if (column >= product.outputs) break;
        const __mmask16 mask = mask_of(product.outputs - column);
        __m512 bias = _mm512_setzero_ps();
        if (product.bias) {
            const __m256i bits = _mm256_maskz_loadu_epi16(mask, static_cast<const Bits *>(product.bias) + column);
            bias = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
        }
        UNROLL for (int64_t r = 0; r < ROWS; ++r) {
            const __m256i values = (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(sums[r][v], bias));
            Bits *to = static_cast<Bits *>(product.out) + (row + r) * product.outputs + column;
            _mm256_mask_storeu_epi16(to, mask, values);
        }
    }
}

template <int LINES, int ROWS = MOST_ROWS>
static void multiply_rows(const Product &product, int64_t row, int64_t count, int64_t panel, const char *ahead) {
    if (count == ROWS) return multiply<ROWS, LINES>(product, row, panel, ahead);
    if constexpr (ROWS > 1) multiply_rows<LINES, ROWS - 1>(product, row, count, panel, ahead);
}

// All rows times one panel. With many rows, those that find the panel in the cache ask for the next one.
static void multiply_panel(const Product &product, int64_t panel) {
    const int64_t rows = product.num_rows, tiles = (rows + MOST_ROWS - 1) / MOST_ROWS;
    const int64_t size = product.inputs / 2 * LINE;  // bytes of a vector's share of the panel
    const char *next = static_cast<const char *>(product.weight) + (panel + 1) * size * VECTORS;
    if (tiles == 1) return multiply_rows<VECTORS>(product, 0, rows, panel, next - size * VECTORS + AHEAD);
    const int64_t lines = tiles < VECTORS ? 2 : 1;
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = rows * tile / tiles, count = rows * (tile + 1) / tiles - first;
        const char *ahead = next + tile * size * lines;
        if (tile * lines >= VECTORS)
            multiply_rows<0>(product, first, count, panel, ahead);
        else if (lines == 1)
            multiply_rows<1>(product, first, count, panel, ahead);
        else
            multiply_rows<2>(product, first, count, panel, ahead);
    }
}

// Returns 0; 1 where the processor can't.
extern "C" int epd_bf16_linear(const Product *product) {
    const int64_t panels = (product->outputs + PANEL - 1) / PANEL, threads = product->threads;
    const int64_t turn = std::max<int64_t>(1, panels / (threads * TURNS));
#pragma omp parallel for num_threads(static_cast<int>(threads)) if (threads > 1) schedule(dynamic, turn)
    for (int64_t panel = 0; panel < panels; ++panel) multiply_panel(*product, panel);
    return 0;
}
#else
extern "C" int epd_bf16_linear(const Product *) { return 1; }
#endif

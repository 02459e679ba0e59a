// What stands between the matrix products of a vision tower, in bfloat16, each in one pass over its rows (AVX512-BF16).
// Called through ctypes, so it knows nothing of torch.
//
// Numbers are computed in float and rounded where the towers in transformers round them.

#include <cmath>
#include <cstdint>

struct Call {            // must match `_Call` in tower_kernel.py; strides in elements
    void *out;                          // contiguous
    const void *left, *right;           // [rows, width] each, or `left` [rows, heads, width]
    const float *cosines, *sines;       // [rows, width]
    int64_t left_row, right_row, rows, heads, width, threads;
    float epsilon;
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

constexpr int64_t LANES = 16;
typedef uint16_t Bits;    // of a bfloat16

static inline __mmask16 mask_of(int64_t left) { return left >= LANES ? 0xFFFF : (1u << left) - 1; }
static inline __m512 load(const Bits *from, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}
static inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
static inline __m512 rounded(__m512 x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(x)), 16));
}

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

// A head's numbers in pairs, those of its first half with those of its second, turned by the angles of the row.
static void rotate(const Call &call, int64_t row) {
    const int64_t half = call.width / 2;
    const float *cosines = call.cosines + row * call.width, *sines = call.sines + row * call.width;
    for (int64_t head = 0; head < call.heads; ++head) {
        const Bits *from = static_cast<const Bits *>(call.left) + row * call.left_row + head * call.width;
        Bits *to = static_cast<Bits *>(call.out) + (row * call.heads + head) * call.width;
        for (int64_t i = 0; i < half; i += LANES) {
            const __mmask16 mask = mask_of(half - i);
            const __m512 a = load(from + i, mask), b = load(from + half + i, mask);
            const __m512 first = _mm512_sub_ps(_mm512_mul_ps(a, _mm512_maskz_loadu_ps(mask, cosines + i)),
                                               _mm512_mul_ps(b, _mm512_maskz_loadu_ps(mask, sines + i)));
            const __m512 second = _mm512_add_ps(_mm512_mul_ps(b, _mm512_maskz_loadu_ps(mask, cosines + half + i)),
                                                _mm512_mul_ps(a, _mm512_maskz_loadu_ps(mask, sines + half + i)));
            _mm256_mask_storeu_epi16(to + i, mask, narrow(first));
            _mm256_mask_storeu_epi16(to + half + i, mask, narrow(second));
        }
    }
}

// A row divided by the root of the mean of its squares, times the weights `right`.
static void normalise(const Call &call, int64_t row) {
    const Bits *from = static_cast<const Bits *>(call.left) + row * call.left_row;
    const Bits *weights = static_cast<const Bits *>(call.right);
    Bits *to = static_cast<Bits *>(call.out) + row * call.width;
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < call.width; i += LANES) {
        const __m512 x = load(from + i, mask_of(call.width - i));
        squares = _mm512_fmadd_ps(x, x, squares);
    }
    const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(call.width);
    const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(mean + call.epsilon));
    for (int64_t i = 0; i < call.width; i += LANES) {
        const __mmask16 mask = mask_of(call.width - i);
        const __m512 x = rounded(_mm512_mul_ps(load(from + i, mask), factor));
        _mm256_mask_storeu_epi16(to + i, mask, narrow(_mm512_mul_ps(x, load(weights + i, mask))));
    }
}

// silu(left) * right.
static void gate(const Call &call, int64_t row) {
    const Bits *left = static_cast<const Bits *>(call.left) + row * call.left_row;
    const Bits *right = static_cast<const Bits *>(call.right) + row * call.right_row;
    Bits *to = static_cast<Bits *>(call.out) + row * call.width;
    const __m512 one = _mm512_set1_ps(1.0f), zero = _mm512_setzero_ps();
    for (int64_t i = 0; i < call.width; i += LANES) {
        const __mmask16 mask = mask_of(call.width - i);
        const __m512 x = load(left + i, mask);
        const __m512 e = exp_negative(_mm512_sub_ps(zero, _mm512_abs_ps(x)));  // of the side that does not overflow
        const __m512 above = _mm512_mask_mov_ps(e, _mm512_cmp_ps_mask(x, zero, _CMP_NLT_UQ), one);
        const __m512 silu = rounded(_mm512_div_ps(_mm512_mul_ps(x, above), _mm512_add_ps(one, e)));
        _mm256_mask_storeu_epi16(to + i, mask, narrow(_mm512_mul_ps(silu, load(right + i, mask))));
    }
}

template <void (*PART)(const Call &, int64_t)>
static int run(const Call &call) {
#pragma omp parallel for num_threads(static_cast<int>(call.threads)) if (call.threads > 1) schedule(static)
    for (int64_t row = 0; row < call.rows; ++row) PART(call, row);
    return 0;
}

// Each returns 0; 1 where the processor can't.
extern "C" int epd_rotate(const Call *call) { return run<rotate>(*call); }
extern "C" int epd_normalise(const Call *call) { return run<normalise>(*call); }
extern "C" int epd_gate(const Call *call) { return run<gate>(*call); }
#else
extern "C" int epd_rotate(const Call *) { return 1; }
extern "C" int epd_normalise(const Call *) { return 1; }
extern "C" int epd_gate(const Call *) { return 1; }
#endif

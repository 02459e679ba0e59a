// Draws a token of each row by the largest of score and Gumbel noise, as `sampler.py` does it. Called through ctypes, so
// it knows nothing of torch.
//
// Noise is -log(-log(u)), u from a hash of (key, token). Logarithms of a whole vocabulary would take most of the time,
// and nearly all would be of no use: what the best token so far is ahead of the best score of a block says how large a
// hash must be for its token to win, and few are.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

struct Row {                  // must match `_Row` in draw_kernel.py
    int64_t index;            // of the logits
    uint64_t key;
    float temperature;
    float least;              // scores further below the best one are out
    int64_t token;            // result
};

struct Rows {                 // must match `_Rows`
    const void *logits;       // [rows, width], bfloat16 or float
    Row *rows;
    int64_t count, width, threads, is_bfloat16;
};

constexpr int64_t BLOCK = 256;
constexpr int64_t FEW = 1 << 16;             // tokens that are not worth waking other threads
constexpr uint32_t HASHES = 1 << 23;
constexpr float LARGEST_NOISE = 16.7f;       // of the largest hash, rounded up

static inline float value(const float *logits, int64_t i) { return logits[i]; }
static inline float value(const uint16_t *logits, int64_t i) {
    const uint32_t bits = static_cast<uint32_t>(logits[i]) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

static inline uint32_t hash(uint64_t key, uint64_t token) {
    uint64_t x = (token * 0x9E3779B97F4A7C15u) ^ key;
    x = (x ^ (x >> 32)) * 0xD6E8FEB86659FD93u;
    x = (x ^ (x >> 32)) * 0xD6E8FEB86659FD93u;
    return static_cast<uint32_t>(x >> 41);
}

static inline float noise(uint32_t number) { return -std::log(-std::log((number + 0.5f) / HASHES)); }

// Hashes below this give less noise than `need`, a little less being allowed for rounding.
static uint32_t least_hash(float need, float best) {
    const double below = std::exp(-std::exp(-(need - 1e-3 - 1e-6 * std::fabs(best))));
    return static_cast<uint32_t>(std::max(0.0, below * HASHES - 2));
}

template <typename Value>
static int64_t draw(const Row &row, const Value *logits, int64_t width) {
    float top = -INFINITY;
    int64_t first = 0;
    for (int64_t start = 0; start < width; start += BLOCK) {
        const int64_t end = std::min(width, start + BLOCK);
        float highest = -INFINITY;
        int bad = 0;
#pragma omp simd reduction(max : highest) reduction(| : bad)
        for (int64_t i = start; i < end; ++i) {
            const float found = value(logits, i);
            highest = found > highest ? found : highest;
            bad |= found != found;
        }
        if (bad) {  // the caller looks at the logit of the token
            while (value(logits, start) == value(logits, start)) ++start;
            return start;
        }
        if (highest > top) top = highest, first = start;
    }
    while (value(logits, first) != top) ++first;
    if (!(std::fabs(top) < INFINITY)) return first;

    const float least = top / row.temperature + row.least;
    float best = top / row.temperature + noise(hash(row.key, first));
    int64_t token = first;
    for (int64_t start = 0; start < width; start += BLOCK) {
        const int64_t count = std::min(width - start, BLOCK);
        float scores[BLOCK], highest = -INFINITY;
#pragma omp simd reduction(max : highest)
        for (int64_t i = 0; i < count; ++i) {
            scores[i] = value(logits, start + i) / row.temperature;
            highest = scores[i] > highest ? scores[i] : highest;
        }
        if (highest < least || highest + LARGEST_NOISE < best) continue;
        uint32_t hashes[BLOCK], largest = 0, enough = least_hash(best - highest, best);
#pragma omp simd reduction(max : largest)
        for (int64_t i = 0; i < count; ++i) {
            hashes[i] = hash(row.key, start + i);
            largest = hashes[i] > largest ? hashes[i] : largest;
        }
        if (largest < enough) continue;
        for (int64_t i = 0; i < count; ++i) {
            if (hashes[i] < enough || scores[i] < least) continue;
            const float found = scores[i] + noise(hashes[i]);
            if (found > best || (found == best && start + i < token)) {
                best = found, token = start + i;
                enough = least_hash(best - highest, best);
            }
        }
    }
    return token;
}

extern "C" void epd_draw(const Rows *rows) {
    const int64_t width = rows->width;
#pragma omp parallel for num_threads(static_cast<int>(rows->threads)) if (rows->threads > 1 && rows->count * width > FEW)
    for (int64_t i = 0; i < rows->count; ++i) {
        Row &row = rows->rows[i];
        const int64_t offset = row.index * width;
        row.token = rows->is_bfloat16 ? draw(row, static_cast<const uint16_t *>(rows->logits) + offset, width)
                                      : draw(row, static_cast<const float *>(rows->logits) + offset, width);
    }
}

// Where the largest value of each row stands, for floats of 16 bits. Called through ctypes, so it knows nothing of
// torch. Values are read once: of each part of a row only the largest is found, then its place, in one part.

#include <algorithm>
#include <cstdint>

struct Rows {                     // must match `_Rows` in greedy.py
    const int16_t *values;        // bits of the floats, [count, width]
    int64_t *places;              // [count]: where the first of the largest values stands
    int64_t count, width, threads, infinity;  // bits of infinity
};

constexpr int64_t PART = 2048;    // values
constexpr int64_t FEW = 1 << 20;  // values that are not worth waking other threads

// An integer that is in the order of the floats: both zeros are equal, and NaN of either sign stands above all.
static inline int16_t order(int16_t bits, int16_t infinity) {
    const int16_t magnitude = bits & INT16_MAX, sign = bits >> 15;
    return magnitude > infinity ? INT16_MAX : static_cast<int16_t>((magnitude ^ sign) - sign);
}

static int16_t largest(const int16_t *values, int64_t count, int16_t infinity) {
    int16_t found = INT16_MIN;
#pragma omp simd reduction(max : found)  // without, it is not made vector code
    for (int64_t i = 0; i < count; ++i) {
        const int16_t value = order(values[i], infinity);
        found = value > found ? value : found;
    }
    return found;
}

// Returns how many rows have NaN, whose place is theirs then.
extern "C" int64_t epd_argmax(const Rows *rows) {
    const int64_t width = rows->width, values = rows->count * width;
    const int16_t infinity = static_cast<int16_t>(rows->infinity);
    int64_t with_nan = 0;
#pragma omp parallel for num_threads(static_cast<int>(rows->threads)) if (rows->threads > 1 && values > FEW) reduction(+ : with_nan)
    for (int64_t row = 0; row < rows->count; ++row) {
        const int16_t *bits = rows->values + row * width;
        int16_t best = INT16_MIN;
        int64_t place = 0;
        for (int64_t start = 0; start < width; start += PART) {
            const int16_t found = largest(bits + start, std::min(PART, width - start), infinity);
            if (found > best) best = found, place = start;
        }
        while (order(bits[place], infinity) != best) ++place;
        rows->places[row] = place;
        with_nan += best == INT16_MAX;
    }
    return with_nan;
}

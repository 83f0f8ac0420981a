// Tiles of products of bfloat16 with sums in float32, on CPUs that multiply pairs of bfloat16 (AVX512_BF16).
//
// A matrix [outputs, inputs] lies in panels of PANEL outputs. For every two inputs a panel holds PANEL words; a word has
// both numbers of one output, the first in its low half. Rows that it is multiplied with lie in bundles of at most
// MOST_ROWS: for every LANES words of a row, those of all rows of the bundle, one after the other.

#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t PANEL = 2 * LANES;
constexpr int64_t AHEAD = 32;  // pairs that memory is asked for before they are needed
constexpr int MOST_ROWS = 12;  // times 2 sums, two vectors of weights and a pair of x: 27 of 32 registers

inline int64_t num_panels(int64_t outputs) { return (outputs + PANEL - 1) / PANEL; }
inline int64_t num_pairs(int64_t inputs) { return (inputs + 1) / 2; }
inline int64_t bundled_words(int64_t inputs) { return (inputs + PANEL - 1) / PANEL * LANES; }  // of one row

inline __mmask16 first_lanes(int64_t count) { return count >= LANES ? 0xffff : (1u << std::max<int64_t>(count, 0)) - 1; }

// A tile's numbers in float32, `columns` of every row.
struct Out {
    float* at;
    int64_t stride, columns;
};

// R bundled rows times a panel, added to what `start` has: rows `start_stride` apart, or none for zeros.
template <int R>
inline void tile(const uint32_t* x, const uint32_t* panel, int64_t pairs, const float* start, int64_t start_stride,
                 Out out) {
    __mmask16 low_mask = first_lanes(out.columns), high_mask = first_lanes(out.columns - LANES);
    __m512 low[R], high[R];
    for (int r = 0; r < R; r++) {
        const float* from = start + r * start_stride;
        low[r] = start ? _mm512_maskz_loadu_ps(low_mask, from) : _mm512_setzero_ps();
        high[r] = start ? _mm512_maskz_loadu_ps(high_mask, from + LANES) : _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < pairs; k += LANES, x += R * LANES)
        for (int64_t i = 0; i < std::min(LANES, pairs - k); i++, panel += PANEL) {
            _mm_prefetch((const char*)(panel + AHEAD * PANEL), _MM_HINT_T0);
            _mm_prefetch((const char*)(panel + AHEAD * PANEL + LANES), _MM_HINT_T0);
            __m512bh first = (__m512bh)_mm512_loadu_si512(panel);
            __m512bh second = (__m512bh)_mm512_loadu_si512(panel + LANES);
            for (int r = 0; r < R; r++) {
                __m512bh factors = (__m512bh)_mm512_set1_epi32(x[r * LANES + i]);
                low[r] = _mm512_dpbf16_ps(low[r], first, factors);
                high[r] = _mm512_dpbf16_ps(high[r], second, factors);
            }
        }
    for (int r = 0; r < R; r++) {
        _mm512_mask_storeu_ps(out.at + r * out.stride, low_mask, low[r]);
        _mm512_mask_storeu_ps(out.at + r * out.stride + LANES, high_mask, high[r]);
    }
}

// Calls `work` with an integral constant that equals `rows`, at most MOST_ROWS.
template <int R = MOST_ROWS, class Work>
inline void with_rows(int64_t rows, const Work& work) {
    if constexpr (R > 0) {
        if (rows == R)
            work(std::integral_constant<int, R>());
        else
            with_rows<R - 1>(rows, work);
    }
}

// Rows `stride` apart, times a factor and rounded to bfloat16, as a bundle; what fills up its words is zero.
inline void bundle(const float* x, int64_t stride, int64_t rows, int64_t inputs, float factor, uint32_t* to) {
    __m512 factors = _mm512_set1_ps(factor);
    for (int64_t k = 0; k < inputs; k += PANEL)
        for (int64_t r = 0; r < rows; r++, to += LANES) {
            const float* from = x + r * stride + k;
            __m512 low = _mm512_maskz_loadu_ps(first_lanes(inputs - k), from);
            __m512 high = _mm512_maskz_loadu_ps(first_lanes(inputs - k - LANES), from + LANES);
            __m512bh pairs = _mm512_cvtne2ps_pbh(_mm512_mul_ps(high, factors), _mm512_mul_ps(low, factors));
            _mm512_storeu_si512(to, (__m512i)pairs);
        }
}

}  // namespace

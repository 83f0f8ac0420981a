// Products of float32 rows with a bfloat16 matrix, for CPUs that multiply pairs of bfloat16 and add in float32.
//
// W [outputs, inputs] is packed into panels of PANEL outputs. For every two inputs a panel holds PANEL words; a word
// has both weights of one output, the first in its low half. Rows are rounded to bfloat16, as such a model's own
// arithmetic does. A tile keeps the sums of R rows with a panel in registers while it reads the panel once.

#ifdef __AVX512BF16__
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t PANEL = 2 * LANES;
constexpr int64_t AHEAD = 32;  // pairs that memory is asked for before they are needed
constexpr int64_t CACHED_NUMBERS = 1 << 16;  // of x: rows that stay in a core's cache while all panels pass by
constexpr int64_t LEAST_PARALLEL = 1 << 17;  // multiplications
constexpr int MOST_ROWS = 12;  // times 2 sums, two vectors of weights and a pair of x: 27 of 32 registers

int64_t num_panels(int64_t outputs) { return (outputs + PANEL - 1) / PANEL; }
int64_t num_pairs(int64_t inputs) { return (inputs + 1) / 2; }

struct Sizes {
    int64_t pairs, outputs;
};

template <int R>
void tile(const uint32_t* x, const uint32_t* panel, const float* bias, Sizes sizes, int64_t first, float* y) {
    __m512 sums[R][2];
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < sizes.pairs; k++) {
        const uint32_t* at = panel + k * PANEL;
        _mm_prefetch((const char*)(at + AHEAD * PANEL), _MM_HINT_T0);
        _mm_prefetch((const char*)(at + AHEAD * PANEL + LANES), _MM_HINT_T0);
        __m512bh low = (__m512bh)_mm512_loadu_si512(at), high = (__m512bh)_mm512_loadu_si512(at + LANES);
        for (int r = 0; r < R; r++) {
            __m512bh factors = (__m512bh)_mm512_set1_epi32(x[r * sizes.pairs + k]);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], low, factors);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], high, factors);
        }
    }
    for (int r = 0; r < R; r++) {
        float* to = y + r * sizes.outputs + first;
        for (int64_t i = 0; i < PANEL && first + i < sizes.outputs; i++)
            to[i] = sums[r][i / LANES][i % LANES] + (bias ? bias[first + i] : 0);
    }
}

template <int R>
void last_rows(int64_t rows, const uint32_t* x, const uint32_t* panel, const float* bias, Sizes sizes, int64_t first,
               float* y) {
    if constexpr (R > 0) {
        if (rows == R)
            tile<R>(x, panel, bias, sizes, first, y);
        else
            last_rows<R - 1>(rows, x, panel, bias, sizes, first, y);
    }
}

// A row of float32 as pairs, an odd end filled up with zero.
void round_row(const float* x, int64_t inputs, uint32_t* pairs) {
    for (int64_t k = 0; k < inputs; k += 32) {
        uint32_t mask = inputs - k >= 32 ? ~0u : (1u << (inputs - k)) - 1;
        __m512 low = _mm512_maskz_loadu_ps(mask & 0xffff, x + k);
        __m512 high = _mm512_maskz_loadu_ps(mask >> 16, x + k + 16);
        __mmask16 words = inputs - k >= 32 ? 0xffff : (1u << num_pairs(inputs - k)) - 1;
        _mm512_mask_storeu_epi32(pairs + k / 2, words, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
}

}  // namespace

extern "C" {
int64_t baton_panel_outputs() { return PANEL; }
int64_t baton_multiplies_pairs() { return 1; }

void baton_pack(const uint16_t* weight, int64_t outputs, int64_t inputs, uint32_t* panels, int threads) {
    int64_t pairs = num_pairs(inputs);
#pragma omp parallel for num_threads(threads)
    for (int64_t p = 0; p < num_panels(outputs); p++)
        for (int64_t k = 0; k < pairs; k++)
            for (int64_t i = 0; i < PANEL; i++) {
                int64_t output = p * PANEL + i;
                const uint16_t* at = weight + output * inputs + 2 * k;
                uint32_t second = output < outputs && 2 * k + 1 < inputs ? at[1] : 0;
                panels[(p * pairs + k) * PANEL + i] = (output < outputs ? at[0] : 0) | second << 16;
            }
}

void baton_unpack(const uint32_t* panels, int64_t outputs, int64_t inputs, uint16_t* weight, int threads) {
    int64_t pairs = num_pairs(inputs);
#pragma omp parallel for num_threads(threads)
    for (int64_t output = 0; output < outputs; output++)
        for (int64_t k = 0; k < inputs; k++) {
            uint32_t word = panels[(output / PANEL * pairs + k / 2) * PANEL + output % PANEL];
            weight[output * inputs + k] = uint16_t(k % 2 ? word >> 16 : word);
        }
}

void baton_multiply(const float* x, const uint32_t* panels, const float* bias, int64_t rows, int64_t inputs,
                    int64_t outputs, float* y, int threads) {
    static thread_local std::vector<uint32_t> kept;
    int64_t pairs = num_pairs(inputs);
    if (int64_t(kept.size()) < rows * pairs) kept.resize(rows * pairs);
    uint32_t* rounded = kept.data();
    int64_t together = std::max<int64_t>(1, CACHED_NUMBERS / inputs / MOST_ROWS) * MOST_ROWS;
#pragma omp parallel num_threads(threads) if (rows * inputs * outputs >= LEAST_PARALLEL)
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) round_row(x + r * inputs, inputs, rounded + r * pairs);
        for (int64_t first = 0; first < rows; first += together) {
            int64_t num = std::min(together, rows - first);
#pragma omp for schedule(static) nowait
            for (int64_t p = 0; p < num_panels(outputs); p++)
                for (int64_t r = 0; r < num; r += MOST_ROWS)
                    last_rows<MOST_ROWS>(std::min<int64_t>(MOST_ROWS, num - r), rounded + (first + r) * pairs,
                                         panels + p * pairs * PANEL, bias, {pairs, outputs}, p * PANEL,
                                         y + (first + r) * outputs);
        }
    }
}
}
#endif

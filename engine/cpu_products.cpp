// Products of float32 rows with a bfloat16 matrix, for CPUs without instructions for such products:
// cpu_pair_products.cpp is for the others.
//
// W [outputs, inputs] is packed into panels of 2 * LANES outputs. For every input a panel holds LANES words; the low
// half of a word is of one output, the high half of the output LANES further. One shift and one mask widen both.
// A tile keeps the sums of R rows with P panels in registers while it reads the panels once.

#ifndef __AVX512BF16__
#include <algorithm>
#include <cstdint>

namespace {

#ifdef __AVX512F__
constexpr int64_t LANES = 16;
#else
constexpr int64_t LANES = 8;
#endif
constexpr int64_t PANEL = 2 * LANES;
constexpr int64_t AHEAD = 64;  // inputs that memory is asked for before they are needed
constexpr int64_t CACHED_NUMBERS = 1 << 16;  // of x: rows that stay in a core's cache while all panels pass by
constexpr int64_t LEAST_PARALLEL = 1 << 17;  // multiplications
constexpr int MOST_ROWS = 6;  // times 2 sums, the words widened and a number of x: 15 of AVX2's 16 registers
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

int64_t num_panels(int64_t outputs) { return (outputs + PANEL - 1) / PANEL; }

struct Sizes {
    int64_t inputs, outputs;
};

template <int R, int P>
void tile(const float* x, const uint32_t* panels, const float* bias, Sizes sizes, int64_t first, float* y) {
    Floats sums[P][R][2];
    for (int p = 0; p < P; p++)
        for (int r = 0; r < R; r++) sums[p][r][0] = sums[p][r][1] = Floats{};
    for (int64_t k = 0; k < sizes.inputs; k++)
        for (int p = 0; p < P; p++) {
            const uint32_t* at = panels + (p * sizes.inputs + k) * LANES;
            __builtin_prefetch(at + AHEAD * LANES);
            Words words = *(const Words*)at;
            Floats low = (Floats)(words << 16), high = (Floats)(words & 0xffff0000u);
            for (int r = 0; r < R; r++) {
                float factor = x[r * sizes.inputs + k];
                sums[p][r][0] += low * factor;
                sums[p][r][1] += high * factor;
            }
        }
    for (int p = 0; p < P; p++)
        for (int r = 0; r < R; r++) {
            int64_t output = first + p * PANEL;
            float* to = y + r * sizes.outputs + output;
            for (int64_t i = 0; i < PANEL && output + i < sizes.outputs; i++)
                to[i] = sums[p][r][i / LANES][i % LANES] + (bias ? bias[output + i] : 0);
        }
}

template <int P>
void all_rows(const float* x, const uint32_t* panels, const float* bias, int64_t rows, Sizes sizes, int64_t first,
              float* y) {
    constexpr int MOST = P > 1 ? 1 : MOST_ROWS;
    for (; rows > 0; rows -= MOST, x += MOST * sizes.inputs, y += MOST * sizes.outputs) {
        if constexpr (P > 1) {
            tile<1, P>(x, panels, bias, sizes, first, y);
            continue;
        }
        switch (rows) {
            case 1: tile<1, P>(x, panels, bias, sizes, first, y); break;
            case 2: tile<2, P>(x, panels, bias, sizes, first, y); break;
            case 3: tile<3, P>(x, panels, bias, sizes, first, y); break;
            case 4: tile<4, P>(x, panels, bias, sizes, first, y); break;
            case 5: tile<5, P>(x, panels, bias, sizes, first, y); break;
            default: tile<MOST_ROWS, P>(x, panels, bias, sizes, first, y);
        }
    }
}

// P panels are read beside each other: sums of one row with one panel are too few to hide how long an addition takes.
template <int P>
void multiply(const float* x, const uint32_t* panels, const float* bias, int64_t rows, Sizes sizes, float* y,
              int threads) {
    int64_t count = num_panels(sizes.outputs), panel_words = sizes.inputs * LANES;
    int64_t together = std::max<int64_t>(1, CACHED_NUMBERS / sizes.inputs / MOST_ROWS) * MOST_ROWS;
    int64_t work = rows * sizes.inputs * sizes.outputs;
#pragma omp parallel num_threads(threads) if (work >= LEAST_PARALLEL)
    for (int64_t first = 0; first < rows; first += together) {
        int64_t num = std::min(together, rows - first);
        const float* from = x + first * sizes.inputs;
        float* to = y + first * sizes.outputs;
#pragma omp for schedule(static) nowait
        for (int64_t p = 0; p < count; p += P) {
            if (p + P <= count)
                all_rows<P>(from, panels + p * panel_words, bias, num, sizes, p * PANEL, to);
            else
                for (int64_t q = p; q < count; q++)
                    all_rows<1>(from, panels + q * panel_words, bias, num, sizes, q * PANEL, to);
        }
    }
}

}  // namespace

extern "C" {
int64_t baton_panel_outputs() { return PANEL; }
int64_t baton_multiplies_pairs() { return 0; }

void baton_pack(const uint16_t* weight, int64_t outputs, int64_t inputs, uint32_t* panels, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t p = 0; p < num_panels(outputs); p++)
        for (int64_t i = 0; i < LANES; i++) {
            int64_t low = p * PANEL + i, high = low + LANES;
            for (int64_t k = 0; k < inputs; k++) {
                uint32_t second = high < outputs ? weight[high * inputs + k] : 0;
                panels[(p * inputs + k) * LANES + i] = (low < outputs ? weight[low * inputs + k] : 0) | second << 16;
            }
        }
}

void baton_unpack(const uint32_t* panels, int64_t outputs, int64_t inputs, uint16_t* weight, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t output = 0; output < outputs; output++) {
        int64_t p = output / PANEL, i = output % PANEL;
        for (int64_t k = 0; k < inputs; k++) {
            uint32_t word = panels[(p * inputs + k) * LANES + i % LANES];
            weight[output * inputs + k] = uint16_t(i < LANES ? word : word >> 16);
        }
    }
}

void baton_multiply(const float* x, const uint32_t* panels, const float* bias, int64_t rows, int64_t inputs,
                    int64_t outputs, float* y, int threads) {
    if (rows == 1)
        multiply<4>(x, panels, bias, rows, {inputs, outputs}, y, threads);
    else
        multiply<1>(x, panels, bias, rows, {inputs, outputs}, y, threads);
}
}
#endif

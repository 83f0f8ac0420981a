// Products of float32 rows with a bfloat16 matrix W [outputs, inputs], for CPUs that multiply pairs of bfloat16.
//
// Rows are rounded to bfloat16, as such a model's own arithmetic does. A tile keeps the sums of a bundle of rows with a
// panel of outputs in registers while it reads the panel once: see cpu_pairs.h.

#ifdef __AVX512BF16__
#include <vector>

#include "cpu_pairs.h"

namespace {

constexpr int64_t CACHED_NUMBERS = 1 << 18;  // of x: rows that stay in a core's cache while all panels pass by
constexpr int64_t LEAST_PARALLEL = 1 << 17;  // multiplications

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
    int64_t pairs = num_pairs(inputs), words = bundled_words(inputs);
    if (int64_t(kept.size()) < rows * words) kept.resize(rows * words);
    uint32_t* rounded = kept.data();
    int64_t together = std::max<int64_t>(1, CACHED_NUMBERS / inputs / MOST_ROWS) * MOST_ROWS;
    auto bundled = [&](int64_t row, int64_t end) { return std::min<int64_t>(MOST_ROWS, end - row); };
#pragma omp parallel num_threads(threads) if (rows * inputs * outputs >= LEAST_PARALLEL)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row += MOST_ROWS)
            bundle(x + row * inputs, inputs, bundled(row, rows), inputs, 1, rounded + row * words);
        for (int64_t first = 0; first < rows; first += together) {
            int64_t end = std::min(first + together, rows);
#pragma omp for schedule(static) nowait
            for (int64_t p = 0; p < num_panels(outputs); p++) {
                int64_t output = p * PANEL;
                for (int64_t row = first; row < end; row += MOST_ROWS)
                    with_rows(bundled(row, end), [&](auto count) {
                        tile<count>(rounded + row * words, panels + output * pairs, pairs,
                                    bias ? bias + output : nullptr, 0,
                                    {y + row * outputs + output, outputs, outputs - output});
                    });
            }
        }
    }
}
}
#endif

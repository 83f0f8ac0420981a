// What a decoder computes on a CPU beside products: norms, rotations, activations, attention of single tokens.
//
// Activations are float32; the cache C is that or bfloat16. Loops are written for the compiler to vectorise. Threads
// are those of torch, whose OpenMP library the symbols resolve to.
// Shapes: H KV heads, D head size, S tokens per block.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu_attention.h"

namespace {

struct bfloat16 {
    uint16_t bits;
    operator float() const {
        uint32_t wide = uint32_t(bits) << 16;
        float value;
        __builtin_memcpy(&value, &wide, 4);
        return value;
    }
    bfloat16& operator=(float value) {  // to nearest, ties to even
        uint32_t wide;
        __builtin_memcpy(&wide, &value, 4);
        bits = uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
        return *this;
    }
};

constexpr int64_t LEAST_PARALLEL = 1 << 15;  // elements; below, waking another thread takes longer than the work
constexpr float LEAST_SCORE = -1e30f;
constexpr float LARGEST_POWER = 80;  // of e; infinity is no number under -ffast-math

void norm(const float* x, const float* weight, int64_t rows, int64_t size, float eps, float* out, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1 && rows * size >= LEAST_PARALLEL)
    for (int64_t row = 0; row < rows; row++) {
        const float* from = x + row * size;
        float* to = out + row * size;
        float sum = 0;
        for (int64_t i = 0; i < size; i++) sum += from[i] * from[i];
        float factor = 1 / std::sqrt(sum / float(size) + eps);
        for (int64_t i = 0; i < size; i++) to[i] = from[i] * factor * weight[i];
    }
}

void add_norm(const float* residual, const float* x, const float* weight, int64_t rows, int64_t size, float eps,
              float* total, float* out, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1 && rows * size >= LEAST_PARALLEL)
    for (int64_t row = 0; row < rows; row++) {
        int64_t at = row * size;
        for (int64_t i = at; i < at + size; i++) total[i] = residual[i] + x[i];
        norm(total + at, weight, 1, size, eps, out + at, 1);
    }
}

void silu_mul(const float* gate_up, int64_t rows, int64_t inner, float* out, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1 && rows * inner >= LEAST_PARALLEL)
    for (int64_t row = 0; row < rows; row++) {
        const float* gate = gate_up + row * 2 * inner;
        const float* up = gate + inner;
        float* to = out + row * inner;
        for (int64_t i = 0; i < inner; i++) to[i] = up[i] * gate[i] / (1 + std::exp(std::min(-gate[i], LARGEST_POWER)));
    }
}

// Turns the first `rotated` elements of the first heads of a row in place; pairs are halves apart.
void rotate(float* x, const float* cosines, const float* sines, int64_t rows, int64_t stride, int64_t heads,
            int64_t head_dim, int64_t rotated, int threads) {
    int64_t half = rotated / 2;
#pragma omp parallel for num_threads(threads) if (rows > 1 && rows * heads * head_dim >= LEAST_PARALLEL)
    for (int64_t row = 0; row < rows; row++) {
        const float* cosine = cosines + row * rotated;
        const float* sine = sines + row * rotated + half;
        for (int64_t head = 0; head < heads; head++) {
            float* first = x + row * stride + head * head_dim;
            float* second = first + half;
            for (int64_t i = 0; i < half; i++) {
                float a = first[i], b = second[i];
                first[i] = a * cosine[i] - b * sine[i];
                second[i] = b * cosine[i] + a * sine[i];
            }
        }
    }
}

// Keys and values, whose rows are `strides` apart, to the blocks [2, H, S, D] and places in them that `slots` names.
template <class C>
void write(const float* keys, const float* values, const int64_t* strides, const int64_t* slots, C* cache, int64_t rows,
           int64_t heads, int64_t block_size, int64_t head_dim, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1 && rows * heads * head_dim >= LEAST_PARALLEL)
    for (int64_t row = 0; row < rows; row++) {
        int64_t block = slots[row] / block_size, place = slots[row] % block_size;
        for (int64_t plane = 0; plane < 2; plane++) {
            const float* from = (plane ? values : keys) + row * strides[plane];
            for (int64_t head = 0; head < heads; head++) {
                C* to = cache + (((block * 2 + plane) * heads + head) * block_size + place) * head_dim;
                for (int64_t i = 0; i < head_dim; i++) to[i] = from[head * head_dim + i];
            }
        }
    }
}

// One query per sequence over the `ends[n]` positions that its row of `tables` maps to blocks: keys are read once for
// all query heads of a KV head, then values.
template <class C>
void attend(const AttentionShape& shape, const float* query, const C* cache, const int64_t* tables, const int64_t* ends,
            const float* sinks, float* out, int threads) {
    int64_t group = shape.num_query_heads / shape.num_heads, D = shape.head_dim, S = shape.block_size;
    int64_t work = 0;
    for (int64_t n = 0; n < shape.num_rows; n++) work += ends[n] * shape.num_query_heads * D;
#pragma omp parallel num_threads(threads) if (work >= 4 * LEAST_PARALLEL)
    {
        std::vector<float> weights, wide(D), sums(group * D), queries(group * D);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t n = 0; n < shape.num_rows; n++) {
            for (int64_t head = 0; head < shape.num_heads; head++) {
                int64_t end = ends[n], first = shape.window ? std::max<int64_t>(0, end - shape.window) : 0;
                int64_t count = end - first;
                const int64_t* table = tables + n * shape.table_stride;
                auto place = [&](int64_t position, int64_t plane) {
                    int64_t block = table[position / S] * 2 + plane;
                    return cache + ((block * shape.num_heads + head) * S + position % S) * D;
                };
                weights.resize(group * count);
                const float* own = query + n * shape.query_stride + head * group * D;
                for (int64_t i = 0; i < group * D; i++) queries[i] = own[i] * shape.scale;
                for (int64_t at = 0; at < count; at++) {
                    const C* key = place(first + at, 0);
                    for (int64_t i = 0; i < D; i++) wide[i] = key[i];
                    for (int64_t g = 0; g < group; g++) {
                        float score = 0;
                        for (int64_t i = 0; i < D; i++) score += queries[g * D + i] * wide[i];
                        weights[g * count + at] = score;
                    }
                }
                for (int64_t g = 0; g < group; g++) {
                    float* row = weights.data() + g * count;
                    float cap = shape.softcap;
                    if (cap != 0)
                        for (int64_t at = 0; at < count; at++) row[at] = std::tanh(row[at] / cap) * cap;
                    float sink = sinks ? sinks[head * group + g] : LEAST_SCORE, most = sink, total = 0;
                    for (int64_t at = 0; at < count; at++) most = std::max(most, row[at]);
                    for (int64_t at = 0; at < count; at++) row[at] = std::exp(row[at] - most);
                    for (int64_t at = 0; at < count; at++) total += row[at];
                    total += sinks ? std::exp(sink - most) : 0;
                    for (int64_t at = 0; at < count; at++) row[at] /= total;
                }
                std::fill(sums.begin(), sums.end(), 0.0f);
                for (int64_t at = 0; at < count; at++) {
                    const C* value = place(first + at, 1);
                    for (int64_t i = 0; i < D; i++) wide[i] = value[i];
                    for (int64_t g = 0; g < group; g++) {
                        float weight = weights[g * count + at];
                        for (int64_t i = 0; i < D; i++) sums[g * D + i] += weight * wide[i];
                    }
                }
                float* to = out + (n * shape.num_query_heads + head * group) * D;
                for (int64_t i = 0; i < group * D; i++) to[i] = sums[i];
            }
        }
    }
}

}  // namespace

extern "C" {
void baton_norm(const float* x, const float* weight, int64_t rows, int64_t size, float eps, float* out, int threads) {
    norm(x, weight, rows, size, eps, out, threads);
}
void baton_add_norm(const float* residual, const float* x, const float* weight, int64_t rows, int64_t size, float eps,
                    float* total, float* out, int threads) {
    add_norm(residual, x, weight, rows, size, eps, total, out, threads);
}
void baton_silu_mul(const float* gate_up, int64_t rows, int64_t inner, float* out, int threads) {
    silu_mul(gate_up, rows, inner, out, threads);
}
void baton_rotate(float* x, const float* cosines, const float* sines, int64_t rows, int64_t stride, int64_t heads,
                  int64_t head_dim, int64_t rotated, int threads) {
    rotate(x, cosines, sines, rows, stride, heads, head_dim, rotated, threads);
}
void baton_write(const float* keys, const float* values, int64_t key_stride, int64_t value_stride, const int64_t* slots,
                 void* cache, int64_t rows, int64_t heads, int64_t block_size, int64_t head_dim, int is_wide,
                 int threads) {
    const int64_t strides[] = {key_stride, value_stride};
    if (is_wide)
        write(keys, values, strides, slots, (float*)cache, rows, heads, block_size, head_dim, threads);
    else
        write(keys, values, strides, slots, (bfloat16*)cache, rows, heads, block_size, head_dim, threads);
}
void baton_attend(const AttentionShape* shape, const float* query, const void* cache, const int64_t* tables, const int64_t* ends,
                  const float* sinks, float* out, int is_wide, int threads) {
    if (is_wide)
        attend(*shape, query, (const float*)cache, tables, ends, sinks, out, threads);
    else
        attend(*shape, query, (const bfloat16*)cache, tables, ends, sinks, out, threads);
}
}


// Attention of chunks of prompts over cached blocks of bfloat16, for CPUs that multiply pairs of bfloat16.
//
// Keys and values of a KV head are laid out once as panels (see cpu_pairs.h) of KEYS positions; then every bundle of
// rows of every query head passes over them with a running softmax (Milakov and Gimelshein, 2018), so that scores never
// leave a core's cache.

#ifdef __AVX512BF16__
#include <cmath>
#include <vector>

#include "cpu_attention.h"
#include "cpu_pairs.h"

namespace {

constexpr int64_t KEYS = 256;
constexpr float LEAST_SCORE = -1e30f;
constexpr float LEAST_POWER = -87;  // of e; what is less is no number to the processor

// Keys are panels with positions as outputs, values with elements of the head; KEYS positions after KEYS positions.
struct Context {
    const AttentionShape& shape;
    const uint16_t* cache;
    const int64_t* table;  // block of every S positions
    int64_t seen, end;     // the positions that any row sees
    std::vector<uint32_t>&keys, &values;

    int64_t start() const { return seen / KEYS * KEYS; }
    int64_t words() const { return num_panels(shape.head_dim) * PANEL * KEYS / 2; }  // of KEYS positions
    uint32_t* keys_of(int64_t from) const { return keys.data() + (from - start()) / KEYS * words(); }
    uint32_t* values_of(int64_t from) const { return values.data() + (from - start()) / KEYS * words(); }

    // None where no row sees it: there the panels are zero.
    const uint16_t* vector_at(int64_t position, int64_t plane, int64_t head) const {
        if (position < seen || position >= end) return nullptr;
        int64_t S = shape.block_size, block = table[position / S] * 2 + plane;
        return cache + ((block * shape.num_heads + head) * S + position % S) * shape.head_dim;
    }

    void fill(int64_t from, int64_t head) const {
        int64_t D = shape.head_dim;
        for (int64_t i = 0; i < KEYS; i++) {
            uint32_t* column = keys_of(from) + i / PANEL * D / 2 * PANEL + i % PANEL;
            const uint32_t* key = (const uint32_t*)vector_at(from + i, 0, head);
            for (int64_t k = 0; k < D / 2; k++) column[k * PANEL] = key ? key[k] : 0;
        }
        for (int64_t i = 0; i < KEYS / 2; i++) {
            const uint16_t* one = vector_at(from + 2 * i, 1, head);
            const uint16_t* other = vector_at(from + 2 * i + 1, 1, head);
            for (int64_t d = 0; d < D; d++)
                values_of(from)[(d / PANEL * KEYS / 2 + i) * PANEL + d % PANEL] =
                    (one ? one[d] : 0) | uint32_t(other ? other[d] : 0) << 16;
        }
    }
};

// The scores of one row's first `count` keys turn into weights, of which only those in [hidden, seen) are not nothing.
// `most` and `total` are what they were of all keys before; returns what the sums over these are to be multiplied with.
float weigh(float* scores, int64_t count, int64_t hidden, int64_t seen, float softcap, float& most, float& total) {
    if (softcap != 0)
        for (int64_t i = 0; i < count; i++) scores[i] = std::tanh(scores[i] / softcap) * softcap;
    std::fill(scores, scores + std::clamp<int64_t>(hidden, 0, count), LEAST_SCORE);
    std::fill(scores + std::clamp<int64_t>(seen, 0, count), scores + count, LEAST_SCORE);
    float highest = most, sum = 0;
    for (int64_t i = 0; i < count; i++) highest = std::max(highest, scores[i]);
    for (int64_t i = 0; i < count; i++) scores[i] = std::exp(std::max(scores[i] - highest, LEAST_POWER));
    for (int64_t i = 0; i < count; i++) sum += scores[i];
    float kept = std::exp(std::max(most - highest, LEAST_POWER));
    most = highest, total = total * kept + sum;
    return kept;
}

// R rows of one query head, the first of them at `position`; `sink` may be none.
template <int R>
void attend(const Context& context, int64_t position, const float* query, const float* sink, float* out) {
    const AttentionShape& shape = context.shape;
    int64_t D = shape.head_dim, end = position + R;
    int64_t begin = shape.window ? std::max(context.start(), (position - shape.window + 1) / KEYS * KEYS) : 0;
    alignas(64) float scores[R * KEYS];
    alignas(64) uint32_t weights[R * KEYS / 2];
    std::vector<uint32_t> queries(R * bundled_words(D));
    std::vector<float> sums(R * D, 0.0f);
    float most[R], total[R];
    for (int r = 0; r < R; r++) most[r] = sink ? *sink : LEAST_SCORE, total[r] = sink ? 1 : 0;
    bundle(query, shape.query_stride, R, D, shape.scale, queries.data());
    for (int64_t from = begin; from < end; from += KEYS) {
        int64_t count = std::min(KEYS, num_panels(end - from) * PANEL);
        for (int64_t i = 0; i < count; i += PANEL)
            tile<R>(queries.data(), context.keys_of(from) + i * D / 2, D / 2, nullptr, 0, {scores + i, KEYS, PANEL});
        for (int r = 0; r < R; r++) {
            int64_t seen = position + r + 1 - from, hidden = shape.window ? seen - shape.window : 0;
            float kept = weigh(scores + r * KEYS, count, hidden, seen, shape.softcap, most[r], total[r]);
            for (int64_t d = 0; d < D; d++) sums[r * D + d] *= kept;
        }
        bundle(scores, KEYS, R, count, 1, weights);
        for (int64_t d = 0; d < D; d += PANEL)
            tile<R>(weights, context.values_of(from) + d * KEYS / 2, count / 2, sums.data() + d, D,
                    {sums.data() + d, D, D - d});
    }
    for (int r = 0; r < R; r++)
        for (int64_t d = 0; d < D; d++) out[r * shape.num_query_heads * D + d] = sums[r * D + d] / total[r];
}

}  // namespace

// The rows of one sequence, of which the first stands at position `first`.
extern "C" void baton_attend_chunk(const AttentionShape* told, int64_t first, const float* query, const uint16_t* cache,
                                   const int64_t* table, const float* sinks, float* out, int threads) {
    static thread_local std::vector<uint32_t> keys, values;
    const AttentionShape& shape = *told;
    int64_t seen = shape.window ? std::max<int64_t>(0, first - shape.window + 1) : 0;
    Context context{shape, cache, table, seen, first + shape.num_rows, keys, values};
    size_t size = (context.end - context.start() + KEYS - 1) / KEYS * context.words();
    if (keys.size() < size) keys.resize(size), values.resize(size);
    int64_t D = shape.head_dim, group = shape.num_query_heads / shape.num_heads;
    int64_t bundles = (shape.num_rows + MOST_ROWS - 1) / MOST_ROWS;
#pragma omp parallel num_threads(threads)
    for (int64_t head = 0; head < shape.num_heads; head++) {
#pragma omp for schedule(static)
        for (int64_t from = context.start(); from < context.end; from += KEYS) context.fill(from, head);
#pragma omp for schedule(dynamic)
        for (int64_t left = group * bundles; left > 0; left--) {  // the last rows see most: they come first
            int64_t own = head * group + (left - 1) % group, row = (left - 1) / group * MOST_ROWS;
            with_rows(std::min<int64_t>(MOST_ROWS, shape.num_rows - row), [&](auto count) {
                attend<count>(context, first + row, query + row * shape.query_stride + own * D,
                              sinks ? sinks + own : nullptr, out + (row * shape.num_query_heads + own) * D);
            });
        }
    }
}
#endif

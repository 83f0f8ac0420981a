// Copies runs of bytes past the caches: each byte is read once, and written without reading what lay there before.
//
// A KV slab is larger than the caches that it would sweep, and nobody reads it soon. Runs that follow each other on
// both sides are one. Memory is asked for a little before it is read, at the end of a run for the start of the next.

#include <cstdint>
#include <cstring>

#ifdef __x86_64__
#include <immintrin.h>

namespace {

constexpr int64_t LINE = 64;
constexpr int64_t STEP = 2 * LINE;
constexpr int64_t AHEAD = 8 * LINE;

__attribute__((target("avx2"))) void stream_run(char* to, const char* from, int64_t num_bytes, const char* next) {
    int64_t head = -(uintptr_t)to & (LINE - 1);
    if (num_bytes < head + STEP) {
        memcpy(to, from, num_bytes);
        return;
    }
    memcpy(to, from, head);
    int64_t at = head;
    for (; at + STEP <= num_bytes; at += STEP) {
        const char* ahead = at + AHEAD < num_bytes ? from + at + AHEAD : next + (at + AHEAD - num_bytes);
        _mm_prefetch(ahead, _MM_HINT_T0);
        _mm_prefetch(ahead + LINE, _MM_HINT_T0);
        const __m256i* in = (const __m256i*)(from + at);
        __m256i a = _mm256_loadu_si256(in), b = _mm256_loadu_si256(in + 1);
        __m256i c = _mm256_loadu_si256(in + 2), d = _mm256_loadu_si256(in + 3);
        __m256i* out = (__m256i*)(to + at);
        _mm256_stream_si256(out, a);
        _mm256_stream_si256(out + 1, b);
        _mm256_stream_si256(out + 2, c);
        _mm256_stream_si256(out + 3, d);
    }
    memcpy(to + at, from + at, num_bytes - at);
}

}  // namespace

extern "C" {
int baton_can_stream() { return __builtin_cpu_supports("avx2") != 0; }

void baton_stream_runs(char* to, const int64_t* to_starts, const char* from, const int64_t* from_starts,
                       int64_t num_runs, int64_t run_bytes) {
    for (int64_t first = 0, last; first < num_runs; first = last) {
        last = first + 1;
        while (last < num_runs && to_starts[last] == to_starts[last - 1] + run_bytes &&
               from_starts[last] == from_starts[last - 1] + run_bytes)
            last++;
        const char* next = from + from_starts[last < num_runs ? last : first];
        stream_run(to + to_starts[first], from + from_starts[first], (last - first) * run_bytes, next);
    }
    _mm_sfence();
}
}
#else
extern "C" int baton_can_stream() { return 0; }
#endif

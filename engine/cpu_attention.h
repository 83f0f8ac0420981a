// What attention is told of queries and cache. Blocks of the cache are [2, H, S, D]: keys and values.

#pragma once
#include <cstdint>

struct AttentionShape {
    int64_t num_rows, num_query_heads, num_heads, block_size, head_dim;  // H, S, D are the last three
    int64_t query_stride, table_stride, window;                          // 0: no window
    float scale, softcap;                                                // 0: none
};

// Self-attention over keys and values in BF16 (attention.cuh), and what joins tiles, wherever they came from.
#include "attention.cuh"

// The words of a vector of eight whose elements from `count` on become zeros.
DEVICE uint4 keep(uint4 vector, u32 count) {
    u32 words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (u32 i = 0; i < 4; i++) words[i] &= count >= 2 * i + 2 ? ~0u : count == 2 * i + 1 ? 0xffffu : 0u;
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// Keys and values in BF16 (cache.cuh), from where a sequence begins.
struct Words {
    const u16 *keys, *values;

    // Starts to copy a head's keys of the tile at `base`; those from position `end` on and features beyond the head become
    // zeros.
    template <u32 dim>
    DEVICE_METHOD void stage_keys(u16* to, const Step& s, u32 kv_head, u64 base, u64 end) const {
        constexpr u32 vectors = dim / 8;
        for (u32 i = threadIdx.x; i < TILE * vectors; i += blockDim.x) {
            u32 key = i / vectors, feature = i % vectors * 8;
            u16* place = to + key * Layout<dim>::key_stride + feature;
            if (base + key < end && feature < cache_width(s.head_dim)) {
                cp_async16(place, keys + key_place(s.capacity, s.head_dim, kv_head, base + key, feature));
            } else {
                *(uint4*)place = make_uint4(0, 0, 0, 0);
            }
        }
        cp_async_commit();
    }

    // The same of values: what nobody wrote may be a NaN, which not even a probability of zero removes.
    template <u32 dim>
    DEVICE_METHOD void stage_values(u16* to, const Step& s, u32 kv_head, u64 base, u64 end) const {
        for (u32 i = threadIdx.x; i < TILE / 8 * dim; i += blockDim.x) {
            u32 eight = i / dim, feature = i % dim;
            u64 position = base + 8 * eight;
            u16* place = to + eight * Layout<dim>::value_stride + 8 * feature;
            const u16* from = values + value_place(s.capacity, s.head_dim, kv_head, position, feature);
            if (position >= end || feature >= s.head_dim) {
                *(uint4*)place = make_uint4(0, 0, 0, 0);
            } else if (position + 8 <= end) {
                cp_async16(place, from);
            } else {
                *(uint4*)place = keep(*(const uint4*)from, (u32)(end - position));
            }
        }
        cp_async_commit();
    }
};

DEVICE Words words_of(const u16* keys, const u16* values, u32 place, u64 capacity, u32 heads, u32 group, u32 head_dim) {
    u64 first = place * cache_elements(capacity, head_dim, heads / group);
    return {keys + first, values + first};
}

// The kernels that the macro makes:
// KERNEL_NAME(attend_rows_64)
// KERNEL_NAME(attend_rows_96)
// KERNEL_NAME(attend_rows_128)
// KERNEL_NAME(attend_rows_256)
#ifndef LLMPRESS_STEP
#define ATTEND_ROWS(DIM, WARPS)                                                                                   \
    extern "C" __global__ void __launch_bounds__(32 * WARPS)                                                      \
    attend_rows_##DIM(const float* queries, u32 stride, const u16* keys, const u16* values, u64 capacity,         \
                      const u32* positions, const u32* places, u32 each, u32 heads, u32 group, u32 head_dim,      \
                      u32 window, float scale, float cap, u16* x, u32 ld) {                                       \
        Shared shared;                                                                                            \
        u32 sequence = blockIdx.z;                                                                                \
        u64 before = (u64)sequence * each;                                                                        \
        Words past = words_of(keys, values, places[sequence], capacity, heads, group, head_dim);                  \
        Step step = {positions[sequence], each, heads, group, head_dim, window, capacity, cap};                   \
        ROWS_QUERY(DIM, WARPS);                                                                                   \
        attend_rows<DIM, WARPS>(query, shared, queries + before * stride, stride, past, step, scale,              \
                                x + before * ld, ld);                                                             \
    }

#define ROWS_QUERY(DIM, WARPS) Registers<DIM> query
ATTEND_ROWS(64, 4)
ATTEND_ROWS(96, 4)
ATTEND_ROWS(128, 4)
#undef ROWS_QUERY
#define ROWS_QUERY(DIM, WARPS)                                                           \
    uint4* parked = shared.take<uint4>(WARPS * (DIM / 16) * WARP);                       \
    Parked query = {parked + threadIdx.x / WARP * (DIM / 16) * WARP + threadIdx.x % WARP}
ATTEND_ROWS(256, 2)
#undef ROWS_QUERY
#endif

// KERNEL_NAME(attend_tile_64)
// KERNEL_NAME(attend_tile_96)
// KERNEL_NAME(attend_tile_128)
// KERNEL_NAME(attend_tile_256)
#define ATTEND_TILE(DIM)                                                                                          \
    extern "C" __global__ void __launch_bounds__(TILE_THREADS)                                                    \
    attend_tile_##DIM(const float* queries, u32 stride, const u16* keys, const u16* values, u64 capacity,         \
                      const u32* positions, const u32* places, u32 each, u32 heads, u32 group, u32 head_dim,      \
                      u32 window, float scale, float cap, float* sums, float2* scales) {                          \
        let_later_begin();                                                                                        \
        wait_for_earlier();                                                                                       \
        u32 kv_heads = heads / group, sequence = blockIdx.z / kv_heads;                                           \
        u64 before = (u64)sequence * each;                                                                        \
        Words past = words_of(keys, values, places[sequence], capacity, heads, group, head_dim);                  \
        Step step = {positions[sequence], each, heads, group, head_dim, window, capacity, cap};                   \
        attend_tile<DIM>(queries + before * stride, stride, past, step, blockIdx.z % kv_heads, before,            \
                         (u64)(gridDim.z / kv_heads) * each, scale, sums, scales);                                \
    }
ATTEND_TILE(64)
ATTEND_TILE(96)
ATTEND_TILE(128)
ATTEND_TILE(256)

// x[token] in BF16 as attend_rows makes it, from what attend_tile left. Block (head, token): the factors of 128 tiles
// are made side by side, then each thread joins its features tile by tile.
extern "C" __global__ void __launch_bounds__(JOIN_THREADS)
join_tiles(const float* sums, const float2* scales, u64 capacity, const u32* positions, u32 each, u32 heads,
           u32 head_dim, u32 window, u16* x, u32 ld) {
    let_later_begin();
    wait_for_earlier();
    Shared shared;
    float* kept = shared.take<float>(JOIN_THREADS);
    float* brought = shared.take<float>(JOIN_THREADS);
    float* of_tiles = shared.take<float>(JOIN_THREADS);
    float* of_warps = shared.take<float>(JOIN_THREADS / WARP);
    u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP, head = blockIdx.x, tokens = gridDim.y;
    Step s = {positions[blockIdx.y / each], each, heads, 1, head_dim, window, capacity, 0.0f};
    u64 token = blockIdx.y, row = token % each, tile = s.first(row) / TILE;
    u64 end = (min(s.last(row) + 1, capacity) + TILE - 1) / TILE;
    u64 step = (u64)tokens * heads, slot = token * heads + head;
    float top = minus_infinity(), total = 0, y[2] = {};
    for (; tile < end; tile += JOIN_THREADS) {
        u32 count = (u32)min(end - tile, (u64)JOIN_THREADS);
        float2 own = make_float2(minus_infinity(), 0);
        if (thread < count) own = scales[(tile + thread) * step + slot];
        // The largest maximum up to this tile.
        float now = own.x;
#pragma unroll
        for (u32 distance = 1; distance < WARP; distance *= 2) {
            float other = __shfl_up_sync(ALL_LANES, now, distance);
            if (lane >= distance) now = larger(now, other);
        }
        if (lane == WARP - 1) of_warps[warp] = now;
        float before = __shfl_up_sync(ALL_LANES, now, 1);
        if (lane == 0) before = minus_infinity();
        __syncthreads();
        float all = top;
#pragma unroll
        for (u32 w = 0; w < JOIN_THREADS / WARP; w++) {
            if (w == warp) {
                now = larger(all, now);
                before = larger(all, before);
            }
            all = larger(all, of_warps[w]);
        }
        top = all;
        kept[thread] = keeps(before, now);
        brought[thread] = brings(own.x, now);
        of_tiles[thread] = own.y;
        __syncthreads();
#pragma unroll 8
        for (u32 i = 0; i < count; i++) {
            const float* from = sums + ((tile + i) * step + slot) * cache_width(head_dim);
            total = join(total, kept[i], of_tiles[i], brought[i]);
#pragma unroll
            for (u32 part = 0; part < 2; part++) {
                u32 feature = thread + part * JOIN_THREADS;
                if (feature < head_dim) y[part] = join(y[part], kept[i], from[feature], brought[i]);
            }
        }
        __syncthreads();
    }
    u16* to = x + token * ld;
#pragma unroll
    for (u32 part = 0; part < 2; part++) {
        u32 feature = thread + part * JOIN_THREADS;
        if (feature < head_dim) to[head * head_dim + feature] = float_to_bf16(__fdiv_rn(y[part], total));
    }
    if (head + 1 < heads) return;
    for (u32 i = heads * head_dim + thread; i < ld; i += JOIN_THREADS) to[i] = 0;
}

// Self-attention over keys and values that are codes (attention.cuh, cache_codes.cuh): what they stand for is rounded to BF16 on its way into
// shared memory. What joins tiles is in attention.cu.
#include "attention.cuh"
#include "cache_codes.cuh"

// The codes of a vector of eight: bytes, or their lower or upper halves.
struct Eight {
    u32 words[2], shift, mask;

    DEVICE_METHOD u32 get(u32 i) const { return words[i / 4] >> (8 * (i % 4) + shift) & mask; }
};

// Keys and values as codes of `bits` bits, of a sequence.
struct Codes {
    Coded<const u8, const float> keys, values;
    u32 bits;

    // Eight codes from `at` on, of a feature that lies in the upper half or not.
    DEVICE_METHOD Eight load(const u8* at, bool upper) const {
        uint2 vector = *(const uint2*)at;
        return {{vector.x, vector.y}, upper ? 4u : 0u, bits == 8 ? 0xffu : 0xfu};
    }

    template <u32 dim>
    DEVICE_METHOD void stage_keys(u16* to, const Step& s, u32 kv_head, u64 base, u64 end) const {
        constexpr u32 vectors = dim / 8;
        u32 bytes = code_bytes(s.head_dim, bits), groups = code_groups(s.head_dim);
        for (u32 i = threadIdx.x; i < TILE * vectors; i += blockDim.x) {
            u32 key = i / vectors, feature = i % vectors * 8, words[4] = {};
            if (base + key < end && feature < s.head_dim) {
                bool upper = feature >= bytes;
                Eight codes =
                    load(keys.codes + key_code_place(s.capacity, bytes, kv_head, base + key, upper ? feature - bytes : feature), upper);
                u64 grid = grid_place(s.capacity, groups, kv_head, base + key, feature / GROUP_FEATURES);
                float scale = keys.scales[grid];
                u32 zero = keys.zeros[grid];
#pragma unroll
                for (u32 j = 0; j < 8; j += 2) {
                    float low = feature + j < s.head_dim ? stands_for(scale, codes.get(j), zero) : 0.0f;
                    float high = feature + j + 1 < s.head_dim ? stands_for(scale, codes.get(j + 1), zero) : 0.0f;
                    words[j / 2] = floats_to_bf16x2(low, high);
                }
            }
            *(uint4*)(to + key * Layout<dim>::key_stride + feature) = make_uint4(words[0], words[1], words[2], words[3]);
        }
        cp_async_commit();
    }

    template <u32 dim>
    DEVICE_METHOD void stage_values(u16* to, const Step& s, u32 kv_head, u64 base, u64 end) const {
        u32 bytes = code_bytes(s.head_dim, bits), groups = code_groups(s.head_dim);
        for (u32 i = threadIdx.x; i < TILE / 8 * dim; i += blockDim.x) {
            u32 eight = i / dim, feature = i % dim, words[4] = {};
            u64 position = base + 8 * eight;
            if (position < end && feature < s.head_dim) {
                bool upper = feature >= bytes;
                Eight codes =
                    load(values.codes + value_code_place(s.capacity, bytes, kv_head, position, upper ? feature - bytes : feature), upper);
                float x[8];
#pragma unroll
                for (u32 j = 0; j < 8; j++) {
                    u64 grid = grid_place(s.capacity, groups, kv_head, position + j, feature / GROUP_FEATURES);
                    // What nobody wrote stands for nothing.
                    x[j] = position + j < end ? stands_for(values.scales[grid], codes.get(j), values.zeros[grid]) : 0.0f;
                }
#pragma unroll
                for (u32 j = 0; j < 4; j++) words[j] = floats_to_bf16x2(x[2 * j], x[2 * j + 1]);
            }
            *(uint4*)(to + eight * Layout<dim>::value_stride + 8 * feature) = make_uint4(words[0], words[1], words[2], words[3]);
        }
        cp_async_commit();
    }
};

DEVICE Codes codes_of(const u8* keys, const u8* values, u32 bits, u32 place, u64 capacity, u32 heads, u32 group, u32 head_dim) {
    using Of = Coded<const u8, const float>;
    u32 kv_heads = heads / group;
    return {Of::of(keys, place, capacity, head_dim, kv_heads, bits), Of::of(values, place, capacity, head_dim, kv_heads, bits), bits};
}

// The kernels that the macros make:
// KERNEL_NAME(attend_code_rows_64)
// KERNEL_NAME(attend_code_rows_96)
// KERNEL_NAME(attend_code_rows_128)
// KERNEL_NAME(attend_code_rows_256)
#ifndef LLMPRESS_STEP
#define ATTEND_ROWS(DIM, WARPS)                                                                                   \
    extern "C" __global__ void __launch_bounds__(32 * WARPS)                                                      \
    attend_code_rows_##DIM(const float* queries, u32 stride, const u8* keys, const u8* values, u32 bits,          \
                           u64 capacity, const u32* positions, const u32* places, u32 each, u32 heads, u32 group, \
                           u32 head_dim, u32 window, float scale, float cap, u16* x, u32 ld) {                    \
        Shared shared;                                                                                            \
        u32 sequence = blockIdx.z;                                                                                \
        u64 before = (u64)sequence * each;                                                                        \
        Codes past = codes_of(keys, values, bits, places[sequence], capacity, heads, group, head_dim);            \
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

// KERNEL_NAME(attend_code_tile_64)
// KERNEL_NAME(attend_code_tile_96)
// KERNEL_NAME(attend_code_tile_128)
// KERNEL_NAME(attend_code_tile_256)
#define ATTEND_TILE(DIM)                                                                                          \
    extern "C" __global__ void __launch_bounds__(TILE_THREADS)                                                    \
    attend_code_tile_##DIM(const float* queries, u32 stride, const u8* keys, const u8* values, u32 bits,          \
                           u64 capacity, const u32* positions, const u32* places, u32 each, u32 heads, u32 group, \
                           u32 head_dim, u32 window, float scale, float cap, float* sums, float2* scales) {       \
        let_later_begin();                                                                                        \
        wait_for_earlier();                                                                                       \
        u32 kv_heads = heads / group, sequence = blockIdx.z / kv_heads;                                           \
        u64 before = (u64)sequence * each;                                                                        \
        Codes past = codes_of(keys, values, bits, places[sequence], capacity, heads, group, head_dim);            \
        Step step = {positions[sequence], each, heads, group, head_dim, window, capacity, cap};                   \
        attend_tile<DIM>(queries + before * stride, stride, past, step, blockIdx.z % kv_heads, before,            \
                         (u64)(gridDim.z / kv_heads) * each, scale, sums, scales);                                \
    }
ATTEND_TILE(64)
ATTEND_TILE(96)
ATTEND_TILE(128)
ATTEND_TILE(256)

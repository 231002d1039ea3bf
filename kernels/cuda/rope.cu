// Heads made ready for attention: query and key normed where the model does so, turned by their position (Su et al.,
// RoFormer, section 3.4.2), key and value put into the cache.
#include "cache.cuh"
#include "warp.cuh"

// A warp takes one head of one token. `qkv`: rows of `stride` with `heads` query heads, `kv_heads` keys and as many values of
// `head_dim` features. `cos`, `sin`: [positions, half]; feature i < half turns with feature i + half, or, where `neighbours` is not 0, feature
// 2 i with feature 2 i + 1; those from 2 half on stay. Queries are written back in F32; keys and values go to the cache (cache.cuh), or, where there is none, keys are written back too. Tokens are those of several sequences, `each`
// of one: the first of sequence s is at position positions[s], and its keys and values are number places[s] of the cache.
// A norm's squares are added by lanes over features lane, lane + 32, ..., then as warp.cuh says.
extern "C" __global__ void __launch_bounds__(128)
rope(float* qkv, u32 stride, u32 heads, u32 kv_heads, u32 head_dim, u32 half, u32 neighbours, const float* cos, const float* sin,
     const u32* positions, const u32* places, u32 each, const float* q_norm, const float* k_norm, float eps, u16* keys, u16* values, u64 capacity) {
    let_later_begin();
    wait_for_earlier();
    u32 lane = threadIdx.x % WARP, head = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    u32 sequence = blockIdx.y / each;
    u64 token = blockIdx.y, row = positions[sequence] + token % each;
    // Whole warps leave; nothing below waits for the block.
    if (head >= heads + 2 * kv_heads || row >= capacity) return;
    float* x = qkv + token * stride + (u64)head * head_dim;
    u64 before = places[sequence] * cache_elements(capacity, head_dim, kv_heads);
    if (head >= heads + kv_heads) {
        if (!values) return;
        values += before;
        u16* to = values + value_place(capacity, head_dim, head - heads - kv_heads, row, 0);
        // Features lie eight elements apart.
        for (u32 i = lane; i < head_dim; i += WARP) to[8 * i] = float_to_bf16(x[i]);
        return;
    }
    bool is_key = head >= heads;
    const float* norm = is_key ? k_norm : q_norm;
    float scale = 1.0f;
    if (norm) {
        float sum = 0;
        for (u32 i = lane; i < head_dim; i += WARP) sum = __fmaf_rn(x[i], x[i], sum);
        sum = warp_sum(sum);
        scale = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(sum, (float)head_dim), eps)));
    }
    // All lanes have read before one writes.
    __syncwarp();
    bool to_cache = is_key && keys;
    u16* key = to_cache ? keys + before + key_place(capacity, head_dim, head - heads, row, 0) : nullptr;
    // Attention reads eight features at a time.
    if (to_cache && lane < cache_width(head_dim) - head_dim) key[head_dim + lane] = 0;
    for (u32 i = lane; i < head_dim; i += WARP) {
        // The first of a pair takes the other along.
        bool turns = i < 2 * half, second = neighbours ? i % 2 != 0 : i >= half;
        if (turns && second) continue;
        float low = x[i];
        if (norm) low = __fmul_rn(__fmul_rn(low, scale), norm[i]);
        if (turns) {
            u32 pair = neighbours ? i / 2 : i, other = neighbours ? i + 1 : i + half;
            float high = x[other];
            if (norm) high = __fmul_rn(__fmul_rn(high, scale), norm[other]);
            float c = cos[row * half + pair], s = sin[row * half + pair];
            float turned = __fadd_rn(__fmul_rn(high, c), __fmul_rn(low, s));
            low = __fsub_rn(__fmul_rn(low, c), __fmul_rn(high, s));
            if (to_cache) {
                key[other] = float_to_bf16(turned);
            } else {
                x[other] = turned;
            }
        }
        if (to_cache) {
            key[i] = float_to_bf16(low);
        } else {
            x[i] = low;
        }
    }
}

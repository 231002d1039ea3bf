// Keys and values put into the cache as codes (cache_codes.cuh).
#include "cache_codes.cuh"
#include "warp.cuh"

// The nearest integer, of less than 2^22.
DEVICE float nearest(float x) { return __fsub_rn(__fadd_rn(x, 12582912.0f), 12582912.0f); }
DEVICE float kept(float x, float most) { return x < 0.0f ? 0.0f : x > most ? most : x; }

// A warp takes the key or the value of one head of one token. `qkv`: rows of `stride` with `heads` query heads, `kv_heads` keys, which are
// normed and turned, and as many values of `head_dim` features. Tokens, positions and places are those of rope.cu. fault: `label` goes there
// if it is zero and a value is NaN or infinite, or the range of a group is.
extern "C" __global__ void __launch_bounds__(128)
keep_codes(const float* qkv, u32 stride, u32 heads, u32 kv_heads, u32 head_dim, u32 bits, const u32* positions, const u32* places,
           u32 each, u8* keys, u8* values, u64 capacity, u32* fault, u32 label) {
    let_later_begin();
    wait_for_earlier();
    u32 lane = threadIdx.x % WARP, number = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    u32 sequence = blockIdx.y / each;
    u64 token = blockIdx.y, position = positions[sequence] + token % each;
    // Whole warps leave.
    if (number >= 2 * kv_heads || position >= capacity) return;
    bool is_key = number < kv_heads;
    u32 head = is_key ? number : number - kv_heads, groups = code_groups(head_dim), bytes = code_bytes(head_dim, bits);
    const float* x = qkv + token * stride + (u64)(heads + number) * head_dim;
    auto to = Coded<u8, float>::of(is_key ? keys : values, places[sequence], capacity, head_dim, kv_heads, bits);
    float most = (float)((1u << bits) - 1), scales[MOST_GROUPS], zeros[MOST_GROUPS];
#pragma unroll
    for (u32 group = 0; group < MOST_GROUPS; group++) {
        u32 end = min(head_dim, (group + 1) * GROUP_FEATURES);
        float low = 0.0f, high = 0.0f;
        bool finite = true;
        for (u32 i = group * GROUP_FEATURES + lane; i < end; i += WARP) {
            float v = x[i];
            low = v < low ? v : low;
            high = v > high ? v : high;
            finite = finite && (__float_as_uint(v) & 0x7fffffffu) < 0x7f800000u;
        }
        high = warp_max(high), low = -warp_max(-low);
        float scale = __fdiv_rn(__fsub_rn(high, low), most);
        scale = scale == 0.0f ? 1.0f : scale;
        bool wrong = !__all_sync(ALL_LANES, finite) || (__float_as_uint(scale) & 0x7fffffffu) >= 0x7f800000u;
        // The results are not used.
        scales[group] = wrong ? 1.0f : scale;
        zeros[group] = wrong ? 0.0f : kept(nearest(__fdiv_rn(-low, scale)), most);
        if (lane == 0 && group < groups) {
            if (wrong && fault) atomicCAS(fault, 0, label);
            u64 at = grid_place(capacity, groups, head, position, group);
            to.scales[at] = scales[group], to.zeros[at] = (u8)zeros[group];
        }
    }
    auto code_of = [&](u32 i) {
        if (i >= head_dim) return 0u;
        float scale = i < GROUP_FEATURES ? scales[0] : scales[1], zero = i < GROUP_FEATURES ? zeros[0] : zeros[1];
        float v = x[i];
        bool finite = (__float_as_uint(v) & 0x7fffffffu) < 0x7f800000u;
        return finite ? (u32)kept(__fadd_rn(nearest(__fdiv_rn(v, scale)), zero), most) : 0u;
    };
    for (u32 i = lane; i < bytes; i += WARP) {
        u32 code = code_of(i);
        if (bits == 4) code |= code_of(bytes + i) << 4;
        u64 at = is_key ? key_code_place(capacity, bytes, head, position, i) : value_code_place(capacity, bytes, head, position, i);
        to.codes[at] = (u8)code;
    }
}

// Activations to codes of 1 to 8 bits: dynamic, asymmetric, a grid a token, as the processor makes them (kernels/src/cpu/abq).
//
//   low = min(x, 0)   high = max(x, 0)   step = (high - low) / (2^q - 1), 1 where that is 0   zero = round(-low / step)
//   code = round(x / step) + zero, kept in 0 .. 2^q - 1         F32, each operation rounded; halves go to the even integer
#include "abq_integer.cuh"
#include "warp.cuh"

// The nearest integer, of less than 2^22.
DEVICE float nearest(float x) { return __fsub_rn(__fadd_rn(x, 12582912.0f), 12582912.0f); }
DEVICE float kept(float x, float most) { return x < 0.0f ? 0.0f : x > most ? most : x; }
DEVICE float widened(u16 x) { return bf16_to_float(x); }
DEVICE float widened(float x) { return x; }

// What is made of one token.
struct Made {
    u8* codes;
    float* steps;
    i32* zeros;
    i32* sums;
};

// One block a token; tokens beyond the last become zeros, which fill up what `mma` takes. `length`: blocks of 32 columns of a
// group. fault: `label` goes there if it is zero and x has a NaN or an infinity, or its range is infinite. A launch gives shared
// memory for the sums of the groups.
template <bool by_bits, typename T>
DEVICE void quantise(const T* x, u32 stride, u32 tokens, u32 cols, u32 bits, u32 slot, u32 groups, u32 length, const Made& to,
                     u32* fault, u32 label) {
    let_later_begin();
    wait_for_earlier();
    Shared shared;
    float* lows = shared.take<float>(WARPS);
    float* highs = shared.take<float>(WARPS);
    u32* odd = shared.take<u32>(WARPS);
    i32* sums = shared.take<i32>(groups);
    u32 token = blockIdx.x, thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    bool there = token < tokens;
    const T* row = x + (u64)(there ? token : 0) * stride;
    float low = 0.0f, high = 0.0f;
    bool finite = true;
    if (there) {
        for (u32 k = thread; k < cols; k += THREADS) {
            float v = widened(row[k]);
            low = v < low ? v : low;
            high = v > high ? v : high;
            finite = finite && (__float_as_uint(v) & 0x7fffffffu) < 0x7f800000u;
        }
    }
    for (u32 i = thread; i < groups; i += THREADS) sums[i] = 0;
    high = warp_max(high), low = -warp_max(-low);
    finite = __all_sync(ALL_LANES, finite);
    if (lane == 0) lows[warp] = low, highs[warp] = high, odd[warp] = !finite;
    __syncthreads();
    u32 wrong = 0;
#pragma unroll
    for (u32 i = 0; i < WARPS; i++) {
        low = lows[i] < low ? lows[i] : low;
        high = highs[i] > high ? highs[i] : high;
        wrong |= odd[i];
    }
    float most = (float)((1u << bits) - 1), step = __fdiv_rn(__fsub_rn(high, low), most);
    step = step == 0.0f ? 1.0f : step;
    wrong |= (__float_as_uint(step) & 0x7fffffffu) >= 0x7f800000u;
    // The results are not used.
    step = wrong ? 1.0f : step;
    float zero = wrong ? 0.0f : kept(nearest(__fdiv_rn(-low, step)), most);
    if (thread == 0) {
        if (wrong && fault) atomicCAS(fault, 0, label);
        to.steps[token] = step, to.zeros[token] = (i32)zero;
    }
    auto code_of = [&](u32 k) {
        if (!there || wrong || k >= cols) return 0u;
        return (u32)kept(__fadd_rn(nearest(__fdiv_rn(widened(row[k]), step)), zero), most);
    };
    // Of the codes less zero of 32 columns at a time: those that there are.
    auto add = [&](u32 code, u32 k, u32 group) {
        i32 sum = there && k < cols ? (i32)code - (i32)zero : 0;
        for (u32 distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, distance);
        if (lane == 0 && group < groups) atomicAdd(sums + group, sum);
    };
    u32 across = (cols + BITS_TILE_K - 1) / BITS_TILE_K;
    for (u32 word = warp; word < across * BLOCKS; word += WARPS) {
        u32 tile = word / BLOCKS, w = word % BLOCKS;
        if (by_bits) {
            // Word q = w of the tile: lane's bit belongs to
            u32 k = tile * BITS_TILE_K + lane % 8 / 2 * BLOCK_K + 8 * w + 4 * (lane % 2) + lane / 8;
            u32 code = code_of(k), mine = 0;
            add(code, k, tile * BLOCKS / length);
            for (u32 i = 0; i < bits; i++) {
                u32 plane = __ballot_sync(ALL_LANES, code >> i & 1);
                if (i == lane) mine = plane;
            }
            u32 rows = token * slot + lane, fragment = rows / 16, g = rows % 8;
            if (lane < slot) {
                ((u32*)to.codes)[(((u64)fragment * across + tile) * WARP + g * 4 + w) * 2 + rows % 16 / 8] = mine;
            }
        } else {
            u32 k = word * BLOCK_K + lane, code = code_of(k);
            add(code, k, word / length);
            to.codes[((u64)token * across + tile) * BITS_TILE_K + lane / 8 * 32 + w * 8 + lane % 8] = (u8)code;
        }
    }
    __syncthreads();
    for (u32 i = thread; i < groups; i += THREADS) to.sums[(u64)token * groups + i] = sums[i];
}

// KERNEL_NAME(quantise_bits_bf16)
// KERNEL_NAME(quantise_bits_f32)
// KERNEL_NAME(quantise_bytes_bf16)
// KERNEL_NAME(quantise_bytes_f32)
#define QUANTISE(form, by_bits, kind, T)                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS) quantise_##form##_##kind(                                     \
        const T* x, u32 stride, u32 tokens, u32 cols, u32 bits, u32 slot, u32 groups, u32 length, u8* codes, float* steps, \
        i32* zeros, i32* sums, u32* fault, u32 label) {                                                                 \
        quantise<by_bits>(x, stride, tokens, cols, bits, slot, groups, length, {codes, steps, zeros, sums}, fault, label); \
    }
QUANTISE(bits, true, bf16, u16) QUANTISE(bits, true, f32, float)
QUANTISE(bytes, false, bf16, u16) QUANTISE(bytes, false, f32, float)

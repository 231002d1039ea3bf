// Each built-in and device function once, for comparison with plain definitions.
#include "device.cuh"

// Eight results a thread from three words a thread.
extern "C" __global__ void integers(const u32* in, u32* out) {
    u64 t = blockIdx.x * (u64)blockDim.x + threadIdx.x;
    u32 a = in[3 * t], b = in[3 * t + 1], c = in[3 * t + 2];
    u32* to = out + 10 * t;
    to[0] = __byte_perm(a, b, c & 0x7777);
    to[1] = __funnelshift_l(a, b, c);
    to[2] = __funnelshift_r(a, b, c);
    to[3] = lop3<0xca>(a, b, c);
    to[4] = (u32)__popc(a) | (u32)__clz(b) << 8 | (u32)__ffs(c) << 16;
    to[5] = __brev(a);
    to[6] = __umulhi(a, b);
    to[7] = lop3<0x96>(a, b, c);
    to[8] = min(a, b);
    to[9] = (u32)max((i32)b, (i32)c);
}

// Shuffles and votes of each warp.
extern "C" __global__ void lanes(const u32* in, u32* out) {
    u32 value = in[threadIdx.x], lane = threadIdx.x % WARP;
    u32* to = out + 8 * threadIdx.x;
    to[0] = __shfl_sync(ALL_LANES, value, lane * 7 + 3);
    to[1] = __shfl_up_sync(ALL_LANES, value, 5);
    to[2] = __shfl_down_sync(ALL_LANES, value, 9);
    to[3] = __shfl_xor_sync(ALL_LANES, value, 18);
    to[4] = __ballot_sync(ALL_LANES, value & 1);
    to[5] = (u32)__any_sync(ALL_LANES, value == 0) | (u32)__all_sync(ALL_LANES, value != 0) << 1;
    to[6] = __shfl_sync(ALL_LANES, value, 2, 8);
    to[7] = (u32)(__shfl_xor_sync(ALL_LANES, (u64)value << 20, 1) >> 20);
}

// d = a b + c for one warp: a 16 x 16, b 16 x 8 (stored by column), c and d 16 x 8.
extern "C" __global__ void product(const u32* a, const u32* b, const float* c, float* d) {
    u32 g = threadIdx.x / 4, q = threadIdx.x % 4;
    u32 left[4] = {a[g * 8 + q], a[(g + 8) * 8 + q], a[g * 8 + q + 4], a[(g + 8) * 8 + q + 4]};
    float sums[4] = {c[g * 8 + 2 * q], c[g * 8 + 2 * q + 1], c[(g + 8) * 8 + 2 * q], c[(g + 8) * 8 + 2 * q + 1]};
    mma_bf16(sums, left, b[g * 8 + q], b[g * 8 + q + 4]);
    for (u32 i = 0; i < 4; i++) d[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = sums[i];
}

// The same of a 16 x 32 of which two of four are kept, both by the lower lanes' positions and by the upper ones'. a: the 16 kept ones of
// each row; kept: of each row the nibbles of eight quads; b: 8 columns of 32.
extern "C" __global__ void sparse_product(const u32* a, const u32* kept, const u32* b, const float* c, float* lower, float* upper) {
    u32 g = threadIdx.x / 4, q = threadIdx.x % 4;
    u32 left[4] = {a[g * 8 + q], a[(g + 8) * 8 + q], a[g * 8 + q + 4], a[(g + 8) * 8 + q + 4]};
    uint4 right = make_uint4(b[g * 16 + q], b[g * 16 + q + 4], b[g * 16 + q + 8], b[g * 16 + q + 12]);
    // Half of the columns of both rows.
    u32 half = q % 2 * 16, places = (kept[g] >> half & 0xffff) | kept[g + 8] >> half << 16;
    for (u32 i = 0; i < 2; i++) {
        float sums[4] = {c[g * 8 + 2 * q], c[g * 8 + 2 * q + 1], c[(g + 8) * 8 + 2 * q], c[(g + 8) * 8 + 2 * q + 1]};
        // Lanes that are not asked hold what no places are.
        mma_sparse_bf16(sums, left, right, q / 2 == i ? places : 0, i != 0);
        for (u32 j = 0; j < 4; j++) (i ? upper : lower)[(g + j / 2 * 8) * 8 + 2 * q + j % 2] = sums[j];
    }
}

// Four matrices of eight rows of 16 bytes, those of matrix i from row `rows[i]` on, and what lanes get of them.
extern "C" __global__ void matrices(const uint4* in, const u32* rows, u32* out) {
    Shared shared;
    uint4* piece = shared.take<uint4>(2 * WARP);
    for (u32 i = 0; i < 2; i++) piece[2 * threadIdx.x + i] = in[2 * threadIdx.x + i];
    __syncwarp();
    uint4 words = load_matrices(piece + rows[threadIdx.x / 8] + threadIdx.x % 8);
    u32 all[4] = {words.x, words.y, words.z, words.w};
    for (u32 i = 0; i < 4; i++) out[4 * threadIdx.x + i] = all[i];
}

extern "C" __global__ void functions(const float* in, float* exponentials, u32* rounded) {
    u64 t = blockIdx.x * (u64)blockDim.x + threadIdx.x;
    exponentials[t] = exponential(in[t]);
    rounded[t] = floats_to_bf16x2(in[t], bf16_to_float(float_to_bf16(in[t])));
}

// The sum of a block's words through shared memory and warps, and where each block stands.
extern "C" __global__ void sums(const u32* in, u64 count, u32* out, float scale) {
    Shared shared;
    u32* of_warps = shared.take<u32>(WARP);
    u64 block = blockIdx.x + (u64)gridDim.x * (blockIdx.y + (u64)gridDim.y * blockIdx.z);
    u64 t = block * blockDim.x + threadIdx.x;
    u32 sum = t < count ? in[t] : 0;
    for (u32 distance = WARP / 2; distance; distance /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, distance);
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        u32 total = 0;
        for (u32 warp = 0; warp < blockDim.x / WARP; warp++) total += of_warps[warp];
        out[block] = total * (u32)scale;
    }
}

// The same of bytes, and of bits: a 16 rows of eight words of bytes and of four words of bits, b eight such columns.
extern "C" __global__ void integer_products(const u32* a, const u32* b, const i32* c, i32* bytes, i32* bits) {
    u32 g = threadIdx.x / 4, q = threadIdx.x % 4;
    i32 of_bytes[4], of_bits[4];
    for (u32 i = 0; i < 4; i++) of_bytes[i] = of_bits[i] = c[(g + i / 2 * 8) * 8 + 2 * q + i % 2];
    u32 left[4] = {a[g * 8 + q], a[(g + 8) * 8 + q], a[g * 8 + q + 4], a[(g + 8) * 8 + q + 4]};
    mma_u8(of_bytes, left, b[g * 8 + q], b[g * 8 + q + 4]);
    mma_b1(of_bits, a[g * 4 + q], a[(g + 8) * 4 + q], b[g * 4 + q]);
    for (u32 i = 0; i < 4; i++) {
        u32 at = (g + i / 2 * 8) * 8 + 2 * q + i % 2;
        bytes[at] = of_bytes[i], bits[at] = of_bits[i];
    }
}

// Sums of two BF16 each, and copies of eight bytes in the background.
extern "C" __global__ void pairs(const u32* a, const u32* b, u32* sums, uint2* copies) {
    Shared shared;
    uint2* piece = shared.take<uint2>(WARP);
    u32 t = threadIdx.x;
    cp_async8(piece + t, (const uint2*)a + t);
    cp_async_commit();
    sums[t] = add_exactly_bf16x2(a[t], b[t]);
    cp_async_wait<0>();
    copies[t] = piece[t];
}

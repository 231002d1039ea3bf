// Root mean square norm (Zhang and Sennrich) of the residual stream.
//
// Order of additions: thread t of 1,024 adds the squares of features t, t + 1024, ... with fused multiply-adds; the lanes of a
// warp are added as warp.cuh says, then the 32 warps likewise. One token is all that a step has: its norm is worth many threads.
#include "warp.cuh"

constexpr u32 THREADS = 1024;

// 1 / sqrt(mean of x^2 + eps) for the block's token, the same in all threads.
DEVICE float inverse_root(const float* x, u32 hidden, float eps) {
    Shared shared;
    float* of_warps = shared.take<float>(THREADS / WARP);
    float sum = 0;
    for (u32 i = threadIdx.x; i < hidden; i += THREADS) sum = __fmaf_rn(x[i], x[i], sum);
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = sum;
    __syncthreads();
    sum = warp_sum(of_warps[threadIdx.x % WARP]);
    return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(sum, (float)hidden), eps)));
}

// x[token][i] = h[token][i] / root * weight[i] in BF16, rows of `ld` that end in zeros. One block a token.
extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm(const float* h, const float* weight, u32 hidden, float eps, u16* x, u32 ld) {
    let_later_begin();
    wait_for_earlier();
    const float* from = h + (u64)blockIdx.x * hidden;
    float scale = inverse_root(from, hidden, eps);
    u16* to = x + (u64)blockIdx.x * ld;
    for (u32 i = threadIdx.x; i < ld; i += THREADS) {
        to[i] = i < hidden ? float_to_bf16(__fmul_rn(__fmul_rn(from[i], scale), weight[i])) : (u16)0;
    }
}

// y[token][i] = y[token][i] / root * weight[i] in place, rows `stride` apart: the norm of all heads' queries, or keys, together. One block a token.
extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm_rows(float* y, u32 stride, const float* weight, u32 width, float eps) {
    let_later_begin();
    wait_for_earlier();
    float* row = y + (u64)blockIdx.x * stride;
    // All have read when the sum is there.
    float scale = inverse_root(row, width, eps);
    for (u32 i = threadIdx.x; i < width; i += THREADS) row[i] = __fmul_rn(__fmul_rn(row[i], scale), weight[i]);
}

// x[token][i] = h[token][i] in BF16, rows of `ld` that end in zeros: of sub-layers whose inputs are not normed. One block a token.
extern "C" __global__ void __launch_bounds__(THREADS)
round_rows(const float* h, u32 hidden, u16* x, u32 ld) {
    let_later_begin();
    wait_for_earlier();
    const float* from = h + (u64)blockIdx.x * hidden;
    u16* to = x + (u64)blockIdx.x * ld;
    for (u32 i = threadIdx.x; i < ld; i += THREADS) to[i] = i < hidden ? float_to_bf16(from[i]) : (u16)0;
}

// h[token][i] += y[token][i] / root * weight[i]: the norm of a sub-layer's output. One block a token.
extern "C" __global__ void __launch_bounds__(THREADS)
add_rms_norm(const float* y, const float* weight, u32 hidden, float eps, float* h) {
    let_later_begin();
    wait_for_earlier();
    const float* from = y + (u64)blockIdx.x * hidden;
    float scale = inverse_root(from, hidden, eps);
    float* to = h + (u64)blockIdx.x * hidden;
    for (u32 i = threadIdx.x; i < hidden; i += THREADS) {
        to[i] = __fadd_rn(to[i], __fmul_rn(__fmul_rn(from[i], scale), weight[i]));
    }
}

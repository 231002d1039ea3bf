// Layer norm (Ba et al., 2016) of the residual stream.
//
// Orders of additions: those of rms_norm.cu, first of the features, then of the squares of what is left without their mean.
#include "warp.cuh"

constexpr u32 THREADS = 1024;

// The sum over the block of what its threads have, the same in all of them. `of_warps`: a place for each warp, used once.
DEVICE float block_sum(float sum, float* of_warps) {
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = sum;
    __syncthreads();
    return warp_sum(of_warps[threadIdx.x % WARP]);
}

// x[token][i] = (h[token][i] - mean) / sqrt(mean of (h - mean)^2 + eps) * weight[i] + bias[i] in BF16, rows of `ld` that end in zeros; without a
// bias nothing is added. One block a token.
extern "C" __global__ void __launch_bounds__(THREADS)
layer_norm(const float* h, const float* weight, const float* bias, u32 hidden, float eps, u16* x, u32 ld) {
    let_later_begin();
    wait_for_earlier();
    Shared shared;
    float* of_sums = shared.take<float>(THREADS / WARP);
    float* of_squares = shared.take<float>(THREADS / WARP);
    const float* from = h + (u64)blockIdx.x * hidden;
    float sum = 0;
    for (u32 i = threadIdx.x; i < hidden; i += THREADS) sum = __fadd_rn(sum, from[i]);
    float mean = __fdiv_rn(block_sum(sum, of_sums), (float)hidden);
    float squares = 0;
    for (u32 i = threadIdx.x; i < hidden; i += THREADS) {
        float left = __fsub_rn(from[i], mean);
        squares = __fmaf_rn(left, left, squares);
    }
    squares = block_sum(squares, of_squares);
    float scale = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(squares, (float)hidden), eps)));
    u16* to = x + (u64)blockIdx.x * ld;
    for (u32 i = threadIdx.x; i < ld; i += THREADS) {
        float y = 0;
        if (i < hidden) {
            y = __fmul_rn(__fmul_rn(__fsub_rn(from[i], mean), scale), weight[i]);
            if (bias) y = __fadd_rn(y, bias[i]);
        }
        to[i] = float_to_bf16(y);
    }
}

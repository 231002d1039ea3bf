// Sums of blocks of a token's activations: what numbers beside the weights of a row are multiplied with.
//
//   out[token][j] = sum of x[token][k] over k = j block .. (j + 1) block - 1 that there are     in BF16
//
// Added in order of k, from +0, in F32, then rounded. Rows of `out` end in zeros.
#include "device.cuh"

extern "C" __global__ void __launch_bounds__(256)
block_sums(const u16* x, u32 stride, u32 tokens, u32 cols, u32 block, u16* out, u32 out_stride) {
    let_later_begin();
    wait_for_earlier();
    u64 at = blockIdx.x * (u64)blockDim.x + threadIdx.x;
    u64 token = at / out_stride, first = at % out_stride * block;
    if (token >= tokens) return;
    u64 end = min(first + block, (u64)cols);
    float sum = 0.0f;
    for (u64 k = first; k < end; k++) sum = __fadd_rn(sum, bf16_to_float(x[token * stride + k]));
    out[at] = float_to_bf16(sum);
}

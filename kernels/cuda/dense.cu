// Products with plain BF16 weights.
//
// KERNEL_NAME(dense_1_1)
// KERNEL_NAME(dense_1_2)
// KERNEL_NAME(dense_1_4)
// KERNEL_NAME(dense_2_1)
// KERNEL_NAME(dense_2_2)
// KERNEL_NAME(dense_4_1)
// KERNEL_NAME(dense_4_2)
// KERNEL_NAME(dense_8_1)
#include "product.cuh"

// Row-major [rows, cols]; cols is a multiple of 8, so that a lane's eight weights are one aligned vector.
struct Dense {
    const u16* words;
    u64 rows, cols;

    DEVICE_METHOD Fragment load(u64 strip, u64 tile, u32 lane) const {
        Fragment f;
        u64 row = strip * 16 + lane / 4;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u64 k = tile * 64 + 32 * half + 8 * (lane % 4);
            uint4 low = make_uint4(0, 0, 0, 0), high = low;
            if (k < cols && row < rows) low = load_once((const uint4*)(words + row * cols + k));
            if (k < cols && row + 8 < rows) high = load_once((const uint4*)(words + (row + 8) * cols + k));
            f.low[half][0] = low.x, f.low[half][1] = low.y, f.low[half][2] = low.z, f.low[half][3] = low.w;
            f.high[half][0] = high.x, f.high[half][1] = high.y, f.high[half][2] = high.z, f.high[half][3] = high.w;
        }
        return f;
    }
};

#define KERNEL(columns, strips)                                                                                \
    extern "C" __global__ void __launch_bounds__(256 * strips) dense_##columns##_##strips(                     \
        const u16* words, u64 rows, u64 cols, const u16* x, u32 stride, u32 tokens, float* y, u64 y_stride,    \
        const float* bias, u32 adds) {                                                                         \
        Dense weights = {words, rows, cols};                                                                   \
        product<columns, strips>(weights, rows, (cols + 63) / 64, {x, stride, tokens, y, y_stride, bias, adds}); \
    }
SHAPES(KERNEL)

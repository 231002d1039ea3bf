// Products with the integers that weights of 1 to 8 bits stand for, as a plain matrix of BF16; and what panels need of x.
//
// KERNEL_NAME(abq_panel_8_1_2)
// KERNEL_NAME(abq_panel_8_2_3)
#include "abq.cuh"

#ifndef LLMPRESS_STEP
// See add_groups_of_x. blockIdx.y counts 8 tokens; blockIdx.x * WARPS + warp counts parts, most of a slice for each slice.
extern "C" __global__ void __launch_bounds__(THREADS)
add_x(const u16* x, u32 stride, u32 tokens, u64 cols, u32 length, u32 log_slices, float* of_x) {
    Operands operands = {x, stride, tokens, nullptr, 0, nullptr, 0, log_slices};
    add_groups_of_x(operands, (u32)((cols + 63) / 64), length, of_x);
}

#define PANEL(columns, strips, stages)                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS) abq_panel_##columns##_##strips##_##stages(               \
        const u16* words, const float* scale, const float* offset, u32 groups, u32 length, u64 rows, u64 cols,     \
        const u16* x, u32 stride, u32 tokens, float* y, u64 y_stride, const float* bias, u32 adds, u32 log_slices, \
        const float* of_x, float4* sums, u32* done) {                                                              \
        Operands operands = {x, stride, tokens, y, y_stride, bias, adds, log_slices};                              \
        Plain weights = {words, rows, (u32)((cols + 7) / 8 * 8), (u32)((cols + 63) / 64)};                         \
        panel_groups<columns, strips, stages>(weights, {scale, offset, groups, length}, rows, operands, of_x,      \
                                              {sums, done});                                                      \
    }
PANEL(8, 1, 2) PANEL(8, 2, 3)
#endif

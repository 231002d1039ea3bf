// Products with weights of which two of four are kept, plain BF16.
//
// KERNEL_NAME(sparse24_stream_1_1_4)
// KERNEL_NAME(sparse24_stream_1_1_8)
// KERNEL_NAME(sparse24_stream_1_2_4)
// KERNEL_NAME(sparse24_stream_2_1_4)
// KERNEL_NAME(sparse24_stream_2_1_8)
// KERNEL_NAME(sparse24_stream_2_2_4)
// KERNEL_NAME(sparse24_stream_4_1_4)
// KERNEL_NAME(sparse24_stream_4_2_3)
// KERNEL_NAME(sparse24_stream_8_2_3)
// KERNEL_NAME(sparse24_panel_2_1_4)
// KERNEL_NAME(sparse24_panel_4_1_4)
// KERNEL_NAME(sparse24_panel_4_2_3)
// KERNEL_NAME(sparse24_panel_8_1_4)
// KERNEL_NAME(sparse24_panel_8_2_3)
// KERNEL_NAME(sparse24_panel_16_1_3)
// KERNEL_NAME(sparse24_panel_16_2_3)
// KERNEL_NAME(sparse24_panel_16_2_2)
#include "dense.cuh"
#include "sparse24.cuh"

#define STREAM(columns, strips, stages)                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS) sparse24_stream_##columns##_##strips##_##stages(            \
        const u16* words, const uint2* kept,                                                                          \
        u64 rows, u64 cols, const u16* x, u32 stride, u32 tokens, float* y, u64 y_stride,                             \
        const float* bias, u32 adds, u32 log_slices) {                                                                \
        Operands operands = {x, stride, tokens, y, y_stride, bias, adds, log_slices};                                 \
        u32 across = (u32)((cols + 127) / 128); Dense<Brain> values = {words, rows, across * 64, across, log_slices >> 8, nullptr}; Sparse24<Dense<Brain>> weights(values, kept);\
        stream_product<columns, strips, stages>(weights, rows, operands);                                             \
    }
STREAM_VARIANTS(STREAM)

#ifndef LLMPRESS_STEP
#define PANEL(columns, strips, stages)                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
        sparse24_panel_##columns##_##strips##_##stages(                                                               \
        const u16* words, const uint2* kept,                                                                          \
        u64 rows, u64 cols, const u16* x, u32 stride, u32 tokens, float* y, u64 y_stride,                             \
        const float* bias, u32 adds, u32 log_slices, float4* sums, u32* done) {                                       \
        Operands operands = {x, stride, tokens, y, y_stride, bias, adds, log_slices};                                 \
        u32 across = (u32)((cols + 127) / 128); Dense<Brain> values = {words, rows, across * 64, across, log_slices >> 8, nullptr}; Sparse24<Dense<Brain>> weights(values, kept);\
        panel_product<columns, strips, stages>(weights, rows, operands, {sums, done});                                \
    }
PANEL_VARIANTS(PANEL)
#endif

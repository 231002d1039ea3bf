// Products with plain F32 weights.
//
// KERNEL_NAME(dense_f32_stream_1_1_3)
// KERNEL_NAME(dense_f32_stream_2_1_3)
// KERNEL_NAME(dense_f32_stream_4_1_3)
// KERNEL_NAME(dense_f32_panel_4_1_2)
// KERNEL_NAME(dense_f32_panel_8_1_2)
#include "dense.cuh"

#define STREAM(columns, strips, stages)                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS) dense_f32_stream_##columns##_##strips##_##stages(          \
        const Dense<Single>::Word* words,                                                                          \
        u64 rows, u64 cols, const u16* x, u32 stride, u32 tokens, float* y, u64 y_stride,                        \
        const float* bias, u32 adds, u32 log_slices) {                                                           \
        Operands operands = {x, stride, tokens, y, y_stride, bias, adds, log_slices};                            \
        Dense<Single> weights = {words, rows, (u32)((cols + 7) / 8 * 8), (u32)((cols + 63) / 64), log_slices >> 8, nullptr}; \
        stream_product<columns, strips, stages>(weights, rows, operands);                                        \
    }
STREAM_VARIANTS_OF_PIECES(STREAM)

#ifndef LLMPRESS_STEP
#define PANEL(columns, strips, stages)                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                        \
        dense_f32_panel_##columns##_##strips##_##stages(                                                             \
        const Dense<Single>::Word* words,                                                                          \
        u64 rows, u64 cols, const u16* x, u32 stride, u32 tokens, float* y, u64 y_stride,                        \
        const float* bias, u32 adds, u32 log_slices, float4* sums, u32* done) {                                  \
        Operands operands = {x, stride, tokens, y, y_stride, bias, adds, log_slices};                            \
        Dense<Single> weights = {words, rows, (u32)((cols + 7) / 8 * 8), (u32)((cols + 63) / 64), log_slices >> 8, nullptr}; \
        panel_product<columns, strips, stages>(weights, rows, operands, {sums, done});                           \
    }
PANEL_VARIANTS_OF_PIECES(PANEL)
#endif

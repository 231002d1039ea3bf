// Products with weights of which two of four are kept, in fixed12.
//
// KERNEL_NAME(sparse24_fixed12_stream_1_1_4)
// KERNEL_NAME(sparse24_fixed12_stream_1_1_8)
// KERNEL_NAME(sparse24_fixed12_stream_1_2_4)
// KERNEL_NAME(sparse24_fixed12_stream_2_1_4)
// KERNEL_NAME(sparse24_fixed12_stream_2_1_8)
// KERNEL_NAME(sparse24_fixed12_stream_2_2_4)
// KERNEL_NAME(sparse24_fixed12_stream_4_1_4)
// KERNEL_NAME(sparse24_fixed12_stream_4_2_3)
// KERNEL_NAME(sparse24_fixed12_stream_8_2_3)
// KERNEL_NAME(sparse24_fixed12_panel_2_1_4)
// KERNEL_NAME(sparse24_fixed12_panel_4_1_4)
// KERNEL_NAME(sparse24_fixed12_panel_4_2_3)
// KERNEL_NAME(sparse24_fixed12_panel_8_1_4)
// KERNEL_NAME(sparse24_fixed12_panel_8_2_3)
// KERNEL_NAME(sparse24_fixed12_panel_16_1_3)
// KERNEL_NAME(sparse24_fixed12_panel_16_2_3)
// KERNEL_NAME(sparse24_fixed12_panel_16_2_2)
#include "fixed12.cuh"
#include "sparse24.cuh"

#define STREAM(columns, strips, stages)                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS) sparse24_fixed12_stream_##columns##_##strips##_##stages(    \
        const u8* sign_mantissa, const u8* codes, const u32* escape_offsets, const u32* escapes, const u32* bases, const uint2* kept,\
        u64 rows, u64 cols, const u16* x, u32 stride, u32 tokens, float* y, u64 y_stride,                             \
        const float* bias, u32 adds, u32 log_slices) {                                                                \
        Operands operands = {x, stride, tokens, y, y_stride, bias, adds, log_slices};                                 \
        Fixed12 values = {sign_mantissa, codes, escape_offsets, escapes, bases, (u32)((cols + 127) / 128)}; Sparse24<Fixed12> weights(values, kept);\
        stream_product<columns, strips, stages>(weights, rows, operands);                                             \
    }
STREAM_VARIANTS(STREAM)

#ifndef LLMPRESS_STEP
#define PANEL(columns, strips, stages)                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
        sparse24_fixed12_panel_##columns##_##strips##_##stages(                                                       \
        const u8* sign_mantissa, const u8* codes, const u32* escape_offsets, const u32* escapes, const u32* bases, const uint2* kept,\
        u64 rows, u64 cols, const u16* x, u32 stride, u32 tokens, float* y, u64 y_stride,                             \
        const float* bias, u32 adds, u32 log_slices, float4* sums, u32* done) {                                       \
        Operands operands = {x, stride, tokens, y, y_stride, bias, adds, log_slices};                                 \
        Fixed12 values = {sign_mantissa, codes, escape_offsets, escapes, bases, (u32)((cols + 127) / 128)}; Sparse24<Fixed12> weights(values, kept);\
        panel_product<columns, strips, stages>(weights, rows, operands, {sums, done});                                \
    }
PANEL_VARIANTS(PANEL)
#endif

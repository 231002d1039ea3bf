// Products with plain BF16 weights.
//
// KERNEL_NAME(dense_stream_1_1_4)
// KERNEL_NAME(dense_stream_1_1_8)
// KERNEL_NAME(dense_stream_1_2_4)
// KERNEL_NAME(dense_stream_2_1_4)
// KERNEL_NAME(dense_stream_2_1_8)
// KERNEL_NAME(dense_stream_2_2_4)
// KERNEL_NAME(dense_stream_4_1_4)
// KERNEL_NAME(dense_stream_4_2_3)
// KERNEL_NAME(dense_stream_8_2_3)
// KERNEL_NAME(dense_panel_2_1_4)
// KERNEL_NAME(dense_panel_4_1_4)
// KERNEL_NAME(dense_panel_4_2_3)
// KERNEL_NAME(dense_panel_8_1_4)
// KERNEL_NAME(dense_panel_8_2_3)
// KERNEL_NAME(dense_panel_16_1_3)
// KERNEL_NAME(dense_panel_16_2_3)
// KERNEL_NAME(dense_panel_16_2_2)
#include "product.cuh"

// [rows, stride] with zeros from `cols` up to `stride`, the next multiple of 8: a lane's eight weights are one aligned vector.
struct Dense {
    static constexpr u32 VECTORS = 4;
    static constexpr bool ESCAPES = false;
    const u16* words;
    u64 rows;
    u32 stride, across;
    // Zero, which the compiler does not know: else it copies words for each `mma` anew, not once.
    u32 zero;
    const u32* escapes;

    // The lane's words of row g in the next tile, and how many columns of rows g and g + 8 come from there on: rows that are not
    // there have none.
    struct Strip {
        const u16* low;
        i32 low_left, high_left;
    };

    DEVICE_METHOD Strip strip(u32 number, u32 tile, u32 lane) const {
        u64 row = (u64)number * TILE_ROWS + lane / 4;
        u32 k = tile * TILE_K + lane % 4 * 8;
        i32 left = (i32)(stride - k);
        return {words + row * stride + k, row < rows ? left : 0, row + 8 < rows ? left : 0};
    }
    // Vector i: half i / 2 of row g + 8 (i % 2).
    DEVICE_METHOD void copy(uint4* to, const Strip& strip, u32 i) const {
        bool valid = (i % 2 ? strip.high_left : strip.low_left) > (i32)(i / 2 * 32);
        cp_async16_or_zeros(to, strip.low + (i % 2 ? 8 * (u64)stride : 0) + i / 2 * 32, valid);
    }
    DEVICE_METHOD static void advance(Strip& strip) {
        strip.low += TILE_K;
        strip.low_left -= (i32)TILE_K, strip.high_left -= (i32)TILE_K;
    }
    DEVICE_METHOD Fragment decode(const uint4 (&raw)[4], const Strip&) const {
        Fragment f;
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 half = i / 2, row = i % 2;
            f.words[half][0][row] = raw[i].x | zero;
            f.words[half][0][2 + row] = raw[i].y | zero;
            f.words[half][1][row] = raw[i].z | zero;
            f.words[half][1][2 + row] = raw[i].w | zero;
        }
        return f;
    }
    DEVICE_METHOD const u32* offsets(u32) const { return nullptr; }
};

#define STREAM(columns, strips, stages)                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS) dense_stream_##columns##_##strips##_##stages(          \
        const u16* words,                                                                                        \
        u64 rows, u64 cols, const u16* x, u32 stride, u32 tokens, float* y, u64 y_stride,                        \
        const float* bias, u32 adds, u32 log_slices) {                                                               \
        Operands operands = {x, stride, tokens, y, y_stride, bias, adds, log_slices};                                \
        Dense weights = {words, rows, (u32)((cols + 7) / 8 * 8), (u32)((cols + 63) / 64), log_slices >> 8, nullptr}; \
        stream_product<columns, strips, stages>(weights, rows, operands);                                        \
    }
STREAM_VARIANTS(STREAM)

#ifndef LLMPRESS_STEP
#define PANEL(columns, strips, stages)                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                        \
        dense_panel_##columns##_##strips##_##stages(                                                             \
        const u16* words,                                                                                        \
        u64 rows, u64 cols, const u16* x, u32 stride, u32 tokens, float* y, u64 y_stride,                        \
        const float* bias, u32 adds, u32 log_slices, float4* sums, u32* done) {                                      \
        Operands operands = {x, stride, tokens, y, y_stride, bias, adds, log_slices};                                \
        Dense weights = {words, rows, (u32)((cols + 7) / 8 * 8), (u32)((cols + 63) / 64), log_slices >> 8, nullptr}; \
        panel_product<columns, strips, stages>(weights, rows, operands, {sums, done});                           \
    }
PANEL_VARIANTS(PANEL)
#endif

// Products with fixed12 weights, decoded in registers; and decoding to plain BF16.
//
// KERNEL_NAME(fixed12_stream_1_1_4)
// KERNEL_NAME(fixed12_stream_1_1_8)
// KERNEL_NAME(fixed12_stream_1_2_4)
// KERNEL_NAME(fixed12_stream_2_1_4)
// KERNEL_NAME(fixed12_stream_2_1_8)
// KERNEL_NAME(fixed12_stream_2_2_4)
// KERNEL_NAME(fixed12_stream_4_1_4)
// KERNEL_NAME(fixed12_stream_4_2_3)
// KERNEL_NAME(fixed12_stream_8_2_3)
// KERNEL_NAME(fixed12_panel_2_1_4)
// KERNEL_NAME(fixed12_panel_4_1_4)
// KERNEL_NAME(fixed12_panel_4_2_3)
// KERNEL_NAME(fixed12_panel_8_1_4)
// KERNEL_NAME(fixed12_panel_8_2_3)
// KERNEL_NAME(fixed12_panel_16_1_3)
// KERNEL_NAME(fixed12_panel_16_2_3)
// KERNEL_NAME(fixed12_panel_16_2_2)
#include "fixed12.cuh"

#define STREAM(columns, strips, stages)                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS) fixed12_stream_##columns##_##strips##_##stages(  \
        const u8* sign_mantissa, const u8* codes, const u32* escape_offsets, const u32* escapes, const u32* bases, \
        u64 rows, u64 cols, const u16* x, u32 stride, u32 tokens, float* y, u64 y_stride,                  \
        const float* bias, u32 adds, u32 log_slices) {                                                         \
        Operands operands = {x, stride, tokens, y, y_stride, bias, adds, log_slices};                          \
        Fixed12 weights = {sign_mantissa, codes, escape_offsets, escapes, bases,          \
                           (u32)((cols + 63) / 64)};                                                       \
        stream_product<columns, strips, stages>(weights, rows, operands);                                  \
    }
STREAM_VARIANTS(STREAM)

#ifndef LLMPRESS_STEP
#define PANEL(columns, strips, stages)                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                  \
        fixed12_panel_##columns##_##strips##_##stages(                                                     \
        const u8* sign_mantissa, const u8* codes, const u32* escape_offsets, const u32* escapes, const u32* bases, \
        u64 rows, u64 cols, const u16* x, u32 stride, u32 tokens, float* y, u64 y_stride,                  \
        const float* bias, u32 adds, u32 log_slices, float4* sums, u32* done) {                                \
        Operands operands = {x, stride, tokens, y, y_stride, bias, adds, log_slices};                          \
        Fixed12 weights = {sign_mantissa, codes, escape_offsets, escapes, bases,          \
                           (u32)((cols + 63) / 64)};                                                       \
        panel_product<columns, strips, stages>(weights, rows, operands, {sums, done});                     \
    }
PANEL_VARIANTS(PANEL)

// out: BF16 [rows, stride], row-major, with zeros from `cols` up to `stride`, which is at most the next multiple of 8. A warp takes
// a tile.
extern "C" __global__ void __launch_bounds__(THREADS)
decode_fixed12(const u8* sign_mantissa, const u8* codes, const u32* escape_offsets, const u32* escapes, const u32* bases, u64 rows,
               u64 cols, u16* out, u64 stride) {
    Shared shared;
    uint4* areas = shared.take<uint4>(WARPS * PATCH_VECTORS);
    u32 across = (u32)((cols + 63) / 64), lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u64 number = (u64)blockIdx.x * WARPS + warp, strip = number / across;
    if (strip * TILE_ROWS >= rows) return;
    u32 tile = (u32)(number % across);
    Fixed12 weights = {sign_mantissa, codes, escape_offsets, escapes, bases, across};
    Fixed12::Strip from = weights.strip((u32)strip, tile, lane);
    uint4 raw[3];
#pragma unroll
    for (u32 i = 0; i < 3; i++) raw[i] = load_once(Fixed12::vector(from, i));
    const u32* offsets = weights.offsets((u32)strip) + tile;
    u32 first = load_once(offsets), end = load_once(offsets + 1);
    Fragment pieces[1];
    Fixed12::decode(pieces, raw, from);
    Fragment& f = pieces[0];
    if (first < end) {
        patch(f, areas + warp * PATCH_VECTORS, lane, [&](u16* words, u32 half) {
            for (u32 i = first + lane; i < end; i += WARP) put_escape(words, half, load_once(escapes + i));
        });
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        u64 row = strip * TILE_ROWS + i % 2 * 8 + lane / 4;
        u64 k = (u64)tile * TILE_K + i / 2 * 32 + lane % 4 * 8;
        if (row >= rows || k >= cols) continue;
        // Half i / 2 of row i % 2.
        const u32(&a)[4] = f.words[i / 2][0];
        const u32(&b)[4] = f.words[i / 2][1];
        u32 words[4] = {a[i % 2], a[2 + i % 2], b[i % 2], b[2 + i % 2]};
        if (stride % 8 == 0 && k + 8 <= cols) {
            *(uint4*)(out + row * stride + k) = vector_of(words);
            continue;
        }
#pragma unroll
        for (u32 j = 0; j < 8; j++) {
            u16 word = (u16)(words[j / 2] >> j % 2 * 16);
            if (k + j < stride) out[row * stride + k + j] = k + j < cols ? word : (u16)0;
        }
    }
}
#endif

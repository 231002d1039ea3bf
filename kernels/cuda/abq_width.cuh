// The kernels of one width of weights, WIDTH bits a code: a source a width, so that a GPU compiles only those that a model has.
#pragma once
#include "abq.cuh"
#include "abq_integer.cuh"

// abq<width>_<name>
#define JOINED(width, name) abq##width##_##name
#define NAMED(width, name) JOINED(width, name)
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)

// ---- activations in BF16 -----------------------------------------------------------------------------------------

// Tiles that are asked for together, less one: about as many bytes for every width.
template <u32 strips>
constexpr u32 STREAM_STAGES = WIDTH * strips <= 4 ? 8 : 4;

#define STREAM(columns, strips)                                                                                 \
    KERNEL NAMED(WIDTH, stream_##columns##_##strips)(                                                           \
        const u8* codes, u32 centre, const float* scale, const float* offset, u32 groups, u32 length, u64 rows, \
        u64 cols, const u16* x, u32 stride, u32 tokens, float* y, u64 y_stride, const float* bias, u32 adds,    \
        u32 log_slices) {                                                                                       \
        Operands operands = {x, stride, tokens, y, y_stride, bias, adds, log_slices};                           \
        Packed<WIDTH> weights = {codes, (u32)((cols + 63) / 64), centre};                                       \
        stream_groups<columns, strips, STREAM_STAGES<strips>>(weights, {scale, offset, groups, length}, rows,   \
                                                              operands);                                        \
    }
STREAM(1, 1) STREAM(1, 2) STREAM(2, 2)

#ifndef LLMPRESS_STEP
#define PANEL(columns, strips)                                                                                  \
    KERNEL NAMED(WIDTH, panel_##columns##_##strips)(                                                            \
        const u8* codes, u32 centre, const float* scale, const float* offset, u32 groups, u32 length, u64 rows, \
        u64 cols, const u16* x, u32 stride, u32 tokens, float* y, u64 y_stride, const float* bias, u32 adds,    \
        u32 log_slices, const float* of_x, float4* sums, u32* done) {                                           \
        Operands operands = {x, stride, tokens, y, y_stride, bias, adds, log_slices};                           \
        Packed<WIDTH> weights = {codes, (u32)((cols + 63) / 64), centre};                                       \
        panel_groups<columns, strips, 4>(weights, {scale, offset, groups, length}, rows, operands, of_x,        \
                                         {sums, done});                                                         \
    }
PANEL(4, 1) PANEL(8, 1)

KERNEL NAMED(WIDTH, decode)(const u8* codes, u32 centre, u64 rows, u64 cols, u16* out, u64 stride) {
    Packed<WIDTH> weights = {codes, (u32)((cols + 63) / 64), centre};
    decode(weights, rows, cols, out, stride);
}
#endif

// ---- activations of 1 to 8 bits ----------------------------------------------------------------------------------

#define INTEGERS(name, by_bits, Engine)                                                                       \
    KERNEL NAMED(WIDTH, name)(                                                                                \
        const u8* codes, const float* scale, const float* offset, const u8* zeros, const i32* sums, u32 centre, \
        u32 groups, u32 length, u64 rows, u64 cols, const u8* x, const float* steps, const i32* x_zeros,      \
        const i32* x_sums, u32 slot, u32 chunk, u32 tokens, float* y, u64 y_stride, const float* bias, u32 adds, \
        u32 log_slices) {                                                                                     \
        Operands operands = {nullptr, 0, tokens, y, y_stride, bias, adds, log_slices};                        \
        Grids grids = {scale, offset, zeros, sums, centre, groups, length};                                   \
        multiply_integers<WIDTH, STAGES<WIDTH>, by_bits, Engine>(                                             \
            codes, rows, (u32)((cols + 127) / 128), grids, {x, steps, x_zeros, x_sums}, slot, chunk, operands); \
    }
using Bits1 = ByBits<WIDTH, 1>;
using Bits2 = ByBits<WIDTH, 2>;
using Bytes1 = ByBytes<WIDTH, 1>;
using Bytes2 = ByBytes<WIDTH, 2>;
INTEGERS(bits_1, true, Bits1) INTEGERS(bits_2, true, Bits2) INTEGERS(bytes_1, false, Bytes1) INTEGERS(bytes_2, false, Bytes2)
#ifndef LLMPRESS_STEP
using Bytes8 = ByBytes<WIDTH, 8>;
INTEGERS(bytes_8, false, Bytes8)
#endif

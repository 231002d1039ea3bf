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
#include "product.cuh"

// Two weights of a tile in six operations. `bytes` holds sign and mantissa of the eight weights of a row, `codes` their
// nibbles, pair j at bits 4 j and 16 + 4 j; `base` is the base at bits 7 and 23. Byte, code and base add up to mantissa and
// exponent, since the exponent is base + sign + code and the sign stands where the exponent begins.
template <u32 pair>
DEVICE u32 two_weights(uint2 bytes, u32 codes, u32 base) {
    u32 word = pair < 2 ? bytes.x : bytes.y;
    // Selector 4 picks a byte of the second operand: a zero.
    u32 low = __byte_perm(word, 0, pair % 2 == 0 ? 0x4140 : 0x4342);
    u32 signs = __byte_perm(word, 0, pair % 2 == 0 ? 0x1404 : 0x3424);
    u32 code = pair == 0 ? codes << 7 : pair == 1 ? codes << 3 : pair == 2 ? codes >> 1 : codes >> 5;
    u32 sum = low + (code & 0x07800780u) + base;
    return lop3<0xf8>(sum, signs, 0x80008000u);  // sum | signs & 0x80008000
}

// The words of row g + 8 `row` in half `half`.
template <u32 half, u32 row>
DEVICE void one_row(Fragment& f, u32 first, u32 second, u32 codes, u32 base) {
    uint2 bytes = make_uint2(first, second);
    f.words[half][0][row] = two_weights<0>(bytes, codes, base);
    f.words[half][0][2 + row] = two_weights<1>(bytes, codes, base);
    f.words[half][1][row] = two_weights<2>(bytes, codes, base);
    f.words[half][1][2 + row] = two_weights<3>(bytes, codes, base);
}

// Tiles as the format lays them (docs/format.md, section 4.4). `escapes`: of each its place among the lanes' fragments (lane L
// has words[h][p] at weights ((2 h + p) 32 + L) 8 + 0..7), and from bit 23 its exponent; in a tile they ascend by place.
struct Fixed12 {
    static constexpr u32 VECTORS = 3;
    static constexpr u32 PIECES = 1;
    static constexpr bool ESCAPES = true;
    const u8* sign_mantissa;
    const u8* codes;
    const u32* escape_offsets;
    const u32* escapes;
    // Of each strip, at bits 7 and 23: several matrices may lie one below the other.
    const u32* bases;
    u32 across;

    // The lane's vectors of the halves, 32 apart, and its codes.
    struct Strip {
        const uint4* halves;
        const uint4* codes;
        u32 base;
    };

    // The launcher sees to it that tiles count to less than 2^32.
    DEVICE_METHOD Strip strip(u32 number, u32 tile, u32 lane) const {
        u64 at = number * across + tile;
        return {(const uint4*)sign_mantissa + at * 64 + lane, (const uint4*)codes + at * 32 + lane,
                bases[number]};
    }
    // Vectors 0 and 1: bytes of the halves, row g before g + 8; vector 2: codes.
    DEVICE_METHOD static const uint4* vector(const Strip& strip, u32 i) {
        return i < 2 ? strip.halves + i * 32 : strip.codes;
    }
    DEVICE_METHOD void copy(uint4* to, const Strip& strip, u32 i) const { cp_async16(to, vector(strip, i)); }
    DEVICE_METHOD static void advance(Strip& strip) { strip.halves += 64, strip.codes += 32; }
    DEVICE_METHOD static void decode(Fragment (&to)[1], const uint4 (&raw)[3], const Strip& strip) {
        Fragment& f = to[0];
        u32 base = strip.base;
        one_row<0, 0>(f, raw[0].x, raw[0].y, raw[2].x, base);
        one_row<0, 1>(f, raw[0].z, raw[0].w, raw[2].y, base);
        one_row<1, 0>(f, raw[1].x, raw[1].y, raw[2].z, base);
        one_row<1, 1>(f, raw[1].z, raw[1].w, raw[2].w, base);
    }
    DEVICE_METHOD const u32* offsets(u32 number) const { return escape_offsets + number * across; }
};

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

// Products with fixed12 weights, decoded in registers; and decoding to plain BF16.
//
// KERNEL_NAME(fixed12_1_1)
// KERNEL_NAME(fixed12_1_2)
// KERNEL_NAME(fixed12_1_4)
// KERNEL_NAME(fixed12_2_1)
// KERNEL_NAME(fixed12_2_2)
// KERNEL_NAME(fixed12_4_1)
// KERNEL_NAME(fixed12_4_2)
// KERNEL_NAME(fixed12_8_1)
#include "product.cuh"

// Two weights of a tile in six operations. `bytes` holds sign and mantissa of the eight weights of a row, `codes` their
// nibbles, pair j at bits 4 j and 16 + 4 j; `base` is the base at bits 7 and 23. Byte, code and base add up to mantissa and
// exponent, since the exponent is base + sign + code and the sign stands where the exponent begins.
template <int pair>
DEVICE u32 two_weights(uint2 bytes, u32 codes, u32 base) {
    u32 word = pair < 2 ? bytes.x : bytes.y;
    // The byte before a register's first is zero: selectors 4.. pick from the second operand.
    u32 low = __byte_perm(word, 0, pair % 2 == 0 ? 0x4140 : 0x4342);
    u32 signs = __byte_perm(word, 0, pair % 2 == 0 ? 0x1404 : 0x3424);
    u32 code = pair == 0 ? codes << 7 : pair == 1 ? codes << 3 : pair == 2 ? codes >> 1 : codes >> 5;
    u32 sum = low + (code & 0x07800780u) + base;
    return lop3<0xf8>(sum, signs, 0x80008000u);  // sum | signs & 0x80008000
}

DEVICE void one_row(u32 (&words)[4], uint2 bytes, u32 codes, u32 base) {
    words[0] = two_weights<0>(bytes, codes, base);
    words[1] = two_weights<1>(bytes, codes, base);
    words[2] = two_weights<2>(bytes, codes, base);
    words[3] = two_weights<3>(bytes, codes, base);
}

// Puts an exponent into one of a lane's words; written so that the words stay in registers.
DEVICE void patch(Fragment& f, u32 place, u32 exponent) {
    u32 shift = place % 2 * 16 + 7, mask = 0xffu << shift, bits = exponent << shift;
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            if (place / 2 == half * 8 + j) f.low[half][j] = (f.low[half][j] & ~mask) | bits;
            if (place / 2 == half * 8 + 4 + j) f.high[half][j] = (f.high[half][j] & ~mask) | bits;
        }
    }
}

struct Fixed12 {
    const u8* sign_mantissa;
    const u8* codes;
    const u32* escape_offsets;
    const u16* escape_positions;
    const u8* escape_exponents;
    // At bits 7 and 23.
    u32 base;
    u64 across;

    DEVICE_METHOD Fragment load(u64 strip, u64 column, u32 lane) const {
        u64 tile = strip * across + column;
        uint4 first = load_once((const uint4*)(sign_mantissa + tile * 1024) + lane);
        uint4 second = load_once((const uint4*)(sign_mantissa + tile * 1024 + 512) + lane);
        uint4 nibbles = load_once((const uint4*)(codes + tile * 512) + lane);
        u32 escape = escape_offsets[tile], end = escape_offsets[tile + 1];
        Fragment f;
        one_row(f.low[0], make_uint2(first.x, first.y), nibbles.x, base);
        one_row(f.high[0], make_uint2(first.z, first.w), nibbles.y, base);
        one_row(f.low[1], make_uint2(second.x, second.y), nibbles.z, base);
        one_row(f.high[1], make_uint2(second.z, second.w), nibbles.w, base);
        for (; escape < end; escape++) {
            u32 position = escape_positions[escape], row = position / 64, k = position % 64;
            if (lane != row % 8 * 4 + k % 32 / 8) continue;
            patch(f, k / 32 * 16 + row / 8 * 8 + k % 8, escape_exponents[escape]);
        }
        return f;
    }
};

#define KERNEL(columns, strips)                                                                                    \
    extern "C" __global__ void __launch_bounds__(256 * strips) fixed12_##columns##_##strips(                       \
        const u8* sign_mantissa, const u8* codes, const u32* escape_offsets, const u16* escape_positions,          \
        const u8* escape_exponents, u32 base, u64 rows, u64 cols, const u16* x, u32 stride, u32 tokens, float* y,  \
        u64 y_stride, const float* bias, u32 adds) {                                                               \
        u64 across = (cols + 63) / 64;                                                                             \
        Fixed12 weights = {sign_mantissa,    codes, escape_offsets, escape_positions, escape_exponents,            \
                           base << 7 | base << 23, across};                                                        \
        product<columns, strips>(weights, rows, across, {x, stride, tokens, y, y_stride, bias, adds});             \
    }
SHAPES(KERNEL)

// out: BF16 [rows, cols], row-major. A warp takes a tile; cols is a multiple of 8.
extern "C" __global__ void __launch_bounds__(256)
decode_fixed12(const u8* sign_mantissa, const u8* codes, const u32* escape_offsets, const u16* escape_positions,
               const u8* escape_exponents, u32 base, u64 rows, u64 cols, u16* out) {
    u64 across = (cols + 63) / 64, tiles = (rows + 15) / 16 * across;
    u64 tile = (u64)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (tile >= tiles) return;
    Fixed12 weights = {sign_mantissa,    codes, escape_offsets, escape_positions, escape_exponents,
                       base << 7 | base << 23, across};
    u32 lane = threadIdx.x % WARP;
    Fragment f = weights.load(tile / across, tile % across, lane);
    u64 row = tile / across * 16 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u64 k = tile % across * 64 + 32 * half + 8 * (lane % 4);
        if (k >= cols) continue;
        const u32(&low)[4] = f.low[half];
        const u32(&high)[4] = f.high[half];
        if (row < rows) *(uint4*)(out + row * cols + k) = make_uint4(low[0], low[1], low[2], low[3]);
        if (row + 8 < rows) *(uint4*)(out + (row + 8) * cols + k) = make_uint4(high[0], high[1], high[2], high[3]);
    }
}

// Weights in fixed12, as products read them.
#pragma once
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
    static constexpr bool SPARSE = false;
    using Piece = Fragment;
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

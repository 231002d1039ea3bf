// Plain weights of any element, as products read them.
#pragma once
#include "product.cuh"

// ---- elements ----------------------------------------------------------------------------------------------------
//
// An element is cut into pieces that BF16 holds, the largest first: each has the next eight bits of the mantissa. They add up
// to the element exactly, but for what lies below 2^-133, the least that BF16 holds; infinities and NaNs are one piece.

// The first piece, 16 bits up; what lies below it is not looked at.
DEVICE u32 leading_piece(float x) {
    u32 bits = __float_as_uint(x);
    // A NaN may have its bits below.
    return (bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : bits;
}
// What the first piece leaves: exactly.
DEVICE float other_pieces(float x) {
    u32 bits = __float_as_uint(x);
    bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    return finite ? __fsub_rn(x, __uint_as_float(bits & 0xffff0000u)) : 0.0f;
}
// The pieces of two neighbours, a word each.
template <u32 pieces>
DEVICE void cut(u32 (&to)[pieces], float low, float high) {
#pragma unroll
    for (u32 i = 0; i < pieces; i++) {
        to[i] = __byte_perm(leading_piece(low), leading_piece(high), 0x7632);
        low = other_pieces(low), high = other_pieces(high);
    }
}

struct Half {
    using Word = u16;
    static constexpr u32 PIECES = 2;
    // Word i of eight elements.
    DEVICE_METHOD static void pair(u32 (&to)[2], const uint4 (&vectors)[1], u32 i) {
        u32 words[4] = {vectors[0].x, vectors[0].y, vectors[0].z, vectors[0].w};
        cut(to, half_to_float((u16)words[i]), half_to_float((u16)(words[i] >> 16)));
    }
};

struct Single {
    using Word = u32;
    static constexpr u32 PIECES = 3;
    DEVICE_METHOD static void pair(u32 (&to)[3], const uint4 (&vectors)[2], u32 i) {
        uint4 v = vectors[i / 2];
        cut(to, __uint_as_float(i % 2 ? v.z : v.x), __uint_as_float(i % 2 ? v.w : v.y));
    }
};

struct Brain {
    using Word = u16;
    static constexpr u32 PIECES = 1;
    DEVICE_METHOD static void pair(u32 (&to)[1], const uint4 (&vectors)[1], u32 i) {
        u32 words[4] = {vectors[0].x, vectors[0].y, vectors[0].z, vectors[0].w};
        to[0] = words[i];
    }
};

// [rows, stride] with zeros from `cols` up to `stride`, the next multiple of 8: a lane's eight weights are one aligned vector, or two.
template <typename Element>
struct Dense {
    using Word = typename Element::Word;
    static constexpr u32 PIECES = Element::PIECES;
    // Of eight weights.
    static constexpr u32 EIGHT = sizeof(Word) / 2;
    static constexpr u32 VECTORS = 4 * EIGHT;
    static constexpr bool ESCAPES = false;
    static constexpr bool SPARSE = false;
    using Piece = Fragment;
    const Word* words;
    u64 rows;
    u32 stride, across;
    // Zero, which the compiler does not know: else it copies words for each `mma` anew, not once.
    u32 zero;
    const u32* escapes;

    // The lane's words of row g in the next tile, and how many columns of rows g and g + 8 come from there on: rows that are not
    // there have none.
    struct Strip {
        const Word* low;
        i32 low_left, high_left;
    };

    DEVICE_METHOD Strip strip(u32 number, u32 tile, u32 lane) const {
        u64 row = (u64)number * TILE_ROWS + lane / 4;
        u32 k = tile * TILE_K + lane % 4 * 8;
        i32 left = (i32)(stride - k);
        return {words + row * stride + k, row < rows ? left : 0, row + 8 < rows ? left : 0};
    }
    // Vector i: part i % EIGHT of half i / (2 EIGHT) of row g + 8 (i / EIGHT % 2).
    DEVICE_METHOD void copy(uint4* to, const Strip& strip, u32 i) const {
        u32 half = i / (2 * EIGHT), row = i / EIGHT % 2, part = i % EIGHT * 8 / EIGHT;
        bool valid = (row ? strip.high_left : strip.low_left) > (i32)(half * 32);
        cp_async16_or_zeros(to, strip.low + (row ? 8 * (u64)stride : 0) + half * 32 + part, valid);
    }
    DEVICE_METHOD static void advance(Strip& strip) {
        strip.low += TILE_K;
        strip.low_left -= (i32)TILE_K, strip.high_left -= (i32)TILE_K;
    }
    DEVICE_METHOD void decode(Fragment (&f)[PIECES], const uint4 (&raw)[VECTORS], const Strip&) const {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 half = i / 2, row = i % 2;
            uint4 eight[EIGHT];
#pragma unroll
            for (u32 j = 0; j < EIGHT; j++) eight[j] = raw[i * EIGHT + j];
#pragma unroll
            for (u32 pair = 0; pair < 4; pair++) {
                u32 words[PIECES];
                Element::pair(words, eight, pair);
#pragma unroll
                for (u32 piece = 0; piece < PIECES; piece++) {
                    f[piece].words[half][pair / 2][pair % 2 * 2 + row] = words[piece] | zero;
                }
            }
        }
    }
    DEVICE_METHOD const u32* offsets(u32) const { return nullptr; }
};

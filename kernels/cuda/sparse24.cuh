// Weights of which each four consecutive ones of a row keep two, as products read them.
#pragma once
#include "product.cuh"

// Kept values [rows, columns / 2, padded to a multiple of 64] in a form of their own, plain or fixed12, whose tiles of 16 x 64 hold 128
// columns: in such a stretch the values are put in the order in which lanes take them, so that the words that a lane decodes are what
// `mma` takes (kernels/src/gpu/sparse24.rs says how). Beside each tile the lanes' words of which are kept: [tiles, 32], word h of lane
// 4 g + q what mma_sparse_bf16 takes for `mma` number 2 h + q / 2, its k 16 (q % 2) + 0..15.
//
// Few tokens take the same `mma` as many. A product with few of them waits for memory: nine bits a weight, seven in fixed12, whatever
// multiplies, of which a tensor core takes what a lane loaded as it is, while spreading values over their columns for anything else is about
// two more instructions a weight. And so a token's product has the same bits however many are read with it.
template <typename Values>
struct Sparse24 {
    static constexpr u32 VECTORS = Values::VECTORS + 1;
    static constexpr u32 PIECES = 1;
    static constexpr bool ESCAPES = Values::ESCAPES;
    static constexpr bool SPARSE = true;
    using Piece = SparseFragment;
    Values values;
    const uint2* kept;
    u32 across;
    const u32* escapes;

    DEVICE_METHOD Sparse24(const Values& of, const uint2* words) : values(of), kept(words), across(of.across), escapes(of.escapes) {}

    struct Strip {
        typename Values::Strip values;
        const uint2* kept;
    };

    // The launcher sees to it that tiles count to less than 2^32.
    DEVICE_METHOD Strip strip(u32 number, u32 tile, u32 lane) const {
        return {values.strip(number, tile, lane), kept + ((u64)number * across + tile) * WARP + lane};
    }
    DEVICE_METHOD void copy(uint4* to, const Strip& strip, u32 i) const {
        if (i < Values::VECTORS) {
            values.copy(to, strip.values, i);
        } else {
            cp_async8(to, strip.kept);
        }
    }
    DEVICE_METHOD static void advance(Strip& strip) {
        Values::advance(strip.values);
        strip.kept += WARP;
    }
    DEVICE_METHOD void decode(SparseFragment (&to)[1], const uint4 (&raw)[VECTORS], const Strip& strip) const {
        uint4 of_values[Values::VECTORS];
#pragma unroll
        for (u32 i = 0; i < Values::VECTORS; i++) of_values[i] = raw[i];
        Fragment f[1];
        values.decode(f, of_values, strip.values);
        static_cast<Fragment&>(to[0]) = f[0];
        to[0].kept[0] = raw[Values::VECTORS].x, to[0].kept[1] = raw[Values::VECTORS].y;
    }
    DEVICE_METHOD const u32* offsets(u32 number) const { return values.offsets(number); }
};

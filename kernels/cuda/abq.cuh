// Products of BF16 activations with weights of 1 to 8 bits (encoding `abq`), the weights multiplied as the small integers they are.
//
//   y[token][n] = sum over groups j of  scale[n][j] sum_k (code[n][k] - centre) x[token][k]  +  offset[n][j] sum_k x[token][k]
//
// A code less its centre is an integer of -128 .. 128, which BF16 holds exactly: nothing of a weight is rounded. The launcher makes
// `offset` from what is stored, so that it belongs to the centre; where all of it is zero there is none.
//
// The order of additions, the same for every variant: tiles, slices and the order of k in a tile are those of product.cuh. The part of a
// group that lies in a slice is added up by itself, in F32 from zero; so is x over the same part, by `mma` with ones. Where a part
// ends, its sum is brought to the slice's by a fused multiply-add with the scale, then that of x by another with the offset. The
// slices are added one after the other, then the bias, then what y held.
#pragma once
#include "product.cuh"

// Two BF16 numbers of one.
constexpr u32 ONES = 0x3f803f80u;
// A half of a tile, in which no group begins or ends.
constexpr u32 HALF_K = 32;

// ---- codes -------------------------------------------------------------------------------------------------------

// The 16 pairs of codes that a lane holds of a tile, in `bits` words: pair 8 h + 4 p + 2 j + r has the codes of row g + 8 r and
// k = 32 h + 8 q + 4 p + 2 j, + 1, the second one 16 bits above the first. A half word holds 16 / bits codes, the first in its lowest
// bits; the pairs for which there is no room lie in the bits that are left over, word by word, from the lowest on.
template <u32 bits, u32 pair>
DEVICE u32 two_codes(const u32 (&words)[bits]) {
    constexpr u32 whole = 16 / bits, rest = 16 % bits;
    if constexpr (pair < whole * bits) {
        return words[pair / whole] >> pair % whole * bits & ((1u << bits) - 1) * 0x10001u;
    } else {
        u32 codes = 0;
#pragma unroll
        for (u32 bit = 0; bit < bits; bit++) {
            u32 at = (pair - whole * bits) * bits + bit, from = whole * bits + at % rest;
            // Neighbouring bits of a word move together.
            if (bit > 0 && at % rest > 0) continue;
            u32 count = min(rest - at % rest, bits - bit), mask = ((1u << count) - 1) << bit;
            u32 word = words[at / rest];
            codes |= (from > bit ? word >> (from - bit) : word << (bit - from)) & mask * 0x10001u;
        }
        return codes;
    }
}

// The integers that two codes stand for, in BF16. `centre`: -128 less the centre, twice. 128 + a code of 7 bits is a BF16 whose
// mantissa is the code.
template <u32 bits>
DEVICE u32 two_integers(u32 codes, u32 centre) {
    if constexpr (bits < 8) {
        return add_exactly_bf16x2(codes | 0x43004300u, centre);
    } else {
        // The highest bit is worth 128: -128 where it is there, else -256.
        return add_exactly_bf16x2((codes & 0x007f007fu) | 0x43004300u, (~codes & 0x00800080u) | 0xc300c300u);
    }
}

// A lane's codes of a tile as products read them.
template <u32 bits, u32 pair = 0>
DEVICE void integers_of(Fragment& f, const u32 (&words)[bits], u32 centre) {
    f.words[pair / 8][pair / 4 % 2][pair % 4] = two_integers<bits>(two_codes<bits, pair>(words), centre);
    if constexpr (pair < 15) integers_of<bits, pair + 1>(f, words, centre);
}

// Tiles of 128 `bits` bytes: 16-byte pieces of all lanes, then one of 8, then one of 4.
template <u32 bits>
struct Packed {
    static constexpr u32 TILE_BYTES = 128 * bits;
    static constexpr i32 VECTORS = bits / 4, LONG = bits % 4 / 2, SHORT = bits % 2;
    const u8* codes;
    u32 across, centre;

    struct Strip {
        const u8* tile;
    };

    DEVICE_METHOD Strip strip(u32 number, u32 tile, u32) const {
        return {codes + ((u64)number * across + tile) * TILE_BYTES};
    }
    DEVICE_METHOD static void advance(Strip& strip) { strip.tile += TILE_BYTES; }
    // Starts to copy what the lane reads itself.
    DEVICE_METHOD static void copy(u8* to, const Strip& strip, u32 lane) {
#pragma unroll
        for (i32 i = 0; i < VECTORS; i++) cp_async16(to + (i * WARP + lane) * 16, strip.tile + (i * WARP + lane) * 16);
        u32 at = VECTORS * 512 + lane * 8;
        if (LONG) cp_async8(to + at, strip.tile + at);
        at = VECTORS * 512 + LONG * 256 + lane * 4;
        if (SHORT) cp_async4(to + at, strip.tile + at);
    }
    DEVICE_METHOD void decode(Fragment& f, const u8* from, u32 lane) const {
        u32 words[bits];
#pragma unroll
        for (i32 i = 0; i < VECTORS; i++) {
            uint4 v = *(const uint4*)(from + (i * WARP + lane) * 16);
            words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
        }
        if constexpr (LONG != 0) {
            uint2 v = *(const uint2*)(from + VECTORS * 512 + lane * 8);
            words[4 * VECTORS] = v.x, words[4 * VECTORS + 1] = v.y;
        }
        if constexpr (SHORT != 0) words[bits - 1] = *(const u32*)(from + VECTORS * 512 + LONG * 256 + lane * 4);
        integers_of<bits>(f, words, centre);
    }
};

// The same integers as a plain matrix of BF16: [rows, stride], zeros from the columns up to the stride, a multiple of 8.
struct Plain {
    static constexpr u32 TILE_BYTES = 2048;
    const u16* words;
    u64 rows;
    u32 stride, across;

    // The lane's words of row g in the next tile, and how many columns of rows g and g + 8 come from there on.
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
    DEVICE_METHOD static void advance(Strip& strip) {
        strip.low += TILE_K;
        strip.low_left -= (i32)TILE_K, strip.high_left -= (i32)TILE_K;
    }
    // Vector i: half i / 2 of row g + 8 (i % 2).
    DEVICE_METHOD void copy(u8* to, const Strip& strip, u32 lane) const {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            bool valid = (i % 2 ? strip.high_left : strip.low_left) > (i32)(i / 2 * HALF_K);
            const u16* from = strip.low + (i % 2 ? 8 * (u64)stride : 0) + i / 2 * HALF_K;
            cp_async16_or_zeros(to + (i * WARP + lane) * 16, from, valid);
        }
    }
    DEVICE_METHOD void decode(Fragment& f, const u8* from, u32 lane) const {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            uint4 raw = *(const uint4*)(from + (i * WARP + lane) * 16);
            u32 half = i / 2, row = i % 2;
            f.words[half][0][row] = raw.x, f.words[half][0][2 + row] = raw.y;
            f.words[half][1][row] = raw.z, f.words[half][1][2 + row] = raw.w;
        }
    }
};

// ---- groups ------------------------------------------------------------------------------------------------------

// Scales and offsets, [strips of 16 rows][groups][16] each. `length`: halves of tiles of a group.
struct Groups {
    const float* scale;
    const float* offset;
    u32 count, length;
};

// Where a lane is among the groups, and what belongs to the group of its rows g and g + 8.
template <u32 strips>
struct Part {
    const float* scale[strips];
    // From a scale to the offset beside it; without offsets zero.
    i64 apart;
    float factors[strips][2], offsets[strips][2];
    u32 group, count, length;
    // Halves of the group that are to come.
    u32 left;

    // Strips number(s), from a half tile on.
    template <typename Number>
    DEVICE_METHOD void start(const Groups& groups, const Number& number, u32 half, u32 lane) {
        count = groups.count, length = groups.length;
        group = half / length, left = length - half % length;
        apart = groups.offset ? groups.offset - groups.scale : 0;
#pragma unroll
        for (u32 s = 0; s < strips; s++) {
            scale[s] = groups.scale + ((u64)number(s) * count + group) * TILE_ROWS + lane / 4;
        }
        load();
    }
    DEVICE_METHOD void load() {
        // A tile's second half may lie beyond the last group.
        if (group >= count) return;
#pragma unroll
        for (u32 s = 0; s < strips; s++) {
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                factors[s][i] = __uint_as_float(load_once((const u32*)scale[s] + 8 * i));
                if (apart) offsets[s][i] = __uint_as_float(load_once((const u32*)(scale[s] + apart) + 8 * i));
            }
        }
    }
    DEVICE_METHOD bool inside() const { return group < count; }
    DEVICE_METHOD bool has_offsets() const { return apart != 0; }
    // To the next group.
    DEVICE_METHOD void next() {
        group++, left = length;
#pragma unroll
        for (u32 s = 0; s < strips; s++) scale[s] += TILE_ROWS;
        load();
    }
    // Brings a strip's sums of a part to those of the slice: the tokens of a column.
    DEVICE_METHOD void bring(float (&total)[4], float (&sum)[4], u32 s, float x0, float x1) const {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            total[i] = __fmaf_rn(factors[s][i / 2], sum[i], total[i]);
            if (apart) total[i] = __fmaf_rn(offsets[s][i / 2], i % 2 ? x1 : x0, total[i]);
            sum[i] = 0.0f;
        }
    }
};

// ---- few tokens --------------------------------------------------------------------------------------------------

// As stream_product of product.cuh: a block's eight warps are `slices` slices of 8 / slices groups of `strips` strips, blockIdx.y
// counts 8 `columns` tokens, x comes from the caches.
template <u32 columns, u32 strips, u32 stages, typename Source>
DEVICE void stream_groups(const Source& source, const Groups& groups, u64 rows, const Operands& o) {
    let_later_begin();
    constexpr u32 elements = strips * columns * 4 * WARP;
    constexpr u32 stage_bytes = strips * Source::TILE_BYTES;
    // The sums of a warp take the place of its ring.
    constexpr u32 ring_bytes = stages * stage_bytes > 4 * elements ? stages * stage_bytes : 4 * elements;
    Shared shared;
    u8* rings = shared.take<u8>(WARPS * ring_bytes);
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, q = lane % 4;
    u32 slices = o.slices(), slice = warp & (slices - 1), block_groups = WARPS >> o.log_slices;
    u64 block_strip = (u64)blockIdx.x * block_groups * strips;
    u64 first_strip = block_strip + (warp >> o.log_slices) * strips, last_strip = (rows - 1) / TILE_ROWS;
    u32 first_token = blockIdx.y * columns * 8;
    u32 tile = o.tile_of(source.across, slice), end = o.tile_of(source.across, slice + 1);
    // Warps beyond the last strip have nothing to do; a strip beyond it is the last one again, of which nothing is written.
    if (first_strip > last_strip) end = tile;
    auto number = [&](u32 s) { return (u32)min(first_strip + s, last_strip); };

    typename Source::Strip strip[strips];
#pragma unroll
    for (u32 s = 0; s < strips; s++) strip[s] = source.strip(number(s), tile, lane);
    u8* ring = rings + warp * ring_bytes;
    auto ask = [&](u32 stage) {
#pragma unroll
        for (u32 s = 0; s < strips; s++) {
            source.copy(ring + stage + s * Source::TILE_BYTES, strip[s], lane);
            source.advance(strip[s]);
        }
    };
    u32 left = end - tile;
#pragma unroll
    for (u32 i = 0; i + 1 < stages; i++) {
        if (i < left) ask(i * stage_bytes);
        cp_async_commit();
    }
    Part<strips> part;
    if (left) part.start(groups, number, 2 * tile, lane);
    wait_for_earlier();
    float sums[strips][columns][4] = {}, totals[strips][columns][4] = {}, of_x[columns][4] = {};
    auto bring = [&]() {
#pragma unroll
        for (u32 c = 0; c < columns; c++) {
#pragma unroll
            for (u32 s = 0; s < strips; s++) part.bring(totals[s][c], sums[s][c], s, of_x[c][0], of_x[c][1]);
#pragma unroll
            for (u32 i = 0; i < 4; i++) of_x[c][i] = 0.0f;
        }
    };
    const u16* x[columns];
#pragma unroll
    for (u32 c = 0; c < columns; c++) {
        // Tokens beyond the last one repeat it: the same addresses cost nothing.
        u32 token = min(first_token + 8 * c + g, o.tokens - 1);
        x[c] = o.x + token * (u64)o.stride + 8 * q + tile * TILE_K;
    }
    const u32 ones[4] = {ONES, ONES, ONES, ONES};
    u32 stage = 0, free = (stages - 1) * stage_bytes;
    bool begun = false;
    for (; left; left--) {
        uint4 now[2][columns];
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
#pragma unroll
            for (u32 c = 0; c < columns; c++) now[half][c] = *(const uint4*)(x[c] + HALF_K * half);
        }
        cp_async_wait<(int)stages - 2>();
        // The stage of the tile before.
        if (left >= stages) ask(free);
        // Empty groups keep the count.
        cp_async_commit();
        Fragment w[strips];
#pragma unroll
        for (u32 s = 0; s < strips; s++) source.decode(w[s], ring + stage + s * Source::TILE_BYTES, lane);
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
#pragma unroll
            for (u32 p = 0; p < 2; p++) {
#pragma unroll
                for (u32 c = 0; c < columns; c++) {
                    u32 b0 = p ? now[half][c].z : now[half][c].x, b1 = p ? now[half][c].w : now[half][c].y;
#pragma unroll
                    for (u32 s = 0; s < strips; s++) mma_bf16(sums[s][c], w[s].words[half][p], b0, b1);
                    if (part.has_offsets()) mma_bf16(of_x[c], ones, b0, b1);
                }
            }
            begun = true;
            if (--part.left == 0) {
                if (part.inside()) bring();
                part.next();
                begun = false;
            }
        }
#pragma unroll
        for (u32 c = 0; c < columns; c++) x[c] += TILE_K;
        free = stage;
        stage = stage == (stages - 1) * stage_bytes ? 0 : stage + stage_bytes;
    }
    if (begun && part.inside()) bring();

    // Of the last copies none is under way: the ring is free.
    cp_async_wait<0>();
    __syncwarp();
    float* mine = (float*)ring + lane;
#pragma unroll
    for (u32 s = 0; s < strips; s++) {
#pragma unroll
        for (u32 c = 0; c < columns; c++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) mine[((s * columns + c) * 4 + i) * WARP] = totals[s][c][i];
        }
    }
    __syncthreads();
    for (u32 at = threadIdx.x; at < block_groups * elements; at += THREADS) {
        u32 group = at / elements, element = at % elements;
        const float* from = (const float*)(rings + (group << o.log_slices) * ring_bytes) + element;
        float sum = from[0];
        for (u32 s = 1; s < slices; s++) sum = __fadd_rn(sum, from[s * (ring_bytes / 4)]);
        // The element's place among the fragments.
        u32 i = element / WARP % 4, c = element / (4 * WARP) % columns, s = element / (4 * WARP * columns);
        u64 n = (block_strip + group * strips + s) * TILE_ROWS + i / 2 * 8 + element % WARP / 4;
        finish(o, rows, n, first_token + 8 * c + element % 4 * 2 + i % 2, sum);
    }
}

// ---- more tokens -------------------------------------------------------------------------------------------------

// As panel_product of product.cuh: a block makes 128 `strips` rows x 8 `columns` tokens of y, all slices in turn or, where gridDim.y
// counts them, one, which the last block of a tile to end adds up. A stage holds tiles of x, what x adds up to (of_x, see
// add_groups_of_x; nothing where there are no offsets) and the warps' weights.
template <u32 columns, u32 strips, u32 stages, typename Source>
DEVICE void panel_groups(const Source& source, const Groups& groups, u64 rows, const Operands& o, const float* of_x,
                         Partials partials) {
    constexpr u32 width = 8 * columns, x_bytes = width * TILE_K * 2, of_x_bytes = 2 * width * 4;
    constexpr u32 warp_bytes = strips * Source::TILE_BYTES, stage_bytes = x_bytes + of_x_bytes + WARPS * warp_bytes;
    constexpr u32 together = columns < 4 ? columns : 4;
    Shared shared;
    u8* ring = shared.take<u8>(stages * stage_bytes);
    u32* before = shared.take<u32>(1);
    u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP, g = lane / 4, q = lane % 4;
    // All slices, or one.
    u32 parts = gridDim.y, own_slices = parts > 1 ? 1 : o.slices();
    // What is added up so far, where shared memory is short in the buffer of sums.
    float* sofar = nullptr;
    if (own_slices > 1) {
        constexpr u32 elements = strips * columns * 4 * THREADS;
        sofar = partials.sums ? (float*)partials.sums + (u64)blockIdx.x * elements : shared.take<float>(elements);
        sofar += thread;
    }
    u32 row_blocks = (u32)((rows + TILE_ROWS * WARPS * strips - 1) / (TILE_ROWS * WARPS * strips));
    u32 token_blocks = (o.tokens + width - 1) / width;
    u32 first_token = 0, row_block = blockIdx.x;
    if (token_blocks > 1) {
        u32 group = blockIdx.x / (GROUPED * row_blocks), in_group = blockIdx.x % (GROUPED * row_blocks);
        u32 grouped = min(GROUPED, token_blocks - group * GROUPED);
        first_token = (group * GROUPED + in_group % grouped) * width;
        row_block = in_group / grouped;
    }
    u64 first_strip = ((u64)row_block * WARPS + warp) * strips, last_strip = (rows - 1) / TILE_ROWS;
    auto number = [&](u32 s) { return (u32)min(first_strip + s, last_strip); };
    u32 slice = blockIdx.y * own_slices, end_slice = slice + own_slices;
    u32 tile = o.tile_of(source.across, slice), end = o.tile_of(source.across, end_slice);

    typename Source::Strip strip[strips];
#pragma unroll
    for (u32 s = 0; s < strips; s++) strip[s] = source.strip(number(s), tile, lane);
    // A thread copies one vector of every 32 tokens. Rows of 128 bytes, halves swapped in odd ones, so that a warp's reads meet no
    // bank twice.
    u32 x_token = thread / 8, x_place = opaque((x_token * 8 + (thread % 8 ^ x_token % 2 * 4)) * 16);
    const u16* x_from = o.x + (first_token + x_token) * (u64)o.stride + thread % 8 * 8 + tile * TILE_K;
    u64 x_apart = 32 * (u64)o.stride;
    // Four tokens of a half.
    u32 of_x_token = thread % (width / 4) * 4, of_x_half = thread / (width / 4), of_x_stride = (o.tokens + 7) / 8 * 8;
    auto ask = [&](u32 stage, u32 asked) {
#pragma unroll
        for (u32 s = 0; s < strips; s++) {
            source.copy(ring + stage + x_bytes + of_x_bytes + warp * warp_bytes + s * Source::TILE_BYTES, strip[s], lane);
            source.advance(strip[s]);
        }
        const u16* from = x_from;
#pragma unroll
        for (u32 i = 0; i < (width + 31) / 32; i++) {
            if (x_token + 32 * i < width) {
                cp_async16_or_zeros(ring + stage + 4096 * i + x_place, from, first_token + x_token + 32 * i < o.tokens);
            }
            from += x_apart;
        }
        x_from += TILE_K;
        if (of_x && of_x_half < 2) {
            bool valid = first_token + of_x_token < o.tokens;
            const float* of = of_x + (2 * asked + of_x_half) * (u64)of_x_stride + first_token + of_x_token;
            cp_async16_or_zeros(ring + stage + x_bytes + (of_x_half * width + of_x_token) * 4, of, valid);
        }
    };
    u32 left = end - tile;
#pragma unroll
    for (u32 i = 0; i + 1 < stages; i++) {
        if (i < left) ask(i * stage_bytes, tile + i);
        cp_async_commit();
    }
    Part<strips> part;
    if (left) part.start(groups, number, 2 * tile, lane);
    float sums[strips][columns][4] = {}, totals[strips][columns][4] = {};
    u32 stage = 0, free = (stages - 1) * stage_bytes;
    auto bring = [&](u32 half) {
        const float* x = (const float*)(ring + stage + x_bytes) + half * width + 2 * q;
#pragma unroll
        for (u32 c = 0; c < columns; c++) {
            float2 of = part.has_offsets() ? *(const float2*)(x + 8 * c) : make_float2(0.0f, 0.0f);
#pragma unroll
            for (u32 s = 0; s < strips; s++) part.bring(totals[s][c], sums[s][c], s, of.x, of.y);
        }
    };
    // A lane's vectors of the halves of its first token.
    u32 x_lower = opaque((g * 8 + (q ^ g % 2 * 4)) * 16);
    for (; slice < end_slice; slice++) {
        u32 slice_end = o.tile_of(source.across, slice + 1);
        for (; tile < slice_end; tile++) {
            cp_async_wait<(int)stages - 2>();
            __syncthreads();
            if (left >= stages) ask(free, tile + stages - 1);
            // Empty groups keep the count.
            cp_async_commit();
            Fragment w[strips];
#pragma unroll
            for (u32 s = 0; s < strips; s++) {
                source.decode(w[s], ring + stage + x_bytes + of_x_bytes + warp * warp_bytes + s * Source::TILE_BYTES, lane);
            }
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                const u8* from = ring + stage + (half ? x_lower ^ 64 : x_lower);
#pragma unroll
                for (u32 c = 0; c < columns; c += together) {
                    uint4 x[together];
#pragma unroll
                    for (u32 i = 0; i < together; i++) x[i] = *(const uint4*)(from + (c + i) * 1024);
#pragma unroll
                    for (u32 p = 0; p < 2; p++) {
#pragma unroll
                        for (u32 i = 0; i < together; i++) {
#pragma unroll
                            for (u32 s = 0; s < strips; s++) {
                                mma_bf16(sums[s][c + i], w[s].words[half][p], p ? x[i].z : x[i].x, p ? x[i].w : x[i].y);
                            }
                        }
                    }
                }
                bool last = tile + 1 == slice_end && half == 1;
                if (--part.left == 0 || last) {
                    if (part.inside()) bring(half);
                    if (part.left == 0) part.next();
                }
            }
            left--;
            free = stage;
            stage = stage == (stages - 1) * stage_bytes ? 0 : stage + stage_bytes;
        }
        if (own_slices == 1) break;
        bool first = slice + own_slices == end_slice, last = slice + 1 == end_slice;
#pragma unroll
        for (u32 s = 0; s < strips; s++) {
#pragma unroll
            for (u32 c = 0; c < columns; c++) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    float* total = sofar + ((s * columns + c) * 4 + i) * THREADS;
                    float sum = first ? totals[s][c][i] : __fadd_rn(*total, totals[s][c][i]);
                    if (!last) *total = sum;
                    totals[s][c][i] = last ? sum : 0.0f;
                }
            }
        }
    }

    if (parts > 1) {
        constexpr u64 size = strips * columns * THREADS;
        float4* tile_sums = partials.sums + blockIdx.x * parts * size + thread;
#pragma unroll
        for (u32 s = 0; s < strips; s++) {
#pragma unroll
            for (u32 c = 0; c < columns; c++) {
                const float(&sum)[4] = totals[s][c];
                tile_sums[blockIdx.y * size + (s * columns + c) * THREADS] = make_float4(sum[0], sum[1], sum[2], sum[3]);
            }
        }
        __threadfence();
        __syncthreads();
        if (thread == 0) {
            *before = atomicAdd(partials.done + blockIdx.x, 1);
            // The next launch counts from zero again.
            if (*before == parts - 1) partials.done[blockIdx.x] = 0;
        }
        __syncthreads();
        if (*before != parts - 1) return;
        __threadfence();
        switch (parts) {
            case 2: add_parts<2>(totals, tile_sums); break;
            case 4: add_parts<4>(totals, tile_sums); break;
            default: add_parts<8>(totals, tile_sums); break;
        }
    }
#pragma unroll
    for (u32 c = 0; c < columns; c++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
#pragma unroll
            for (u32 s = 0; s < strips; s++) {
                u64 n = (first_strip + s) * TILE_ROWS + i % 2 * 8 + g;
                finish(o, rows, n, first_token + 8 * c + 2 * q + i / 2, totals[s][c][i % 2 * 2 + i / 2]);
            }
        }
    }
}

// of_x[half tile][token], tokens rounded up to a multiple of 8: what x adds up to from where the part of a group begins in which the
// half lies to the half's end, in the order of `mma` with ones. A warp takes eight tokens (blockIdx.y) and a part: one of
// blockIdx.x * WARPS + warp, parts numbered by their slices and then by their groups.
DEVICE void add_groups_of_x(const Operands& o, u32 across, u32 length, float* of_x) {
    u32 lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4;
    // Most parts that a slice has, so that each warp finds its own.
    u32 slice_halves = (across + o.slices() - 1 >> o.log_slices) * 2, most = slice_halves / length + 2,
        number = blockIdx.x * WARPS + threadIdx.x / WARP;
    u32 slice = number / most;
    if (slice >= o.slices()) return;
    u32 begin = 2 * o.tile_of(across, slice), end = 2 * o.tile_of(across, slice + 1);
    // The slice's first group, and the part's.
    u64 group = begin / length + number % most;
    u64 from = group * length, to = from + length;
    u32 half = (u32)max((u64)begin, from);
    end = (u32)min((u64)end, to);
    if (half >= end) return;
    u32 token = min(blockIdx.y * 8 + g, o.tokens - 1), padded = (o.tokens + 7) / 8 * 8;
    const u16* x = o.x + token * (u64)o.stride + 8 * q;
    const u32 ones[4] = {ONES, ONES, ONES, ONES};
    float sum[4] = {};
    for (; half < end; half++) {
        uint4 v = *(const uint4*)(x + (u64)half * HALF_K);
        mma_bf16(sum, ones, v.x, v.y);
        mma_bf16(sum, ones, v.z, v.w);
        if (g == 0) *(float2*)(of_x + (u64)half * padded + blockIdx.y * 8 + 2 * q) = make_float2(sum[0], sum[1]);
    }
}

// out: BF16 [rows, stride] of codes less the centre, with zeros from `cols` up to `stride`, the next multiple of 8. A warp takes a tile.
template <u32 bits>
DEVICE void decode(const Packed<bits>& weights, u64 rows, u64 cols, u16* out, u64 stride) {
    u32 lane = threadIdx.x % WARP;
    u64 number = (u64)blockIdx.x * WARPS + threadIdx.x / WARP, strip = number / weights.across;
    if (strip * TILE_ROWS >= rows) return;
    u32 tile = (u32)(number % weights.across);
    Fragment f;
    weights.decode(f, weights.strip((u32)strip, tile, lane).tile, lane);
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        u64 row = strip * TILE_ROWS + i % 2 * 8 + lane / 4;
        u64 k = (u64)tile * TILE_K + i / 2 * HALF_K + lane % 4 * 8;
        if (row >= rows || k >= cols) continue;
        const u32(&a)[4] = f.words[i / 2][0];
        const u32(&b)[4] = f.words[i / 2][1];
        u32 words[4] = {a[i % 2], a[2 + i % 2], b[i % 2], b[2 + i % 2]};
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            // Beyond the columns.
            if (k + 2 * j + 1 >= cols) words[j] = k + 2 * j < cols ? words[j] & 0xffff : 0;
        }
        *(uint4*)(out + row * stride + k) = vector_of(words);
    }
}

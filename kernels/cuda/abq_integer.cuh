// Products of weights of 1 to 8 bits with activations of 1 to 8 bits, in integers.
//
//   x ~ step[t] (q[t][k] - zero[t])       of each token t (abq_quantise.cu)
//   J = sum_k code (q - zero)   D = sum_k (q - zero)      of each group, exact in 32 bits: groups have at most 32,768 columns
//
//   y = 0, then for each group in turn
//     with an offset o:   y = scale J + y;  y = o D + y
//     else, z its zero:   y = scale (J - z D) + y          integers rounded to F32, each line's product and sum fused
//   at last y = step y, then the bias, then what y held
//
// These are the operations of the processor's products (kernels/src/cpu/abq.rs): the same bits.
//
// Weights lie in tiles of 16 rows x 128 k, 2 `bits` words a lane: word 2 i + r of lane 4 g + q has plane i of row g + 8 r, of
// which bit 8 (e % 4) + 2 w + e / 4 belongs to k = 32 w + 8 q + e. Shifted and masked, a word gives a bit of each of four
// neighbouring k, a byte apart; counting bits, any order will do that x has too.
#pragma once
#include "product.cuh"

constexpr u32 BLOCK_K = 32;
constexpr u32 BITS_TILE_K = 128;
constexpr u32 BLOCKS = BITS_TILE_K / BLOCK_K;

// What quantising made of x. Groups of `length` blocks of 32 columns, the last one shorter.
struct Quantised {
    const u8* codes;
    const float* steps;
    const i32* zeros;
    // [tokens][groups]: D.
    const i32* sums;
};

// Weights besides the codes, [strips][groups][16] each. `sums`: of codes. No `zeros`: the centre.
struct Grids {
    const float* scale;
    const float* offset;
    const u8* zeros;
    const i32* sums;
    u32 centre, count, length;
};

// A lane's words of a tile: 16-byte pieces of all lanes, then one of 8.
template <u32 bits>
struct Planes {
    static constexpr u32 TILE_BYTES = 256 * bits;
    static constexpr i32 VECTORS = bits / 2, LONG = bits % 2;

    DEVICE_METHOD static void copy(u8* to, const u8* from, u32 lane) {
#pragma unroll
        for (i32 i = 0; i < VECTORS; i++) cp_async16(to + (i * WARP + lane) * 16, from + (i * WARP + lane) * 16);
        u32 at = VECTORS * 512 + lane * 8;
        if (LONG) cp_async8(to + at, from + at);
    }
    DEVICE_METHOD static void read(u32 (&words)[2 * bits], const u8* from, u32 lane) {
#pragma unroll
        for (i32 i = 0; i < VECTORS; i++) {
            uint4 v = *(const uint4*)(from + (i * WARP + lane) * 16);
            words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
        }
        if constexpr (LONG != 0) {
            uint2 v = *(const uint2*)(from + VECTORS * 512 + lane * 8);
            words[4 * VECTORS] = v.x, words[4 * VECTORS + 1] = v.y;
        }
    }
};

// ---- two ways to multiply ----------------------------------------------------------------------------------------

// Bytes: codes of four neighbouring k at a time in a word. x: [tokens, a multiple of 8][tiles][4][32], a lane's 32 codes of a tile
// together: byte 32 q + 8 w + e has k = 32 w + 8 q + e.
template <u32 bits, u32 columns>
struct ByBytes {
    // Of a block.
    u32 tokens;
    i32 sums[columns][4];
    const u8* x[columns];
    uint4 now[columns];

    DEVICE_METHOD static u32 block_tokens(u32) { return 8 * columns; }
    DEVICE_METHOD void start(const Quantised& q, u32 across, u32 first_token, u32 all, u32, u32 lane) {
        tokens = 8 * columns;
#pragma unroll
        for (u32 c = 0; c < columns; c++) {
            // What is beyond the last tokens is not written; codes are there up to a multiple of 8.
            u32 token = min(first_token + 8 * c + lane / 4, (all + 7) / 8 * 8 - 1);
            x[c] = q.codes + (u64)token * across * BITS_TILE_K + lane % 4 * 32;
        }
        clear();
    }
    DEVICE_METHOD void clear() {
#pragma unroll
        for (u32 c = 0; c < columns; c++) sums[c][0] = sums[c][1] = sums[c][2] = sums[c][3] = 0;
    }
    // Codes of row g + 8 r and k = 32 w + 8 q + 4 (s % 2) + 0..3, w = s / 2.
    template <i32 s, u32 r>
    DEVICE_METHOD static u32 four_codes(const u32 (&words)[2 * bits]) {
        u32 four = 0;
#pragma unroll
        for (i32 i = 0; i < (i32)bits; i++) {
            u32 word = words[2 * i + r];
            four |= (s > i ? word >> (s - i) : word << (i - s)) & 0x01010101u << i;
        }
        return four;
    }
    template <u32 w>
    DEVICE_METHOD void block(const u32 (&words)[2 * bits], u32 tile) {
        u32 a[4] = {four_codes<2 * w, 0>(words), four_codes<2 * w, 1>(words), four_codes<2 * w + 1, 0>(words),
                    four_codes<2 * w + 1, 1>(words)};
#pragma unroll
        for (u32 c = 0; c < columns; c++) {
            if (w % 2 == 0) now[c] = *(const uint4*)(x[c] + (u64)tile * BITS_TILE_K + w / 2 * 16);
            mma_u8(sums[c], a, w % 2 ? now[c].z : now[c].x, w % 2 ? now[c].w : now[c].y);
        }
    }
    // Adds the sums to those of a group, [16][tokens].
    DEVICE_METHOD void deposit(i32* to, u32 lane) {
#pragma unroll
        for (u32 c = 0; c < columns; c++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                atomicAdd(to + (lane / 4 + i / 2 * 8) * (8 * columns) + 8 * c + lane % 4 * 2 + i % 2, sums[c][i]);
            }
        }
        clear();
    }
};

// Bits: planes of x are the rows of `mma`, `slot` rows (1, 2, 4 or 8) a token, those beyond its planes zero. x: [fragments of 16
// rows][tiles][lanes][2], the words of rows g and g + 8.
template <u32 bits, u32 fragments>
struct ByBits {
    u32 tokens, slot;
    i32 sums[bits][2][fragments][4];
    const uint2* x[fragments];

    DEVICE_METHOD static u32 block_tokens(u32 slot) { return fragments * 16 / slot; }
    DEVICE_METHOD void start(const Quantised& q, u32 across, u32 first_token, u32 all, u32 rows, u32 lane) {
        slot = rows, tokens = fragments * 16 / slot;
        u32 last = (all * slot - 1) / 16;
#pragma unroll
        for (u32 f = 0; f < fragments; f++) {
            u32 fragment = min(first_token * slot / 16 + f, last);
            x[f] = (const uint2*)q.codes + (u64)fragment * across * WARP + lane;
        }
        clear();
    }
    DEVICE_METHOD void clear() {
#pragma unroll
        for (u32 i = 0; i < bits; i++) {
#pragma unroll
            for (u32 r = 0; r < 2; r++) {
#pragma unroll
                for (u32 f = 0; f < fragments; f++) {
#pragma unroll
                    for (u32 j = 0; j < 4; j++) sums[i][r][f][j] = 0;
                }
            }
        }
    }
    DEVICE_METHOD void tile(const u32 (&words)[2 * bits], u32 tile) {
#pragma unroll
        for (u32 f = 0; f < fragments; f++) {
            uint2 a = x[f][(u64)tile * WARP];
#pragma unroll
            for (u32 i = 0; i < bits; i++) {
#pragma unroll
                for (u32 r = 0; r < 2; r++) mma_b1(sums[i][r][f], a.x, a.y, words[2 * i + r]);
            }
        }
    }
    DEVICE_METHOD void deposit(i32* to, u32 lane) {
        u32 g = lane / 4, q = lane % 4;
#pragma unroll
        for (u32 f = 0; f < fragments; f++) {
#pragma unroll
            for (u32 r = 0; r < 2; r++) {
#pragma unroll
                for (u32 j = 0; j < 4; j++) {
                    i32 sum = 0;
#pragma unroll
                    for (u32 i = 0; i < bits; i++) sum += sums[i][r][f][j] << i;
                    // Plane of x, of row g + 8 (j / 2).
                    sum <<= g & (slot - 1);
                    for (u32 distance = 4; distance < 4 * slot; distance *= 2) {
                        sum += __shfl_xor_sync(ALL_LANES, sum, distance);
                    }
                    u32 token = (16 * f + j / 2 * 8 + g) / slot;
                    if ((g & (slot - 1)) == 0) atomicAdd(to + (8 * r + 2 * q + j % 2) * tokens + token, sum);
                }
            }
        }
        clear();
    }
};

// ---- the loop ----------------------------------------------------------------------------------------------------

// Tiles that are asked for together, less one: about as many bytes for every width.
template <u32 bits>
constexpr u32 STAGES = bits <= 2 ? 8 : 4;

// Outputs that a thread has at most.
constexpr u32 OUTPUTS = 4;

// Where a warp's groups are: blocks of 32 columns.
struct Countdown {
    u32 group, left, length;
    DEVICE_METHOD Countdown(u32 block, u32 group_length)
        : group(block / group_length), left(group_length - block % group_length), length(group_length) {}
    // Whether a group ends that many blocks on.
    DEVICE_METHOD bool past(u32 blocks) {
        left -= blocks;
        return left == 0;
    }
    DEVICE_METHOD void next() { group++, left = length; }
};

// A block of eight warps makes 8 / slices strips of 16 rows x some tokens, of which neighbouring blocks have the next. The
// groups are taken `chunk` at a time, of which each warp takes a slice of the tiles; what it finds is added up in shared memory.
// `slot`: see ByBits. A launch gives shared memory for eight rings of `stages` tiles and for the sums of a chunk.
template <u32 bits, u32 stages, bool by_bits, typename Engine>
DEVICE void multiply_integers(const u8* codes, u64 rows, u32 across, const Grids& w, const Quantised& x, u32 slot, u32 chunk,
                              const Operands& o) {
    let_later_begin();
    using Tiles = Planes<bits>;
    Engine engine;
    u32 tokens = Engine::block_tokens(slot);
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 slices = o.slices(), slice = warp & (slices - 1), strips = WARPS >> o.log_slices;
    Shared shared;
    u8* ring = shared.take<u8>(WARPS * stages * Tiles::TILE_BYTES) + warp * stages * Tiles::TILE_BYTES;
    u32 strip_sums = chunk * TILE_ROWS * tokens;
    i32* sums = shared.take<i32>(strips * strip_sums);
    u32 token_blocks = (o.tokens + tokens - 1) / tokens;
    u64 first_strip = (u64)(blockIdx.x / token_blocks) * strips, strip = first_strip + (warp >> o.log_slices);
    u32 first_token = blockIdx.x % token_blocks * tokens;
    bool idle = strip * TILE_ROWS >= rows;
    i32* own = sums + (warp >> o.log_slices) * strip_sums;
    float y[OUTPUTS] = {};
    bool waited = false;
    for (u32 first = 0; first < w.count; first += chunk) {
        u32 last = min(first + chunk, w.count);
        // Chunks begin with a tile, but for the first ones of `chunk` groups none ends inside of one.
        u32 begin = (u32)((u64)first * w.length / BLOCKS);
        u32 end = (u32)min(((u64)last * w.length + BLOCKS - 1) / BLOCKS, (u64)across);
        u32 tile = begin + (u32)((u64)(end - begin) * slice >> o.log_slices);
        u32 left = begin + (u32)((u64)(end - begin) * (slice + 1) >> o.log_slices) - tile;
        if (idle) left = 0;
        const u8* from = codes + (strip * across + tile) * Tiles::TILE_BYTES;
#pragma unroll
        for (u32 i = 0; i + 1 < stages; i++) {
            if (i < left) {
                Tiles::copy(ring + i * Tiles::TILE_BYTES, from, lane);
                from += Tiles::TILE_BYTES;
            }
            cp_async_commit();
        }
        for (u32 i = threadIdx.x; i < strips * strip_sums; i += THREADS) sums[i] = 0;
        if (!waited) {
            wait_for_earlier();
            waited = true;
        }
        engine.start(x, across, first_token, o.tokens, slot, lane);
        __syncthreads();
        Countdown at(tile * BLOCKS, w.length);
        u32 stage = 0, free = (stages - 1) * Tiles::TILE_BYTES;
        auto deposit = [&]() {
            // The last tile may go on beyond the last group.
            if (at.group < last) engine.deposit(own + (at.group - first) * TILE_ROWS * tokens, lane);
        };
        for (; left; left--, tile++) {
            cp_async_wait<(int)stages - 2>();
            if (left >= stages) {
                Tiles::copy(ring + free, from, lane);
                from += Tiles::TILE_BYTES;
            }
            // Empty groups keep the count.
            cp_async_commit();
            u32 words[2 * bits];
            Tiles::read(words, ring + stage, lane);
            if constexpr (by_bits) {
                engine.tile(words, tile);
            } else if (w.length % BLOCKS == 0) {
                engine.template block<0>(words, tile);
                engine.template block<1>(words, tile);
                engine.template block<2>(words, tile);
                engine.template block<3>(words, tile);
            } else {
#pragma unroll 1
                for (u32 i = 0; i < BLOCKS; i++) {
                    // What the last block ends is looked after below.
                    if (i > 0 && at.past(1)) deposit(), at.next();
                    switch (i) {
                        case 0: engine.template block<0>(words, tile); break;
                        case 1: engine.template block<1>(words, tile); break;
                        case 2: engine.template block<2>(words, tile); break;
                        default: engine.template block<3>(words, tile); break;
                    }
                }
            }
            bool ends = at.past(w.length % BLOCKS == 0 ? BLOCKS : 1);
            if (ends || left == 1) {
                deposit();
                if (ends) at.next();
            }
            free = stage;
            stage = stage == (stages - 1) * Tiles::TILE_BYTES ? 0 : stage + Tiles::TILE_BYTES;
        }
        __syncthreads();
#pragma unroll
        for (u32 i = 0; i < OUTPUTS; i++) {
            // Rows side by side: their scales are.
            u32 output = threadIdx.x + i * THREADS, row = output % TILE_ROWS, t = output / TILE_ROWS % tokens;
            u32 s = output / (TILE_ROWS * tokens), token = first_token + t;
            if (s >= strips || token >= o.tokens || (first_strip + s) * TILE_ROWS + row >= rows) continue;
            i32 zero = x.zeros[token];
            const i32* found = sums + s * strip_sums + row * tokens + t;
            const i32* of_x = x.sums + (u64)token * w.count;
            u64 place = ((first_strip + s) * w.count + first) * TILE_ROWS + row;
            for (u32 group = first; group < last; group++) {
                i32 j = *found - zero * w.sums[place], d = of_x[group];
                if (w.offset) {
                    y[i] = __fmaf_rn(w.scale[place], (float)j, y[i]);
                    y[i] = __fmaf_rn(w.offset[place], (float)d, y[i]);
                } else {
                    i32 z = w.zeros ? w.zeros[place] : (i32)w.centre;
                    y[i] = __fmaf_rn(w.scale[place], (float)(j - z * d), y[i]);
                }
                found += TILE_ROWS * tokens, place += TILE_ROWS;
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (u32 i = 0; i < OUTPUTS; i++) {
        u32 output = threadIdx.x + i * THREADS, t = output / TILE_ROWS % tokens;
        u32 s = output / (TILE_ROWS * tokens), token = first_token + t;
        if (s >= strips || token >= o.tokens) continue;
        finish(o, rows, (first_strip + s) * TILE_ROWS + output % TILE_ROWS, token, __fmul_rn(x.steps[token], y[i]));
    }
}

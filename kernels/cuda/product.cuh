// Matrix products with weights of any encoding: two tile loops, one order of additions.
//
//   y[token][n] = sum over k of W[n][k] x[token][k]      W in tiles of 16 rows x 64 k, x in BF16, sums in F32
//
// The order, the same for every encoding and every variant: the T tiles of a strip of 16 rows are cut into S slices, slice s from
// tile s T / S on; the launcher derives S from the matrix's rows alone. A slice starts at zero and takes its tiles in turn; a
// tile is four `mma` in turn, of which number 2 h + p (half h, part p) takes k = 32 h + 8 q + 4 p + {0, 1} for q = 0..3 and then
// the same with {2, 3}. The slices are added one after the other, the first one first, then the bias, then what y held.
//
// An encoding is a type with
//   VECTORS, ESCAPES                     16-byte vectors that a lane holds of a tile; whether tiles may need a patch
//   across                               tiles of a strip
//   strip(number, lane)                  what a lane keeps of a strip
//   copy(to, strip, tile, i, lane)       starts to copy vector i of a tile to shared memory
//   decode(vectors)                      the lane's weights of a tile, escapes apart
//   offsets(strip), escapes              escapes before each tile of a strip, and all of them
#pragma once
#include "device.cuh"

constexpr u32 TILE_K = 64;
constexpr u32 TILE_ROWS = 16;
// Of every product's blocks.
constexpr u32 WARPS = 8;
constexpr u32 THREADS = WARPS * WARP;

// Weights of a tile that a lane 4 g + q holds, as `mma` number 2 h + p takes them: word 2 j + r has those of row g + 8 r and
// k = 32 h + 8 q + 4 p + 2 j, + 1.
struct Fragment {
    u32 words[2][2][4];
};

DEVICE void set_vector(u32 (&words)[4], uint4 v) { words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w; }
DEVICE uint4 vector_of(const u32 (&words)[4]) { return make_uint4(words[0], words[1], words[2], words[3]); }

// What a launch gives besides the weights.
struct Operands {
    const u16* x;
    u32 stride;
    u32 tokens;
    float* y;
    u64 y_stride;
    const float* bias;
    u32 adds;
    u32 slices;
};

// ---- escapes -----------------------------------------------------------------------------------------------------

// Vectors of shared memory in which a warp patches a tile.
constexpr u32 PATCH_VECTORS = 4 * WARP;
constexpr u32 NO_ESCAPE = 0xffffffffu;
// Escapes of a tile that are loaded before they are needed: this many a lane.
constexpr u32 EARLY = 2;

// The escapes of the tiles from `first` on; lane i knows how many come before tile first + i.
template <bool any>
struct EscapeList {
    u32 first, before, listed;

    // offsets: of a strip, which has `across` tiles.
    DEVICE_METHOD void look(const u32* offsets, u32 across, u32 tile, u32 lane) {
        first = tile;
        before = offsets[min(tile + lane, across)];
        u32 after = __shfl_down_sync(ALL_LANES, before, 1);
        // The last lane knows no next tile.
        listed = __ballot_sync(ALL_LANES, lane < WARP - 1 && after > before);
    }
    DEVICE_METHOD bool knows(u32 tile) const { return tile - first < WARP - 1; }
    DEVICE_METHOD bool has(u32 tile) const { return (listed >> (tile - first) & 1) != 0; }
    DEVICE_METHOD void load(u32 (&words)[EARLY], const u32* escapes, u32 tile, u32 lane) const {
        u32 from = __shfl_sync(ALL_LANES, before, tile - first), to = __shfl_sync(ALL_LANES, before, tile - first + 1);
#pragma unroll
        for (u32 i = 0; i < EARLY; i++) {
            words[i] = NO_ESCAPE;
            if (from + i * WARP + lane < to) words[i] = load_once(escapes + from + i * WARP + lane);
        }
    }

    // An escape: the place of the weight among the lanes' fragments, and its exponent where a BF16 has it, 16 bits up.
    DEVICE_METHOD static void put(u16* weights, u32 escape) {
        u16* weight = weights + (escape & 1023);
        *weight = (u16)((*weight & 0x807fu) | escape >> 16);
    }
    // `area` is the warp's own.
    DEVICE_METHOD void patch(Fragment& f, uint4* area, const u32 (&words)[EARLY], const u32* escapes, u32 tile,
                             u32 lane) const {
        u32 from = __shfl_sync(ALL_LANES, before, tile - first), to = __shfl_sync(ALL_LANES, before, tile - first + 1);
        __syncwarp();
#pragma unroll
        for (u32 i = 0; i < 4; i++) area[i * WARP + lane] = vector_of(f.words[i / 2][i % 2]);
        __syncwarp();
        u16* weights = (u16*)area;
#pragma unroll
        for (u32 i = 0; i < EARLY; i++) {
            if (words[i] != NO_ESCAPE) put(weights, words[i]);
        }
        for (u32 i = from + EARLY * WARP + lane; i < to; i += WARP) put(weights, load_once(escapes + i));
        __syncwarp();
#pragma unroll
        for (u32 i = 0; i < 4; i++) set_vector(f.words[i / 2][i % 2], area[i * WARP + lane]);
    }
};

// An encoding without escapes.
template <>
struct EscapeList<false> {
    DEVICE_METHOD void look(const u32*, u32, u32, u32) {}
    DEVICE_METHOD bool knows(u32) const { return true; }
    DEVICE_METHOD bool has(u32) const { return false; }
    DEVICE_METHOD void load(u32 (&)[EARLY], const u32*, u32, u32) const {}
    DEVICE_METHOD void patch(Fragment&, uint4*, const u32 (&)[EARLY], const u32*, u32, u32) const {}
};

// ---- tiles -------------------------------------------------------------------------------------------------------

// A lane's weights of some strips, on their way through shared memory: a lane copies what it reads itself, so that it waits for
// no other. Registers could not hold as much, and the compiler moves loads into them to where they are needed.
template <u32 strips, typename Weights>
struct Lane {
    static constexpr u32 VECTORS = strips * Weights::VECTORS;
    const Weights& weights;
    typename Weights::Strip strip[strips];
    EscapeList<Weights::ESCAPES> list[strips];
    u32 early[strips][EARLY];
    // Where a warp patches tiles.
    uint4* area;
    u32 lane, end;

    // Strips from `first` on; tiles tile .. end.
    DEVICE_METHOD Lane(const Weights& all, u64 first, u64 rows, u32 tile, u32 last, uint4* patched)
        : weights(all), area(patched), lane(threadIdx.x % WARP), end(last) {
#pragma unroll
        for (u32 s = 0; s < strips; s++) {
            // Strips beyond the last one repeat it; nothing is written for them.
            strip[s] = weights.strip((u32)min(first + s, (rows - 1) / TILE_ROWS), lane);
            if (tile < end) list[s].look(weights.offsets(strip[s]), weights.across, tile, lane);
        }
        look_ahead(tile);
    }
    // Starts to copy a tile to the lane's vectors, WARP apart.
    DEVICE_METHOD void ask(uint4* to, u32 tile) const {
#pragma unroll
        for (u32 s = 0; s < strips; s++) {
#pragma unroll
            for (u32 i = 0; i < Weights::VECTORS; i++) {
                weights.copy(to + (s * Weights::VECTORS + i) * WARP, strip[s], tile, i, lane);
            }
        }
    }
    // Loads the first escapes of a tile.
    DEVICE_METHOD void look_ahead(u32 tile) {
        if (tile >= end) return;
#pragma unroll
        for (u32 s = 0; s < strips; s++) {
            if (!list[s].knows(tile)) list[s].look(weights.offsets(strip[s]), weights.across, tile, lane);
            if (list[s].has(tile)) list[s].load(early[s], weights.escapes, tile, lane);
        }
    }
    // The tile that lies in `from`.
    DEVICE_METHOD void decode(Fragment (&w)[strips], const uint4* from, u32 tile) {
#pragma unroll
        for (u32 s = 0; s < strips; s++) {
            uint4 raw[Weights::VECTORS];
#pragma unroll
            for (u32 i = 0; i < Weights::VECTORS; i++) raw[i] = from[(s * Weights::VECTORS + i) * WARP];
            w[s] = weights.decode(raw);
            if (list[s].has(tile)) list[s].patch(w[s], area, early[s], weights.escapes, tile, lane);
        }
        look_ahead(tile + 1);
    }
};

// sums[s][first + c] += half a tile of strip s times column first + c's tokens: part by part, so that neighbouring `mma` have
// other sums.
template <u32 taken, u32 columns, u32 strips>
DEVICE void multiply_half(float (&sums)[strips][columns][4], const Fragment (&w)[strips], u32 half, u32 first,
                          const uint4 (&x)[taken]) {
#pragma unroll
    for (u32 part = 0; part < 2; part++) {
#pragma unroll
        for (u32 c = 0; c < taken; c++) {
#pragma unroll
            for (u32 s = 0; s < strips; s++) {
                mma_bf16(sums[s][first + c], w[s].words[half][part], part ? x[c].z : x[c].x, part ? x[c].w : x[c].y);
            }
        }
    }
}

// Writes a sum to y.
DEVICE void finish(const Operands& o, u64 rows, u64 n, u32 token, float sum) {
    if (n >= rows || token >= o.tokens) return;
    if (o.bias) sum = __fadd_rn(sum, o.bias[n]);
    float* to = o.y + token * o.y_stride + n;
    *to = o.adds ? __fadd_rn(*to, sum) : sum;
}

// ---- few tokens: a warp streams the tiles of one slice, x comes from the caches -----------------------------------

// A block's eight warps: `slices` slices of 8 / slices groups of `strips` strips; blockIdx.y counts 8 `columns` tokens. Tiles are
// asked for stages - 1 tiles early.
template <u32 columns, u32 strips, u32 stages, typename Weights>
DEVICE void stream_product(const Weights& weights, u64 rows, const Operands& o) {
    constexpr u32 elements = strips * columns * 4 * WARP, vectors = Lane<strips, Weights>::VECTORS * WARP;
    Shared shared;
    uint4* rings = shared.take<uint4>(WARPS * stages * vectors);
    uint4* areas = Weights::ESCAPES ? shared.take<uint4>(WARPS * PATCH_VECTORS) : nullptr;
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, q = lane % 4;
    uint4* ring = rings + warp * stages * vectors + lane;
    u32 slice = warp % o.slices, groups = WARPS / o.slices;
    u64 block_strip = (u64)blockIdx.x * groups * strips;
    u64 first_strip = block_strip + warp / o.slices * strips;
    u32 first_token = blockIdx.y * columns * 8;
    u32 tile = (u32)((u64)weights.across * slice / o.slices), end = (u32)((u64)weights.across * (slice + 1) / o.slices);
    // Warps beyond the last strip have nothing to do.
    if (first_strip * TILE_ROWS >= rows) end = tile;

    Lane<strips, Weights> own(weights, first_strip, rows, tile, end, areas + warp * PATCH_VECTORS);
    float sums[strips][columns][4] = {};
    const u16* x[columns];
#pragma unroll
    for (u32 c = 0; c < columns; c++) {
        // Tokens beyond the last one repeat it: the same addresses cost nothing.
        u32 token = min(first_token + 8 * c + g, o.tokens - 1);
        x[c] = o.x + token * (u64)o.stride + 8 * q;
    }
#pragma unroll
    for (u32 i = 0; i + 1 < stages; i++) {
        if (tile + i < end) own.ask(ring + i * vectors, tile + i);
        cp_async_commit();
    }
    for (u32 slot = 0; tile < end; tile++) {
        uint4 now[2][columns];
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
#pragma unroll
            for (u32 c = 0; c < columns; c++) now[half][c] = *(const uint4*)(x[c] + tile * TILE_K + 32 * half);
        }
        cp_async_wait<(int)stages - 2>();
        // The slot of the tile before.
        u32 left = slot == 0 ? stages - 1 : slot - 1;
        if (tile + stages - 1 < end) own.ask(ring + left * vectors, tile + stages - 1);
        // Empty groups keep the count.
        cp_async_commit();
        Fragment w[strips];
        own.decode(w, ring + slot * vectors, tile);
        multiply_half(sums, w, 0, 0, now[0]);
        multiply_half(sums, w, 1, 0, now[1]);
        slot = slot + 1 == stages ? 0 : slot + 1;
    }

    // The sums of a warp take the place of its ring.
    __syncwarp();
    float* mine = (float*)ring - lane * 3;
#pragma unroll
    for (u32 s = 0; s < strips; s++) {
#pragma unroll
        for (u32 c = 0; c < columns; c++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) mine[((s * columns + c) * 4 + i) * WARP] = sums[s][c][i];
        }
    }
    __syncthreads();
    for (u32 at = threadIdx.x; at < groups * elements; at += THREADS) {
        u32 group = at / elements, element = at % elements;
        const float* from = (const float*)(rings + group * o.slices * stages * vectors) + element;
        float sum = from[0];
        for (u32 s = 1; s < o.slices; s++) sum = __fadd_rn(sum, from[s * stages * vectors * 4]);
        // The element's place among the fragments.
        u32 i = element / WARP % 4, c = element / (4 * WARP) % columns, s = element / (4 * WARP * columns);
        u64 n = (block_strip + group * strips + s) * TILE_ROWS + i / 2 * 8 + element % WARP / 4;
        finish(o, rows, n, first_token + 8 * c + element % 4 * 2 + i % 2, sum);
    }
}

// ---- more tokens: x in shared memory, each warp on its own strips -------------------------------------------------

// What a product that is cut along k needs: sums of a block, and how many of a tile's blocks are done.
struct Partials {
    float4* sums;
    u32* done;
};

// Tiles of y that are neighbours in the grid share rows of x, up to so many columns of tiles.
constexpr u32 GROUPED = 16;

// A block makes 128 `strips` rows x 8 `columns` tokens of y, of which a warp has `strips` strips. gridDim.y = 1: it takes all
// slices in turn. gridDim.y = slices: it takes one; the last block of a tile to end adds them, in the slices' order.
//
// x (rows of 128 bytes, halves swapped in odd ones, so that a warp's reads meet no bank twice) and weights (each lane's own
// vectors) come in `stages` stages, asked for stages - 1 tiles early.
template <u32 columns, u32 strips, u32 stages, typename Weights>
DEVICE void panel_product(const Weights& weights, u64 rows, const Operands& o, Partials partials) {
    constexpr u32 width = 8 * columns, x_vectors = width * 8, lane_vectors = Lane<strips, Weights>::VECTORS;
    constexpr u32 stage_vectors = x_vectors + lane_vectors * THREADS;
    // Columns that are multiplied together: as many vectors of x are held at once.
    constexpr u32 together = columns < 4 ? columns : columns < 16 ? 4 : 2;
    Shared shared;
    uint4* ring = shared.take<uint4>(stages * stage_vectors);
    uint4* area = nullptr;
    u32* before = shared.take<u32>(1);
    u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP, g = lane / 4, q = lane % 4;
    if (Weights::ESCAPES) area = shared.take<uint4>(WARPS * PATCH_VECTORS) + warp * PATCH_VECTORS;
    u32 parts = gridDim.y, own_slices = o.slices / parts;
    float* totals = nullptr;
    if (own_slices > 1) totals = shared.take<float>(strips * columns * 4 * THREADS) + thread;

    u32 row_blocks = (u32)((rows + TILE_ROWS * WARPS * strips - 1) / (TILE_ROWS * WARPS * strips));
    u32 token_blocks = (o.tokens + width - 1) / width;
    u32 group = blockIdx.x / (GROUPED * row_blocks), in_group = blockIdx.x % (GROUPED * row_blocks);
    u32 grouped = min(GROUPED, token_blocks - group * GROUPED);
    u32 first_token = (group * GROUPED + in_group % grouped) * width;
    u64 first_strip = ((u64)(in_group / grouped) * WARPS + warp) * strips;

    u32 slice = blockIdx.y * own_slices, end_slice = slice + own_slices;
    u32 tile = (u32)((u64)weights.across * slice / o.slices), end = (u32)((u64)weights.across * end_slice / o.slices);

    Lane<strips, Weights> own(weights, first_strip, rows, tile, end, area);
    float sums[strips][columns][4] = {};

    // A thread copies one vector of every 32 tokens.
    constexpr u32 x_copies = (x_vectors + THREADS - 1) / THREADS;
    u32 x_token = thread / 8, x_place = thread % 8 ^ x_token % 2 * 4;
    const u16* x_from = o.x + (first_token + x_token) * (u64)o.stride + thread % 8 * 8;
#pragma unroll
    for (u32 i = 0; i < x_copies; i++) {
        u32 token = x_token + 32 * i;
        if (token < width && first_token + token >= o.tokens) {
            for (u32 slot = 0; slot < stages; slot++) {
                ring[slot * stage_vectors + token * 8 + x_place] = make_uint4(0, 0, 0, 0);
            }
        }
    }
    auto ask = [&](u32 wanted, u32 slot) {
        uint4* stage = ring + slot * stage_vectors;
        if (wanted < end) {
#pragma unroll
            for (u32 i = 0; i < x_copies; i++) {
                u32 token = x_token + 32 * i;
                if (token < width && first_token + token < o.tokens) {
                    cp_async16(stage + token * 8 + x_place, x_from + 32 * i * (u64)o.stride + wanted * TILE_K);
                }
            }
            own.ask(stage + x_vectors + warp * (lane_vectors * WARP) + lane, wanted);
        }
        // Empty groups keep the count.
        cp_async_commit();
    };
#pragma unroll
    for (u32 i = 0; i + 1 < stages; i++) ask(tile + i, i);

    // A lane's vectors of the halves of its first token.
    u32 x_lower = g * 8 + (q ^ g % 2 * 4), x_upper = x_lower ^ 4;
    u32 slot = 0;
    for (; slice < end_slice; slice++) {
        u32 slice_end = (u32)((u64)weights.across * (slice + 1) / o.slices);
        for (; tile < slice_end; tile++) {
            cp_async_wait<(int)stages - 2>();
            __syncthreads();
            // The slot that all have left.
            ask(tile + stages - 1, slot == 0 ? stages - 1 : slot - 1);
            const uint4* stage = ring + slot * stage_vectors;
            const uint4 *lower = stage + x_lower, *upper = stage + x_upper;
            Fragment w[strips];
            own.decode(w, stage + x_vectors + warp * (lane_vectors * WARP) + lane, tile);
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
#pragma unroll
                for (u32 c = 0; c < columns; c += together) {
                    uint4 x[together];
#pragma unroll
                    for (u32 i = 0; i < together; i++) {
                        x[i] = (half ? upper : lower)[(c + i) * 64];
                    }
                    multiply_half(sums, w, half, c, x);
                }
            }
            slot = slot + 1 == stages ? 0 : slot + 1;
        }
        if (own_slices == 1) break;
        bool first = slice + own_slices == end_slice, last = slice + 1 == end_slice;
#pragma unroll
        for (u32 s = 0; s < strips; s++) {
#pragma unroll
            for (u32 c = 0; c < columns; c++) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    float* total = totals + ((s * columns + c) * 4 + i) * THREADS;
                    float sum = first ? sums[s][c][i] : __fadd_rn(*total, sums[s][c][i]);
                    if (!last) *total = sum;
                    sums[s][c][i] = last ? sum : 0.0f;
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
                const float(&sum)[4] = sums[s][c];
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
        // A few columns at a time, for the loads of which there are registers.
#pragma unroll
        for (u32 from = 0; from < columns; from += together) {
#pragma unroll 1
            for (u32 part = 0; part < parts; part++) {
#pragma unroll
                for (u32 c = from; c < from + together; c++) {
#pragma unroll
                    for (u32 s = 0; s < strips; s++) {
                        float4 next = load_fresh(tile_sums + part * size + (s * columns + c) * THREADS);
                        float(&sum)[4] = sums[s][c];
                        sum[0] = part ? __fadd_rn(sum[0], next.x) : next.x;
                        sum[1] = part ? __fadd_rn(sum[1], next.y) : next.y;
                        sum[2] = part ? __fadd_rn(sum[2], next.z) : next.z;
                        sum[3] = part ? __fadd_rn(sum[3], next.w) : next.w;
                    }
                }
            }
        }
    }
    // Tokens outside: what is computed for one is used up before the next.
#pragma unroll
    for (u32 c = 0; c < columns; c++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
#pragma unroll
            for (u32 s = 0; s < strips; s++) {
                u64 n = (first_strip + s) * TILE_ROWS + i % 2 * 8 + g;
                finish(o, rows, n, first_token + 8 * c + 2 * q + i / 2, sums[s][c][i % 2 * 2 + i / 2]);
            }
        }
    }
}

// ---- variants: the launcher knows both lists ----------------------------------------------------------------------

// Columns, strips, stages.
#define STREAM_VARIANTS(KERNEL) \
    KERNEL(1, 1, 4) KERNEL(1, 1, 8) KERNEL(1, 2, 4) KERNEL(2, 1, 4) KERNEL(2, 1, 8) KERNEL(2, 2, 4)
#define PANEL_VARIANTS(KERNEL)                                                                                      \
    KERNEL(2, 1, 4) KERNEL(4, 1, 4) KERNEL(4, 2, 3) KERNEL(8, 1, 4) KERNEL(8, 2, 3) KERNEL(16, 1, 3) KERNEL(16, 2, 3) \
    KERNEL(16, 2, 2)

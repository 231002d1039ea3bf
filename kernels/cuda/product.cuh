// Matrix products with weights of any encoding: two tile loops, one order of additions.
//
//   y[token][n] = sum over k of W[n][k] x[token][k]      W in tiles of 16 rows x 64 k, x in BF16, sums in F32
//
// The order, the same for every encoding and every variant: the T tiles of a strip of 16 rows are cut into S slices, slice s from
// tile s T / S on; the launcher derives S from the matrix's rows alone. A slice starts at zero and takes its tiles in turn; a
// tile is four `mma` in turn, of which number 2 h + p (half h, part p) takes k = 32 h + 8 q + 4 p + {0, 1} for q = 0..3 and then
// the same with {2, 3}. The slices are added one after the other, the first one first, then the bias, then what y held.
//
// Weights of more than eight bits of mantissa come as the sum of several pieces in BF16, the largest first (dense.cuh): each of
// the four `mma` is made for one piece after the other.
//
// Weights of which two of four are kept (sparse24.cuh) have an order of their own: their tiles are 128 k, a tile is four `mma` of 32 k in
// turn, number i of k = 32 i + 0..31, in which what is kept is added in order of k. All else is the same.
//
// An encoding is a type with
//   SPARSE                               whether two of four are kept
//   VECTORS, ESCAPES                     16-byte vectors that a lane holds of a tile; whether tiles may need a patch
//   PIECES                               of a weight
//   across                               tiles of a strip
//   strip(number, tile, lane)            where a lane is in a strip
//   copy(to, strip, i)                   starts to copy vector i of that tile to shared memory
//   advance(strip)                       to the next tile
//   Piece                                what `mma` takes of a tile: a Fragment
//   decode(to, vectors, strip)           the lane's weights of a tile, a piece each, escapes apart
//   offsets(number), escapes             escapes before each tile of a strip, and all of them
//
// Whatever a loop needs moves on with it: what can be computed anew from the launch's arguments the compiler computes anew in
// every turn, which took as many instructions as decoding.
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

// Of weights of which two of four are kept: `mma` number 2 h + p takes words[h][p], rows and kept ones as mma_sparse_bf16 says, and
// kept[h] of the lower lanes for p = 0, of the upper ones for p = 1.
struct SparseFragment : Fragment {
    u32 kept[2];
};

// k of a tile.
template <typename Weights>
constexpr u32 STEP_K = Weights::SPARSE ? 2 * TILE_K : TILE_K;

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
    // The logarithm of the number of slices.
    u32 log_slices;

    DEVICE_METHOD u32 slices() const { return 1u << log_slices; }
    // Where a token's activations are, and where its output goes: one token after the other.
    static constexpr bool IN_A_ROW = true;
    DEVICE_METHOD const u16* x_of(u32 token) const { return x + token * (u64)stride; }
    DEVICE_METHOD float* y_of(u32 token) const { return y + token * y_stride; }
    // The first tile of a slice, of `across`.
    DEVICE_METHOD u32 tile_of(u32 across, u32 slice) const { return (u32)((u64)across * slice >> log_slices); }
};

// ---- escapes -----------------------------------------------------------------------------------------------------

// Escapes of a tile that come with its weights: this many a lane.
constexpr u32 EARLY = 2;
// Vectors of shared memory in which a warp patches half a tile.
constexpr u32 PATCH_VECTORS = 2 * WARP;

// An escape: the place of the weight among the lanes' fragments, and its exponent where a BF16 has it, 16 bits up. `half` of
// a tile lies at `words`.
DEVICE void put_escape(u16* words, u32 half, u32 escape) {
    if ((escape >> 9 & 1) != half) return;
    u16* word = words + (escape & 511);
    *word = (u16)((*word & 0x807fu) | escape >> 16);
}

// Has lanes change each other's words of a tile, a half at a time. `area` is the warp's own; what lies there is lost.
template <typename Change>
DEVICE void patch(Fragment& f, uint4* area, u32 lane, const Change& change) {
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        __syncwarp();
        area[lane] = vector_of(f.words[half][0]);
        area[WARP + lane] = vector_of(f.words[half][1]);
        __syncwarp();
        change((u16*)area, half);
        __syncwarp();
        set_vector(f.words[half][0], area[lane]);
        set_vector(f.words[half][1], area[WARP + lane]);
    }
}

// Which tiles have escapes, `ahead` tiles before they are needed: lane i knows how many escapes come before tile first + i.
template <bool any, u32 ahead>
struct EscapeList {
    // Vectors of shared memory for a tile's early escapes.
    static constexpr u32 VECTORS = EARLY * WARP / 4;
    // Tiles until the list is read on: after as many, the last lanes know what comes `ahead` tiles later.
    static constexpr u32 STEP = WARP - 1 - ahead;
    // The tile that the loop is at is first + turn; bit i of `listed` is whether tile first + turn + i has escapes. `coming` is
    // what the lane knows after the next step.
    u32 first, turn, before, coming, listed;

    DEVICE_METHOD void list(const u32* offsets, u32 across, u32 lane) {
        turn = 0;
        coming = offsets[min(first + STEP + lane, across)];
        u32 after = __shfl_down_sync(ALL_LANES, before, 1);
        // The last lane knows no next tile.
        listed = __ballot_sync(ALL_LANES, lane < WARP - 1 && after > before);
    }
    // offsets: of a strip, which has `across` tiles.
    DEVICE_METHOD void start(const u32* offsets, u32 across, u32 tile, u32 lane) {
        first = tile;
        before = offsets[min(tile + lane, across)];
        list(offsets, across, lane);
    }
    DEVICE_METHOD void advance() { turn++, listed >>= 1; }
    DEVICE_METHOD bool ends() const { return turn == STEP; }
    DEVICE_METHOD u32 past(u32 begin) const { return first + turn - begin; }
    DEVICE_METHOD void reach(const u32* offsets, u32 across, u32 lane) {
        first += STEP;
        before = coming;
        list(offsets, across, lane);
    }
    // Whether the tile so many after this one has escapes, and how many come before it.
    DEVICE_METHOD bool has(u32 later) const { return (listed >> later & 1) != 0; }
    DEVICE_METHOD u32 begin(u32 later) const { return __shfl_sync(ALL_LANES, before, turn + later); }
    // Starts to copy a tile's early escapes, of which a lane copies what it reads itself.
    DEVICE_METHOD void ask(u32* to, const u32* escapes, u32 later, u32 lane) const {
        u32 from = begin(later), end = begin(later + 1);
#pragma unroll
        for (u32 i = 0; i < EARLY; i++) {
            u32 at = from + i * WARP + lane;
            if (at < end) cp_async4(to + i * WARP + lane, escapes + at);
        }
    }
    // `early`: what was asked for.
    DEVICE_METHOD void correct(Fragment& f, uint4* area, const u32* early, const u32* escapes, u32 lane) const {
        u32 from = begin(0), end = begin(1);
        patch(f, area, lane, [&](u16* words, u32 half) {
#pragma unroll
            for (u32 i = 0; i < EARLY; i++) {
                if (from + i * WARP + lane < end) put_escape(words, half, early[i * WARP + lane]);
            }
            for (u32 i = from + EARLY * WARP + lane; i < end; i += WARP) put_escape(words, half, load_once(escapes + i));
        });
    }
};

// An encoding without escapes.
template <u32 ahead>
struct EscapeList<false, ahead> {
    static constexpr u32 VECTORS = 0;
    DEVICE_METHOD void start(const u32*, u32, u32, u32) {}
    DEVICE_METHOD void advance() {}
    DEVICE_METHOD bool ends() const { return false; }
    DEVICE_METHOD u32 past(u32) const { return 0; }
    DEVICE_METHOD void reach(const u32*, u32, u32) {}
    DEVICE_METHOD bool has(u32) const { return false; }
    DEVICE_METHOD void ask(u32*, const u32*, u32, u32) const {}
    DEVICE_METHOD void correct(Fragment&, uint4*, const u32*, const u32*, u32) const {}
};

// ---- tiles -------------------------------------------------------------------------------------------------------

// A warp's weights of some strips, on their way through shared memory in `stages` stages: a lane copies what it reads itself, so
// that it waits for no other. Registers could not hold as much, and the compiler moves loads into them to where they are needed.
template <u32 strips, u32 stages, typename Weights>
struct Lane {
    using List = EscapeList<Weights::ESCAPES, stages - 1>;
    // Vectors of a warp's stage: the lanes' weights, then escapes.
    static constexpr u32 WEIGHT_VECTORS = strips * Weights::VECTORS * WARP;
    static constexpr u32 VECTORS = WEIGHT_VECTORS + strips * List::VECTORS;
    const Weights& weights;
    // Where the next tile to ask for is.
    typename Weights::Strip strip[strips];
    List list[strips];
    // The last strips there are stand for those beyond them, for which nothing is written.
    u32 first_strip, last_strip, lane, begin;
    // Tiles that are not decoded yet, this one included.
    u32 left;

    // Strips from `first` on; tiles tile .. end.
    DEVICE_METHOD Lane(const Weights& all, u64 first, u64 rows, u32 tile, u32 end)
        : weights(all), lane(opaque(threadIdx.x % WARP)), begin(tile), left(end - tile) {
        u64 last = (rows - 1) / TILE_ROWS;
        first_strip = (u32)min(first, last), last_strip = (u32)last;
#pragma unroll
        for (u32 s = 0; s < strips; s++) strip[s] = weights.strip(number(s), tile, lane);
    }
    DEVICE_METHOD u32 number(u32 s) const { return min(first_strip + s, last_strip); }
    // `shared` + `stage`: the lane's first vector of a stage of the warp.
    DEVICE_METHOD u32* escapes_of(uint4* shared, u32 stage, u32 s) const {
        return (u32*)(shared + (stage - lane) + WEIGHT_VECTORS + s * List::VECTORS);
    }
    // Starts to copy the next tile's weights to a stage of the warp.
    DEVICE_METHOD void ask_weights(uint4* shared, u32 stage) {
#pragma unroll
        for (u32 s = 0; s < strips; s++) {
#pragma unroll
            for (u32 i = 0; i < Weights::VECTORS; i++) {
                weights.copy(shared + stage + (s * Weights::VECTORS + i) * WARP, strip[s], i);
            }
            weights.advance(strip[s]);
        }
    }
    // Before the loop, after the first stages' weights were asked for: finding out about escapes takes a trip to memory, which
    // is under way together with them. `apart`: vectors from a stage to the next.
    DEVICE_METHOD void start(uint4* shared, u32 stage, u32 apart) {
        if (left == 0) return;
#pragma unroll
        for (u32 s = 0; s < strips; s++) {
            list[s].start(weights.offsets(number(s)), weights.across, begin, lane);
#pragma unroll
            for (u32 i = 0; i + 1 < stages; i++) {
                if (i < left && list[s].has(i)) {
                    list[s].ask(escapes_of(shared, stage + i * apart, s), weights.escapes, i, lane);
                }
            }
        }
    }
    // In the loop: asks for the tile that comes stages - 1 after this one, if there is one.
    DEVICE_METHOD void ask_ahead(uint4* shared, u32 stage) {
        if (left < stages) return;
        ask_weights(shared, stage);
#pragma unroll
        for (u32 s = 0; s < strips; s++) {
            if (list[s].has(stages - 1)) list[s].ask(escapes_of(shared, stage, s), weights.escapes, stages - 1, lane);
        }
    }
    // The tile that lies in a stage. The stage is used up.
    DEVICE_METHOD void decode(typename Weights::Piece (&w)[strips][Weights::PIECES], uint4* shared, u32 stage) const {
#pragma unroll
        for (u32 s = 0; s < strips; s++) {
            uint4 raw[Weights::VECTORS];
#pragma unroll
            for (u32 i = 0; i < Weights::VECTORS; i++) {
                const uint4* from = shared + stage + (s * Weights::VECTORS + i) * WARP;
                if (Weights::SPARSE && i + 1 == Weights::VECTORS) {
                    // Half a vector, of which kept ones there are.
                    uint2 kept = *(const uint2*)from;
                    raw[i] = make_uint4(kept.x, kept.y, 0, 0);
                } else {
                    raw[i] = *from;
                }
            }
            weights.decode(w[s], raw, strip[s]);
            if (list[s].has(0)) {
                // The first tiles' escapes came after the weights.
                if (list[s].past(begin) < stages - 1) cp_async_wait<0>();
                uint4* area = shared + (stage - lane) + s * Weights::VECTORS * WARP;
                list[s].correct(w[s][0], area, escapes_of(shared, stage, s), weights.escapes, lane);
            }
        }
    }
    // To the next tile.
    DEVICE_METHOD void advance() {
        left--;
#pragma unroll
        for (u32 s = 0; s < strips; s++) {
            list[s].advance();
            if (list[s].ends()) list[s].reach(weights.offsets(number(s)), weights.across, lane);
        }
    }
};

// sums[s][first + c] += half a tile of strip s times column first + c's tokens: part by part, so that neighbouring `mma` have
// other sums.
template <u32 taken, u32 columns, u32 strips, u32 pieces>
DEVICE void multiply_half(float (&sums)[strips][columns][4], const Fragment (&w)[strips][pieces], u32 half, u32 first,
                          const uint4 (&x)[taken]) {
#pragma unroll
    for (u32 part = 0; part < 2; part++) {
#pragma unroll
        for (u32 piece = 0; piece < pieces; piece++) {
#pragma unroll
            for (u32 c = 0; c < taken; c++) {
#pragma unroll
                for (u32 s = 0; s < strips; s++) {
                    mma_bf16(sums[s][first + c], w[s][piece].words[half][part], part ? x[c].z : x[c].x,
                             part ? x[c].w : x[c].y);
                }
            }
        }
    }
}

// The same of a quarter of a tile whose weights are two of four: one `mma`.
template <u32 taken, u32 columns, u32 strips, u32 pieces>
DEVICE void multiply_half(float (&sums)[strips][columns][4], const SparseFragment (&w)[strips][pieces], u32 quarter, u32 first,
                          const uint4 (&x)[taken]) {
#pragma unroll
    for (u32 c = 0; c < taken; c++) {
#pragma unroll
        for (u32 s = 0; s < strips; s++) {
            const SparseFragment& f = w[s][0];
            mma_sparse_bf16(sums[s][first + c], f.words[quarter / 2][quarter % 2], x[c], f.kept[quarter / 2], quarter % 2 != 0);
        }
    }
}

// What a lane's `mma` of a part of a tile take of a token: `from` + 32 k a part, which for two of four in whole tiles may lie past the
// row, `left` elements on.
template <typename Weights>
DEVICE uint4 part_of_x(const u16* from, u32 part, u32 left) {
    if constexpr (Weights::SPARSE) {
        if (part >= 2 && left <= TILE_K) return make_uint4(0, 0, 0, 0);
        const u32* words = (const u32*)(from + 32 * part);
        return make_uint4(words[0], words[4], words[8], words[12]);
    } else {
        return *(const uint4*)(from + 32 * part);
    }
}

// Writes a sum to y.
template <typename O>
DEVICE void finish(const O& o, u64 rows, u64 n, u32 token, float sum) {
    if (n >= rows || token >= o.tokens) return;
    if (o.bias) sum = __fadd_rn(sum, o.bias[n]);
    float* to = o.y_of(token) + n;
    *to = o.adds ? __fadd_rn(*to, sum) : sum;
}

// ---- few tokens: a warp streams the tiles of one slice, x comes from the caches -----------------------------------

// A block's eight warps: `slices` slices of 8 / slices groups of `strips` strips; blockIdx.y counts 8 `columns` tokens. Tiles are
// asked for stages - 1 tiles early.
template <u32 columns, u32 strips, u32 stages, typename Weights, typename O>
DEVICE void stream_product(const Weights& weights, u64 rows, const O& o) {
    let_later_begin();
    using Own = Lane<strips, stages, Weights>;
    constexpr u32 elements = strips * columns * 4 * WARP, vectors = Own::VECTORS, STEP = STEP_K<Weights>;
    Shared shared;
    uint4* rings = shared.take<uint4>(WARPS * stages * vectors);
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, q = lane % 4;
    u32 slices = o.slices(), slice = warp & (slices - 1), groups = WARPS >> o.log_slices;
    u64 block_strip = (u64)blockIdx.x * groups * strips;
    u64 first_strip = block_strip + (warp >> o.log_slices) * strips;
    u32 first_token = blockIdx.y * columns * 8;
    u32 tile = o.tile_of(weights.across, slice), end = o.tile_of(weights.across, slice + 1);
    // Warps beyond the last strip have nothing to do.
    if (first_strip * TILE_ROWS >= rows) end = tile;

    Own own(weights, first_strip, rows, tile, end);
    u32 stage = opaque(warp * stages * vectors + lane), free = stage + (stages - 1) * vectors, wrap = free;
#pragma unroll
    for (u32 i = 0; i + 1 < stages; i++) {
        if (i < own.left) own.ask_weights(rings, stage + i * vectors);
        if (i + 2 < stages) cp_async_commit();
    }
    own.start(rings, stage, vectors);
    cp_async_commit();
    wait_for_earlier();
    float sums[strips][columns][4] = {};
    const u16* x[columns];
#pragma unroll
    for (u32 c = 0; c < columns; c++) {
        // Tokens beyond the last one repeat it: the same addresses cost nothing.
        u32 token = min(first_token + 8 * c + g, o.tokens - 1);
        x[c] = o.x_of(token) + (Weights::SPARSE ? 2 : 8) * q + tile * STEP;
    }
    // Elements of x from this tile on.
    u32 x_left = o.stride - tile * STEP;
    while (own.left) {
        // Of few columns several parts are asked for at once; more would take too many registers.
        constexpr u32 parts = STEP / 32, at_once = columns > 2 ? 1 : columns > 1 ? 2 : parts;
        uint4 now[at_once][columns];
#pragma unroll
        for (u32 part = 0; part < at_once; part++) {
#pragma unroll
            for (u32 c = 0; c < columns; c++) now[part][c] = part_of_x<Weights>(x[c], part, x_left);
        }
        cp_async_wait<(int)stages - 2>();
        // The stage of the tile before.
        own.ask_ahead(rings, free);
        // Empty groups keep the count.
        cp_async_commit();
        typename Weights::Piece w[strips][Weights::PIECES];
        own.decode(w, rings, stage);
#pragma unroll
        for (u32 part = 0; part < parts; part++) {
            if (part >= at_once && part % at_once == 0) {
#pragma unroll
                for (u32 i = 0; i < at_once; i++) {
#pragma unroll
                    for (u32 c = 0; c < columns; c++) now[i][c] = part_of_x<Weights>(x[c], part + i, x_left);
                }
            }
            multiply_half(sums, w, part, 0, now[part % at_once]);
        }
        own.advance();
        x_left -= STEP;
#pragma unroll
        for (u32 c = 0; c < columns; c++) x[c] += STEP;
        free = stage;
        stage = stage == wrap ? stage - (stages - 1) * vectors : stage + vectors;
    }

    // The sums of a warp take the place of its ring.
    __syncwarp();
    float* mine = (float*)(rings + warp * stages * vectors) + lane;
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
        const float* from = (const float*)(rings + (group << o.log_slices) * stages * vectors) + element;
        float sum = from[0];
        for (u32 s = 1; s < slices; s++) sum = __fadd_rn(sum, from[s * stages * vectors * 4]);
        // The element's place among the fragments.
        u32 i = element / WARP % 4, c = element / (4 * WARP) % columns, s = element / (4 * WARP * columns);
        u64 n = (block_strip + group * strips + s) * TILE_ROWS + i / 2 * 8 + element % WARP / 4;
        finish(o, rows, n, first_token + 8 * c + element % 4 * 2 + i % 2, sum);
    }
}

// ---- more tokens: x in shared memory, each warp on its own strips -------------------------------------------------

// What a product that is cut along k needs: sums of a block, and how many of a tile's blocks are done. Where a block takes all
// slices in turn, sums if they do not fit into shared memory.
struct Partials {
    float4* sums;
    u32* done;
};

// sums = those of all parts, added in order. What is added first is still under way while more is asked for: as many loads at a
// time as registers hold, all parts of a column together.
template <u32 parts, u32 columns, u32 strips>
DEVICE void add_parts(float (&sums)[strips][columns][4], const float4* from) {
    constexpr u32 size = strips * columns * THREADS, loads = 16 / parts;
    // Columns of a strip that are loaded together.
    constexpr u32 together = loads < columns ? loads : columns;
#pragma unroll
    for (u32 s = 0; s < strips; s++) {
#pragma unroll
        for (u32 first = 0; first < columns; first += together) {
            float4 part[together][parts];
#pragma unroll
            for (u32 c = 0; c < together; c++) {
#pragma unroll
                for (u32 i = 0; i < parts; i++) {
                    part[c][i] = load_fresh(from + (u64)i * size + (s * columns + first + c) * THREADS);
                }
            }
#pragma unroll
            for (u32 c = 0; c < together; c++) {
                float4 sum = part[c][0];
#pragma unroll
                for (u32 i = 1; i < parts; i++) {
                    float4 next = part[c][i];
                    sum = make_float4(__fadd_rn(sum.x, next.x), __fadd_rn(sum.y, next.y), __fadd_rn(sum.z, next.z),
                                      __fadd_rn(sum.w, next.w));
                }
                float(&to)[4] = sums[s][first + c];
                to[0] = sum.x, to[1] = sum.y, to[2] = sum.z, to[3] = sum.w;
            }
        }
    }
}

// Tiles of y that are neighbours in the grid share rows of x, up to so many columns of tiles.
constexpr u32 GROUPED = 16;

// A block makes 128 `strips` rows x 8 `columns` tokens of y, of which a warp has `strips` strips. gridDim.y = 1: it takes all
// slices in turn. gridDim.y = slices: it takes one; the last block of a tile to end adds them, in the slices' order.
//
// x (rows of 128 bytes, halves swapped in odd ones, so that a warp's reads meet no bank twice; for two of four rows of 256 bytes, vectors
// turned by the row's number for the same reason) and weights (each lane's own
// vectors) come in `stages` stages, asked for stages - 1 tiles early.
template <u32 columns, u32 strips, u32 stages, typename Weights, typename O>
DEVICE void panel_product(const Weights& weights, u64 rows, const O& o, Partials partials) {
    using Own = Lane<strips, stages, Weights>;
    constexpr u32 STEP = STEP_K<Weights>;
    // Vectors of a token, and tokens that the block's threads copy at a time.
    constexpr u32 row = STEP / 8, at_once = THREADS / row;
    constexpr u32 width = 8 * columns, x_vectors = width * row;
    constexpr u32 stage_vectors = x_vectors + Own::VECTORS * WARPS;
    // Columns that are multiplied together: as many vectors of x are held at once.
    constexpr u32 together = columns < 4 ? columns : columns < 16 ? 4 : 2;
    Shared shared;
    uint4* ring = shared.take<uint4>(stages * stage_vectors);
    u32* before = shared.take<u32>(1);
    u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP, g = lane / 4, q = lane % 4;
    // All slices, or one.
    u32 parts = gridDim.y, own_slices = parts > 1 ? 1 : o.slices();
    // What is added up so far, where shared memory is short in the buffer of sums.
    float* totals = nullptr;
    if (own_slices > 1) {
        constexpr u32 elements = strips * columns * 4 * THREADS;
        totals = partials.sums ? (float*)partials.sums + (u64)blockIdx.x * elements : shared.take<float>(elements);
        totals += thread;
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
    u64 first_strip = ((u64)row_block * WARPS + warp) * strips;

    u32 slice = blockIdx.y * own_slices, end_slice = slice + own_slices;
    u32 tile = o.tile_of(weights.across, slice), end = o.tile_of(weights.across, end_slice);

    Own own(weights, first_strip, rows, tile, end);

    // A thread copies one vector of every `at_once` tokens.
    constexpr u32 x_copies = (x_vectors + THREADS - 1) / THREADS;
    u32 x_token = thread / row;
    u32 x_place = opaque(x_token * row + (thread % row ^ (Weights::SPARSE ? x_token % 8 : x_token % 2 * 4)));
    // Tokens that there are from the thread's first one on.
    u32 x_room = first_token + x_token < o.tokens ? o.tokens - first_token - x_token : 0;
    const u16* x_from = o.x + (first_token + x_token) * (u64)o.stride + thread % row * 8 + tile * STEP;
    u64 x_apart = at_once * (u64)o.stride;
    // Elements of a row from the thread's next vector on: for two of four the last tile may have some past its end.
    i32 x_left = (i32)(o.stride - tile * STEP - thread % row * 8);
    // Tokens from all over: each from where it lies.
    const u16* x_each[x_copies];
    if constexpr (!O::IN_A_ROW) {
#pragma unroll
        for (u32 i = 0; i < x_copies; i++) {
            u32 token = min(first_token + x_token + at_once * i, o.tokens - 1);
            x_each[i] = o.x_of(token) + thread % row * 8 + tile * STEP;
        }
    }
#pragma unroll
    for (u32 i = 0; i < x_copies; i++) {
        if (x_token + at_once * i < width && at_once * i >= x_room) {
            for (u32 slot = 0; slot < stages; slot++) {
                ring[slot * stage_vectors + THREADS * i + x_place] = make_uint4(0, 0, 0, 0);
            }
        }
    }
    auto ask_x = [&](uint4* stage) {
        const u16* from = x_from;
#pragma unroll
        for (u32 i = 0; i < x_copies; i++) {
            if constexpr (!O::IN_A_ROW) {
                from = x_each[i];
                x_each[i] += STEP;
            }
            if (x_token + at_once * i < width && at_once * i < x_room) {
                uint4* to = stage + THREADS * i + x_place;
                if constexpr (Weights::SPARSE) {
                    cp_async16_or_zeros(to, from, x_left > 0);
                } else {
                    cp_async16(to, from);
                }
            }
            if constexpr (O::IN_A_ROW) from += x_apart;
        }
        if constexpr (O::IN_A_ROW) x_from += STEP;
        x_left -= STEP;
    };
    // The stage that is read and the one that all have left; from a stage's start to the lane's weights.
    u32 stage = 0, free = (stages - 1) * stage_vectors;
    u32 to_weights = opaque(x_vectors + warp * Own::VECTORS + lane);
#pragma unroll
    for (u32 i = 0; i + 1 < stages; i++) {
        if (i < own.left) {
            own.ask_weights(ring, to_weights + i * stage_vectors);
            ask_x(ring + i * stage_vectors);
        }
        if (i + 2 < stages) cp_async_commit();
    }
    own.start(ring, to_weights, stage_vectors);
    cp_async_commit();
    float sums[strips][columns][4] = {};

    // A lane's vectors of the halves of its first token; for two of four the row that it names of the first quarter.
    u32 x_lower = opaque(Weights::SPARSE ? lane % 8 * row + (lane / 8 ^ lane % 8) : g * row + (q ^ g % 2 * 4));
    for (; slice < end_slice; slice++) {
        u32 slice_end = o.tile_of(weights.across, slice + 1);
        for (; tile < slice_end; tile++) {
            cp_async_wait<(int)stages - 2>();
            __syncthreads();
            if (own.left >= stages) ask_x(ring + free);
            own.ask_ahead(ring, free + to_weights);
            // Empty groups keep the count.
            cp_async_commit();
            const uint4 *lower = ring + stage + x_lower, *upper = ring + stage + (x_lower ^ 4);
            typename Weights::Piece w[strips][Weights::PIECES];
            own.decode(w, ring, stage + to_weights);
#pragma unroll
            for (u32 part = 0; part < STEP / 32; part++) {
#pragma unroll
                for (u32 c = 0; c < columns; c += together) {
                    uint4 x[together];
#pragma unroll
                    for (u32 i = 0; i < together; i++) {
                        const uint4* from = (part % 2 ? upper : lower) + part / 2 * 8 + (c + i) * 8 * row;
                        if constexpr (Weights::SPARSE) {
                            x[i] = load_matrices(from);
                        } else {
                            x[i] = *from;
                        }
                    }
                    multiply_half(sums, w, part, c, x);
                }
            }
            own.advance();
            free = stage;
            stage = stage == (stages - 1) * stage_vectors ? 0 : stage + stage_vectors;
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
        switch (parts) {
            case 2: add_parts<2>(sums, tile_sums); break;
            case 4: add_parts<4>(sums, tile_sums); break;
            default: add_parts<8>(sums, tile_sums); break;
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
    KERNEL(1, 1, 4) KERNEL(1, 1, 8) KERNEL(1, 2, 4) KERNEL(2, 1, 4) KERNEL(2, 1, 8) KERNEL(2, 2, 4) KERNEL(4, 1, 4) \
    KERNEL(4, 2, 3) KERNEL(8, 2, 3)
#define PANEL_VARIANTS(KERNEL)                                                                                      \
    KERNEL(2, 1, 4) KERNEL(4, 1, 4) KERNEL(4, 2, 3) KERNEL(8, 1, 4) KERNEL(8, 2, 3) KERNEL(16, 1, 3) KERNEL(16, 2, 3) \
    KERNEL(16, 2, 2)
// Of weights in several pieces, which take more room and registers.
#define STREAM_VARIANTS_OF_PIECES(KERNEL) KERNEL(1, 1, 3) KERNEL(2, 1, 3) KERNEL(4, 1, 3)
#define PANEL_VARIANTS_OF_PIECES(KERNEL) KERNEL(4, 1, 2) KERNEL(8, 1, 2)

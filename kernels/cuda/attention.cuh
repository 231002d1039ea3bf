// Self-attention with grouped queries, a cache and windows (Vaswani et al., section 3.2; Ainslie et al., GQA), by
// tensor cores over tiles of the past (Dao, FlashAttention-2, section 3.1).
//
//   rows:  token t and query head h of one key-value head are row t group + h; a warp's `mma` takes sixteen rows
//   tiles: 64 positions, counted from position 0
//
//   a tile:   scores = q K^T -> maximum m, p = e^(scores - m) in BF16 -> sums = p [V 1]    the last sum is that of p
//   capped:  where the model says so a score s is c tanh(s / c) before that (Gemma 2)
//   joined:   M' = max(M, m),  S = S e^(M - M') + sums e^(m - M')  tile by tile, ascending;  x = S / last S
//
// Two forms give the same bits: attend_rows walks over the tiles with its rows, for many tokens; attend_tile takes one
// tile and leaves m and sums for join_tiles, so that few tokens keep the whole GPU busy. A tile that a row does not
// see changes none of its bits, so a result depends on neither the grid, nor the form, nor how a sequence was cut.
//
// Orders of additions. A score starts at zero and takes features by 32, of which the first `mma` takes 8 q + {0, 1}
// for q = 0..3 and then the same with {2, 3}, the second {4, 5} and then {6, 7}; queries are scaled, then rounded to
// BF16. A tile's sum takes positions in the same order. A join is one fused multiply-add: S e^(M - M') is added to the
// rounded product.
//
// Where keys and values lie is a type of its own, Past: it puts those of a tile into shared memory in BF16, keys and values from
// position `end` on and features beyond the head as zeros, and closes a group of copies (cp_async_commit) each time.
#pragma once
#include "cache.cuh"
#include "warp.cuh"

constexpr u32 TILE = 64;
// Rows of an `mma`.
constexpr u32 ROWS = 16;
constexpr u32 TILE_THREADS = 128;
constexpr u32 JOIN_THREADS = 128;
// Two ones in BF16.
constexpr u32 ONES = 0x3f803f80u;

DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }

// Heads and positions of a sequence in a launch, which has `tokens` tokens of each of several sequences.
struct Step {
    u32 start, tokens, heads, group, head_dim, window;
    u64 capacity;
    // What scores are held below, softly; 0: nothing.
    float cap;

    DEVICE_METHOD u64 rows() const { return (u64)tokens * group; }
    // The first and the last position that a row sees.
    DEVICE_METHOD u64 last(u64 row) const { return start + row / group; }
    DEVICE_METHOD u64 first(u64 row) const {
        u64 end = last(row) + 1;
        return window != 0 && end > window ? end - window : 0;
    }
};

// How keys and values of a tile lie in shared memory: rows are padded so that eight lanes' vectors lie in eight different
// groups of four banks.
template <u32 dim>
struct Layout {
    // A key. An odd multiple of 64 bytes.
    static constexpr u32 key_stride = dim / 32 % 2 ? dim : dim + 32;
    // Eight positions of all features.
    static constexpr u32 value_stride = 8 * dim + 16;
    static constexpr u32 keys = TILE * key_stride;
    static constexpr u32 values = TILE / 8 * value_stride;
};

// Eight features of a query, scaled, in BF16; those from `count` on are zeros. `vectors`: whether all are there, and aligned.
DEVICE uint4 load_query(const float* from, u32 count, bool vectors, float scale) {
    float4 low, high;
    if (vectors) {
        low = *(const float4*)from, high = *(const float4*)(from + 4);
    } else {
        float x[8];
#pragma unroll
        for (u32 i = 0; i < 8; i++) x[i] = i < count ? from[i] : 0.0f;
        low = make_float4(x[0], x[1], x[2], x[3]), high = make_float4(x[4], x[5], x[6], x[7]);
    }
    return make_uint4(floats_to_bf16x2(__fmul_rn(low.x, scale), __fmul_rn(low.y, scale)),
                      floats_to_bf16x2(__fmul_rn(low.z, scale), __fmul_rn(low.w, scale)),
                      floats_to_bf16x2(__fmul_rn(high.x, scale), __fmul_rn(high.y, scale)),
                      floats_to_bf16x2(__fmul_rn(high.z, scale), __fmul_rn(high.w, scale)));
}

// The fragments of sixteen queries from row `first` on, of 32 features from 32 `block` on.
DEVICE void load_queries(u32 (&low)[4], u32 (&high)[4], const float* queries, u32 stride, const Step& s, u64 first,
                         u32 kv_head, u32 block, float scale) {
    u32 lane = threadIdx.x % WARP, feature = 32 * block + 8 * (lane % 4);
    uint4 vectors[2];
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        u64 row = first + lane / 4 + 8 * i;
        vectors[i] = make_uint4(0, 0, 0, 0);
        if (row < s.rows() && feature < s.head_dim) {
            u64 head = (u64)kv_head * s.group + row % s.group;
            const float* from = queries + row / s.group * stride + head * s.head_dim + feature;
            vectors[i] = load_query(from, s.head_dim - feature, s.head_dim % 8 == 0 && stride % 4 == 0, scale);
        }
    }
    low[0] = vectors[0].x, low[1] = vectors[1].x, low[2] = vectors[0].y, low[3] = vectors[1].y;
    high[0] = vectors[0].z, high[1] = vectors[1].z, high[2] = vectors[0].w, high[3] = vectors[1].w;
}

// Column c of a tile's `mma` number n is key 32 (n / 4) + 8 (c / 2) + 2 (n % 4) + c % 2. So a lane's probabilities of four
// `mma` are of eight consecutive positions: those of one vector of values.
DEVICE u32 position_of(u32 n, u32 column) { return n / 4 * 32 + column / 2 * 8 + n % 4 * 2 + column % 2; }

// What two rows of a lane, g and g + 8, see of positions.
struct Sight {
    u32 first[2], last[2];

    DEVICE_METHOD void look(const Step& s, u64 row) {
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            bool is = row + 8 * i < s.rows();
            // Rows beyond the last one see nothing.
            first[i] = is ? (u32)s.first(row + 8 * i) : 1;
            last[i] = is ? (u32)s.last(row + 8 * i) : 0;
        }
    }
    // Whether row i sees a position of the tile, and all of them.
    DEVICE_METHOD bool sees(u32 i, u32 base) const {
        return first[i] <= last[i] && last[i] >= base && first[i] < base + TILE;
    }
    DEVICE_METHOD bool sees_all(u32 i, u32 base) const { return first[i] <= base && last[i] >= base + TILE - 1; }
    // Hides the scores of number n that the rows do not see.
    DEVICE_METHOD void hide(float (&scores)[4], u32 n, u32 base) const {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 at = base + position_of(n, threadIdx.x % 4 * 2 + i % 2);
            if (at < first[i / 2] || at > last[i / 2]) scores[i] = minus_infinity();
        }
    }
};

// The larger one; the first where the second is a NaN.
DEVICE float larger(float a, float b) { return b > a ? b : a; }

// The largest of the four lanes that share a row.
DEVICE float row_max(float x) {
    x = larger(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return larger(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

// e^(score - top); a row that sees nothing has only zeros.
DEVICE float probability(float score, float top) {
    return exponential(__fsub_rn(score, top == minus_infinity() ? 0.0f : top));
}

// What the sums so far, and what a tile's are multiplied by when they are joined.
DEVICE float keeps(float before, float now) { return before == now ? 1.0f : exponential(__fsub_rn(before, now)); }
DEVICE float brings(float top, float now) { return top == minus_infinity() ? 0.0f : keeps(top, now); }
DEVICE float join(float sum, float kept, float other, float brought) {
    return __fmaf_rn(sum, kept, __fmul_rn(other, brought));
}

// The scores of `count` columns of eight from number `first` on. `query(i)` gives fragment i.
template <u32 dim, u32 count, typename Query>
DEVICE void multiply_keys(float (&scores)[count][4], const Query& query, const u16* keys, u32 first) {
    u32 lane = threadIdx.x % WARP;
#pragma unroll
    for (u32 block = 0; block < dim / 32; block++) {
        u32 low[4], high[4];
        query.get(low, 2 * block);
        query.get(high, 2 * block + 1);
#pragma unroll
        for (u32 n = 0; n < count; n++) {
            u32 key = position_of(first + n, lane / 4);
            uint4 vector = *(const uint4*)(keys + key * Layout<dim>::key_stride + 32 * block + 8 * (lane % 4));
            mma_bf16(scores[n], low, vector.x, vector.y);
            mma_bf16(scores[n], high, vector.z, vector.w);
        }
    }
}

template <u32 count>
DEVICE void cap_scores(float (&scores)[count][4], float cap) {
    if (cap == 0.0f) return;
#pragma unroll
    for (u32 n = 0; n < count; n++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) scores[n][i] = soft_capped(scores[n][i], cap);
    }
}

// sums = p times eight features from 8 n on.
template <u32 dim>
DEVICE void multiply_values(float (&sums)[4], const u32 (&p)[4][4], const u16* values, u32 n) {
    u32 lane = threadIdx.x % WARP;
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        u32 eight = 4 * half + lane % 4;
        uint4 vector = *(const uint4*)(values + eight * Layout<dim>::value_stride + 8 * (8 * n + lane / 4));
        mma_bf16(sums, p[2 * half], vector.x, vector.y);
        mma_bf16(sums, p[2 * half + 1], vector.z, vector.w);
    }
}

// sums = p times ones.
DEVICE void add_up(float (&sums)[4], const u32 (&p)[4][4]) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) mma_bf16(sums, p[i], ONES, ONES);
}

// Fragments of queries in registers.
template <u32 dim>
struct Registers {
    u32 words[dim / 16][4];
    DEVICE_METHOD void put(const u32 (&from)[4], u32 i) {
#pragma unroll
        for (u32 j = 0; j < 4; j++) words[i][j] = from[j];
    }
    DEVICE_METHOD void get(u32 (&to)[4], u32 i) const {
#pragma unroll
        for (u32 j = 0; j < 4; j++) to[j] = words[i][j];
    }
};

// Fragments of queries in shared memory, where registers are short: each thread reads what it wrote.
struct Parked {
    uint4* of_thread;
    DEVICE_METHOD void put(const u32 (&from)[4], u32 i) const {
        of_thread[i * WARP] = make_uint4(from[0], from[1], from[2], from[3]);
    }
    DEVICE_METHOD void get(u32 (&to)[4], u32 i) const {
        uint4 v = of_thread[i * WARP];
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    }
};

template <u32 dim, typename Query>
DEVICE void prepare(Query& query, const float* queries, u32 stride, const Step& s, u64 first, u32 kv_head,
                    float scale) {
#pragma unroll
    for (u32 block = 0; block < dim / 32; block++) {
        u32 low[4], high[4];
        load_queries(low, high, queries, stride, s, first, kv_head, block, scale);
        query.put(low, 2 * block);
        query.put(high, 2 * block + 1);
    }
}

// ---- many tokens -------------------------------------------------------------------------------------------------

// x[token] in BF16: heads side by side, rows of `ld` that end in zeros. Block (b, z) takes sixteen rows a warp of
// key-value head z; the last rows, which see most, come first. Keys are copied while values are multiplied, and the
// other way round.
template <u32 dim, u32 warps, typename Query, typename Past>
DEVICE void attend_rows(Query& query, Shared& shared, const float* queries, u32 stride, const Past& past, const Step& s,
                        float scale, u16* x, u32 ld) {
    u16* key_tile = shared.take<u16>(Layout<dim>::keys);
    u16* value_tile = shared.take<u16>(Layout<dim>::values);
    u32 lane = threadIdx.x % WARP, kv_head = blockIdx.y;
    u64 block_row = (u64)(gridDim.x - 1 - blockIdx.x) * ROWS * warps;
    u64 first_row = block_row + threadIdx.x / WARP * ROWS;
    u64 last_row = min(block_row + ROWS * warps, s.rows()) - 1;
    u64 end = min(s.last(last_row) + 1, s.capacity), tile = s.first(block_row) / TILE;
    prepare<dim>(query, queries, stride, s, first_row, kv_head, scale);
    Sight sight;
    sight.look(s, first_row + lane / 4);

    float sums[dim / 8][4] = {};
    float totals[2] = {}, tops[2] = {minus_infinity(), minus_infinity()};
    past.template stage_keys<dim>(key_tile, s, kv_head, tile * TILE, end);
    cp_async_wait<0>();
    __syncthreads();
    past.template stage_values<dim>(value_tile, s, kv_head, tile * TILE, end);
    for (; tile * TILE < end; tile++) {
        u32 base = (u32)(tile * TILE);
        bool seen = __any_sync(ALL_LANES, sight.sees(0, base) || sight.sees(1, base));
        u32 p[4][4];
        float kept[2], brought[2];
        if (seen) {
            float scores[8][4] = {};
            multiply_keys<dim>(scores, query, key_tile, 0);
            cap_scores(scores, s.cap);
            if (!sight.sees_all(0, base) || !sight.sees_all(1, base)) {
#pragma unroll
                for (u32 n = 0; n < 8; n++) sight.hide(scores[n], n, base);
            }
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                float top = minus_infinity();
#pragma unroll
                for (u32 n = 0; n < 8; n++) top = larger(larger(top, scores[n][2 * i]), scores[n][2 * i + 1]);
                top = row_max(top);
                float now = larger(tops[i], top);
                kept[i] = keeps(tops[i], now);
                brought[i] = brings(top, now);
                tops[i] = now;
#pragma unroll
                for (u32 n = 0; n < 8; n++) {
                    float low = probability(scores[n][2 * i], top), high = probability(scores[n][2 * i + 1], top);
                    p[n / 2][n % 2 * 2 + i] = floats_to_bf16x2(low, high);
                }
            }
        }
        bool more = (tile + 1) * TILE < end;
        cp_async_wait<0>();
        __syncthreads();
        if (more) past.template stage_keys<dim>(key_tile, s, kv_head, (tile + 1) * TILE, end);
        if (seen) {
#pragma unroll
            for (u32 n = 0; n < dim / 8; n++) {
                float of_tile[4] = {};
                multiply_values<dim>(of_tile, p, value_tile, n);
#pragma unroll
                for (u32 i = 0; i < 4; i++) sums[n][i] = join(sums[n][i], kept[i / 2], of_tile[i], brought[i / 2]);
            }
            float of_tile[4] = {};
            add_up(of_tile, p);
#pragma unroll
            for (u32 i = 0; i < 2; i++) totals[i] = join(totals[i], kept[i], of_tile[2 * i], brought[i]);
        }
        if (more) {
            cp_async_wait<0>();
            __syncthreads();
            past.template stage_values<dim>(value_tile, s, kv_head, (tile + 1) * TILE, end);
        }
    }

#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        u64 row = first_row + lane / 4 + 8 * i;
        if (row >= s.rows()) continue;
        u32 head = kv_head * s.group + (u32)(row % s.group);
        u16* to = x + row / s.group * ld;
#pragma unroll
        for (u32 n = 0; n < dim / 8; n++) {
            u32 feature = 8 * n + 2 * (lane % 4);
            if (feature >= s.head_dim) continue;
            u32 both =
                floats_to_bf16x2(__fdiv_rn(sums[n][2 * i], totals[i]), __fdiv_rn(sums[n][2 * i + 1], totals[i]));
            u16* at = to + head * s.head_dim + feature;
            if (s.head_dim % 2 == 0) {
                *(u32*)at = both;
            } else {
                at[0] = (u16)both;
                if (feature + 1 < s.head_dim) at[1] = (u16)(both >> 16);
            }
        }
        if (head + 1 < s.heads) continue;
        for (u32 j = s.heads * s.head_dim + lane % 4; j < ld; j += 4) to[j] = 0;
    }
}

// ---- few tokens --------------------------------------------------------------------------------------------------

// Block (tile, y, z) takes sixteen rows from 16 y on of key-value head z, of which each sequence has its own. Its warps share the tile's positions for the
// scores and the features for the sums. `sums`: F32 [tiles, tokens, heads, the cache's width], `scales`: [tiles, tokens, heads]
// pairs of the maximum and the sum of p; tiles that none of the sixteen rows sees are not written.
template <u32 dim, typename Past>
DEVICE void attend_tile(const float* queries, u32 stride, const Past& past, const Step& s, u32 kv_head, u64 before,
                        u64 all, float scale, float* sums, float2* scales) {
    Shared shared;
    u16* key_tile = shared.take<u16>(Layout<dim>::keys);
    u16* value_tile = shared.take<u16>(Layout<dim>::values);
    uint4* fragments = shared.take<uint4>(4 * WARP);
    float* of_warps = shared.take<float>(4 * ROWS);
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 tile = blockIdx.x, base = tile * TILE;
    u64 first_row = (u64)blockIdx.y * ROWS;
    u64 last_row = min(first_row + ROWS, s.rows()) - 1;
    u32 end = (u32)min(s.last(last_row) + 1, s.capacity);
    // The whole block leaves where none of its rows sees the tile.
    if (base >= end || base + TILE <= s.first(first_row)) return;
    past.template stage_keys<dim>(key_tile, s, kv_head, base, end);
    past.template stage_values<dim>(value_tile, s, kv_head, base, end);
    Registers<dim> query;
    prepare<dim>(query, queries, stride, s, first_row, kv_head, scale);
    Sight sight;
    sight.look(s, first_row + lane / 4);
    cp_async_wait<1>();
    __syncthreads();

    float scores[2][4] = {};
    multiply_keys<dim>(scores, query, key_tile, 2 * warp);
    cap_scores(scores, s.cap);
    float tops[2];
#pragma unroll
    for (u32 n = 0; n < 2; n++) sight.hide(scores[n], 2 * warp + n, base);
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        float top = minus_infinity();
#pragma unroll
        for (u32 n = 0; n < 2; n++) top = larger(larger(top, scores[n][2 * i]), scores[n][2 * i + 1]);
        top = row_max(top);
        if (lane % 4 == 0) of_warps[warp * ROWS + lane / 4 + 8 * i] = top;
    }
    __syncthreads();
    u32 words[2][2];
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        tops[i] = minus_infinity();
#pragma unroll
        for (u32 w = 0; w < 4; w++) tops[i] = larger(tops[i], of_warps[w * ROWS + lane / 4 + 8 * i]);
#pragma unroll
        for (u32 n = 0; n < 2; n++) {
            words[n][i] = floats_to_bf16x2(probability(scores[n][2 * i], tops[i]),
                                           probability(scores[n][2 * i + 1], tops[i]));
        }
    }
    // A warp's sixteen positions are one fragment.
    fragments[warp * WARP + lane] = make_uint4(words[0][0], words[0][1], words[1][0], words[1][1]);
    cp_async_wait<0>();
    __syncthreads();
    u32 p[4][4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        uint4 v = fragments[i * WARP + lane];
        p[i][0] = v.x, p[i][1] = v.y, p[i][2] = v.z, p[i][3] = v.w;
    }

    float totals[4] = {};
    add_up(totals, p);
    u64 slots[2];
    bool is[2];
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        u64 row = first_row + lane / 4 + 8 * i;
        is[i] = row < s.rows();
        slots[i] = (tile * all + before + row / s.group) * s.heads + (u64)kv_head * s.group + row % s.group;
        if (is[i] && threadIdx.x < WARP && lane % 4 == 0) scales[slots[i]] = make_float2(tops[i], totals[2 * i]);
    }
#pragma unroll
    for (u32 n = 0; n < dim / 32; n++) {
        float of_tile[4] = {};
        multiply_values<dim>(of_tile, p, value_tile, warp * (dim / 32) + n);
        u32 feature = 8 * (warp * (dim / 32) + n) + 2 * (lane % 4);
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            if (!is[i] || feature >= s.head_dim) continue;
            *(float2*)(sums + slots[i] * cache_width(s.head_dim) + feature) = make_float2(of_tile[2 * i], of_tile[2 * i + 1]);
        }
    }
}

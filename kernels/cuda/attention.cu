// Self-attention with grouped queries, a cache and windows (Vaswani et al., section 3.2; Ainslie et al., GQA), over chunks of
// the past (Dao, FlashAttention, section 3.1), so that one long sequence keeps the whole GPU busy.
//
//   a block = eight rows (token and query head of one key-value head) against one chunk of 256 positions
//   scores -> softmax of the chunk -> weighted sum of values, its maximum and sum; a second kernel joins the chunks
//
// Chunks are counted from position 0, so a result depends on neither the grid nor how a sequence was cut.
#include "warp.cuh"

constexpr u32 CHUNK = 256;
constexpr u32 ROWS = 8;
constexpr u32 THREADS = 256;
// Lanes that share a key.
constexpr u32 SHARING = 8;

// Positions that a row sees: first ..= last.
struct Seen {
    u64 first, last;
};
DEVICE Seen seen(u64 position, u32 window) {
    Seen s;
    s.last = position;
    s.first = window != 0 && position + 1 > window ? position + 1 - window : 0;
    return s;
}

// Row r of key-value head blockIdx.z is token r / group, query head z group + r % group; block (x, y, z) takes rows
// ROWS y .. of chunk x. Queries: F32, rows of `stride`. Keys and values: BF16 [kv_heads, capacity, head_dim]; head_dim is a
// multiple of 8, at most 256. `sums`: [chunks, tokens, heads, head_dim], `scales`: [chunks, tokens, heads] pairs of the
// maximum and the sum; chunks that a row does not see are not written.
//
// Orders of additions. Score: lane j of eight adds its products over vectors j, j + 8, ... of eight features with fused
// multiply-adds; then lanes 4, 2 and 1 apart. Sum of exponentials: lane by lane over positions lane, lane + 32, ..., then as
// warp.cuh says. Value: 256 / width threads a feature (width: head_dim rounded up to a power of two, at least 32) each take an
// equal run of the chunk in ascending order; then the runs are added in order.
extern "C" __global__ void __launch_bounds__(THREADS)
attend_chunk(const float* queries, u32 stride, const u16* keys, const u16* values, u64 capacity, const u32* position,
             u32 tokens, u32 heads, u32 group, u32 head_dim, u32 window, float scale, float* sums, float2* scales) {
    Shared shared;
    float* q = shared.take<float>(ROWS * head_dim);
    float* p = shared.take<float>(ROWS * CHUNK);
    float* partial = shared.take<float>(THREADS * ROWS);
    u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    u64 start = *position, chunk = blockIdx.x, base = chunk * CHUNK;
    u64 first_row = (u64)blockIdx.y * ROWS, rows = (u64)tokens * group;
    u64 last_row = min(first_row + ROWS, rows) - 1;
    // The whole block leaves where none of its rows sees the chunk.
    if (base > seen(start + last_row / group, window).last) return;
    if (base + CHUNK <= seen(start + first_row / group, window).first) return;
    for (u32 i = thread; i < ROWS * head_dim; i += THREADS) {
        u64 row = first_row + i / head_dim;
        float value = 0;
        if (row < rows) {
            u64 head = blockIdx.z * group + row % group;
            value = __fmul_rn(queries[row / group * stride + head * head_dim + i % head_dim], scale);
        }
        q[i] = value;
    }
    __syncthreads();

    u32 part = lane % SHARING, vectors = head_dim / 8;
    u64 end = min(base + CHUNK, seen(start + last_row / group, window).last + 1);
    for (u32 step = 0; step < CHUNK * SHARING / THREADS; step++) {
        u32 key = step * (THREADS / SHARING) + thread / SHARING;
        u64 at = base + key;
        float scores[ROWS] = {};
        if (at < end) {
            const uint4* vector = (const uint4*)(keys + ((u64)blockIdx.z * capacity + at) * head_dim);
            for (u32 v = part; v < vectors; v += SHARING) {
                uint4 eight = vector[v];
                u32 words[4] = {eight.x, eight.y, eight.z, eight.w};
                for (u32 r = 0; r < ROWS; r++) {
                    for (u32 w = 0; w < 4; w++) {
                        const float* of_row = q + r * head_dim + 8 * v + 2 * w;
                        scores[r] = __fmaf_rn(of_row[0], __uint_as_float(words[w] << 16), scores[r]);
                        scores[r] = __fmaf_rn(of_row[1], __uint_as_float(words[w] & 0xffff0000u), scores[r]);
                    }
                }
            }
        }
        for (u32 r = 0; r < ROWS; r++) {
            float score = scores[r];
            for (int distance = SHARING / 2; distance; distance /= 2) {
                score = __fadd_rn(score, __shfl_xor_sync(ALL_LANES, score, distance));
            }
            u64 row = first_row + r;
            Seen s = seen(start + row / group, window);
            bool visible = row < rows && at >= s.first && at <= s.last;
            if (part == r) p[r * CHUNK + key] = visible ? score : __uint_as_float(0xff800000u);
        }
    }
    __syncthreads();

    // A warp a row: the softmax of the chunk, not yet divided by its sum.
    float top = __uint_as_float(0xff800000u), sum = 0;
    float* mine = p + warp * CHUNK;
    for (u32 i = lane; i < CHUNK; i += WARP) top = mine[i] > top ? mine[i] : top;
    top = warp_max(top);
    for (u32 i = lane; i < CHUNK; i += WARP) {
        float e = mine[i] == __uint_as_float(0xff800000u) ? 0.0f : exponential(__fsub_rn(mine[i], top));
        mine[i] = e;
        sum = __fadd_rn(sum, e);
    }
    sum = warp_sum(sum);
    u64 row = first_row + warp;
    u64 slot = (chunk * tokens + row / group) * heads + blockIdx.z * group + row % group;
    if (lane == 0 && row < rows) scales[slot] = make_float2(top, sum);
    __syncthreads();

    u32 width = WARP;
    while (width < head_dim) width *= 2;
    u32 runs = THREADS / width, feature = thread % width, run = thread / width;
    float sum_of_row[ROWS] = {};
    if (feature < head_dim) {
        u32 length = CHUNK / runs;
        for (u32 i = run * length; i < (run + 1) * length && base + i < end; i++) {
            float value = bf16_to_float(values[((u64)blockIdx.z * capacity + base + i) * head_dim + feature]);
            for (u32 r = 0; r < ROWS; r++) sum_of_row[r] = __fmaf_rn(p[r * CHUNK + i], value, sum_of_row[r]);
        }
    }
    for (u32 r = 0; r < ROWS; r++) partial[(run * ROWS + r) * width + feature] = sum_of_row[r];
    __syncthreads();
    for (u32 i = thread; i < ROWS * head_dim; i += THREADS) {
        u32 r = i / head_dim;
        u64 of_row = first_row + r;
        if (of_row >= rows) continue;
        float total = partial[r * width + i % head_dim];
        for (u32 j = 1; j < runs; j++) total = __fadd_rn(total, partial[(j * ROWS + r) * width + i % head_dim]);
        u64 to = (chunk * tokens + of_row / group) * heads + blockIdx.z * group + of_row % group;
        sums[to * head_dim + i % head_dim] = total;
    }
}

// x[token] in BF16: heads side by side, rows of `ld` that end in zeros. One block a token. Chunks are joined in ascending
// order: each is weighted by e^(its maximum - the largest), products added with fused multiply-adds.
extern "C" __global__ void __launch_bounds__(256)
join_chunks(const float* sums, const float2* scales, const u32* position, u32 tokens, u32 heads, u32 head_dim, u32 window,
            u16* x, u32 ld) {
    u64 token = blockIdx.x;
    Seen s = seen(*position + token, window);
    u64 first = s.first / CHUNK, last = s.last / CHUNK;
    for (u32 i = threadIdx.x; i < ld; i += blockDim.x) {
        float y = 0;
        if (i < heads * head_dim) {
            u32 head = i / head_dim;
            float top = __uint_as_float(0xff800000u);
            for (u64 chunk = first; chunk <= last; chunk++) {
                float other = scales[(chunk * tokens + token) * heads + head].x;
                top = other > top ? other : top;
            }
            float total = 0;
            for (u64 chunk = first; chunk <= last; chunk++) {
                u64 slot = (chunk * tokens + token) * heads + head;
                float weight = exponential(__fsub_rn(scales[slot].x, top));
                y = __fmaf_rn(sums[slot * head_dim + i % head_dim], weight, y);
                total = __fmaf_rn(scales[slot].y, weight, total);
            }
            y = __fdiv_rn(y, total);
        }
        x[token * ld + i] = float_to_bf16(y);
    }
}

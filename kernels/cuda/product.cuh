// Matrix products with weights of any encoding: one tile loop, one order of additions.
//
//   y[token][n] = sum over k of W[n][k] x[token][k]      W in tiles of 16 rows x 64 k, x in BF16, sums in F32
//
// The order, the same for every encoding and every shape of block: the T tiles of a row of tiles are cut into eight slices,
// slice s from tile s T / 8 on. A slice starts at zero and takes its tiles in turn; a tile is four `mma` in turn, of which number
// 2 h + p (half h, part p) takes k = 32 h + 8 q + 4 p + {0, 1} for q = 0..3 and then the same with {2, 3}. The slices are
// added in order, then the bias, then what y held.
#pragma once
#include "device.cuh"

constexpr u32 SLICES = 8;

// Weights of a tile that a lane 4 g + q holds: of half h and pair j (k = 32 h + 8 q + 2 j, + 1) rows g and g + 8.
struct Fragment {
    u32 low[2][4];
    u32 high[2][4];
};

// sums += the tile times 8 `columns` tokens; `x` points to the lane's vector of the tile's first token: row g, k 8 q.
template <int columns>
DEVICE void multiply_tile(float (&sums)[columns][4], const Fragment& w, const u16* x, u64 stride, u32 tokens) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int column = 0; column < columns; column++) {
            uint4 vector = make_uint4(0, 0, 0, 0);
            if (8 * column + threadIdx.x % WARP / 4 < tokens) {
                vector = *(const uint4*)(x + 8 * column * stride + 32 * half);
            }
            u32 first[4] = {w.low[half][0], w.high[half][0], w.low[half][1], w.high[half][1]};
            mma_bf16(sums[column], first, vector.x, vector.y);
            u32 second[4] = {w.low[half][2], w.high[half][2], w.low[half][3], w.high[half][3]};
            mma_bf16(sums[column], second, vector.z, vector.w);
        }
    }
}

// What a launch gives besides the weights.
struct Operands {
    const u16* x;
    u32 stride;
    u32 tokens;
    float* y;
    u64 y_stride;
    const float* bias;
    u32 adds;
};

// A block takes `strips` strips of 16 rows and 8 `columns` tokens; a warp one slice of one strip.
template <int columns, int strips, typename Weights>
DEVICE void product(const Weights& weights, u64 rows, u64 across, const Operands& o) {
    constexpr u32 width = 8 * columns;
    Shared shared;
    float* partial = shared.take<float>(strips * SLICES * 16 * width);
    u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP, g = lane / 4, q = lane % 4;
    u32 slice = warp % SLICES;
    u64 strip = (u64)blockIdx.x * strips + warp / SLICES;
    u32 first_token = blockIdx.y * width;
    u32 tokens = min(o.tokens - first_token, width);
    float sums[columns][4] = {};
    if (strip * 16 < rows) {
        u64 tile = across * slice / SLICES, end = across * (slice + 1) / SLICES;
        const u16* x = o.x + (first_token + g) * (u64)o.stride + 8 * q;
        if (tile < end) {
            Fragment next = weights.load(strip, tile, lane);
            for (; tile < end; tile++) {
                Fragment current = next;
                // The next weights are on their way while these are multiplied.
                if (tile + 1 < end) next = weights.load(strip, tile + 1, lane);
                multiply_tile<columns>(sums, current, x + tile * 64, o.stride, tokens);
            }
        }
    }
#pragma unroll
    for (int column = 0; column < columns; column++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 row = g + 8 * (i / 2), token = 8 * column + 2 * q + i % 2;
            partial[(warp * 16 + row) * width + token] = sums[column][i];
        }
    }
    __syncthreads();
    for (u32 i = thread; i < strips * 16 * width; i += blockDim.x) {
        // Neighbouring threads take neighbouring rows, which are neighbours in y.
        u32 row = i % 16, token = i / 16 % width, which = i / 16 / width;
        u64 n = ((u64)blockIdx.x * strips + which) * 16 + row;
        if (n >= rows || token >= tokens) continue;
        const float* from = partial + (which * SLICES * 16 + row) * width + token;
        float sum = from[0];
        for (u32 s = 1; s < SLICES; s++) sum = __fadd_rn(sum, from[s * 16 * width]);
        if (o.bias) sum = __fadd_rn(sum, o.bias[n]);
        float* to = o.y + (first_token + token) * o.y_stride + n;
        *to = o.adds ? __fadd_rn(*to, sum) : sum;
    }
}

// The shapes of block: tokens / 8, strips. KERNELS(c, s) makes one; the launcher knows the list.
#define SHAPES(KERNEL) KERNEL(1, 1) KERNEL(1, 2) KERNEL(1, 4) KERNEL(2, 1) KERNEL(2, 2) KERNEL(4, 1) KERNEL(4, 2) KERNEL(8, 1)

// The next token, and what must move on with it.
#include "device.cuh"

// ---- the likeliest token -----------------------------------------------------------------------------------------
//
// Two launches: each block finds the largest of its logits, then one block the largest of these. A logit and its id are one
// number, which is larger where the logit is and, of equals, where the id is lower: the order of comparisons does not matter.

constexpr u32 BEST_THREADS = 256;
// Logits of a block: a load of four for each thread, twice.
constexpr u32 BEST_LOGITS = 2048;

// A NaN is below everything; -0 is 0.
DEVICE u64 ranked(float x, u32 id) {
    u32 bits = __float_as_uint(__fadd_rn(x, 0.0f));
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0;
    return (u64)(bits >> 31 ? ~bits : bits | 0x80000000u) << 32 | (u32)~id;
}

// The largest of a block's, in its first thread.
DEVICE u64 largest(u64 best, u64* of_warps) {
    for (int distance = 16; distance; distance /= 2) best = max(best, __shfl_xor_sync(ALL_LANES, best, distance));
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = best;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (u32 warp = 1; warp < blockDim.x / WARP; warp++) best = max(best, of_warps[warp]);
    }
    return best;
}

// parts[row][block] = the best of the block's logits in that row: blockIdx.y is the row.
extern "C" __global__ void __launch_bounds__(BEST_THREADS) argmax_parts(const float* logits, u32 vocab, u64* parts) {
    let_later_begin();
    wait_for_earlier();
    logits += (u64)blockIdx.y * vocab, parts += (u64)blockIdx.y * gridDim.x;
    Shared shared;
    u64* of_warps = shared.take<u64>(BEST_THREADS / WARP);
    u32 first = blockIdx.x * BEST_LOGITS, end = min(vocab, first + BEST_LOGITS);
    u64 best = 0;
    if ((u64)logits % sizeof(float4) == 0 && end - first == BEST_LOGITS) {
#pragma unroll
        for (u32 i = first + 4 * threadIdx.x; i < first + BEST_LOGITS; i += 4 * BEST_THREADS) {
            float4 four = *(const float4*)(logits + i);
            best = max(best, max(max(ranked(four.x, i), ranked(four.y, i + 1)),
                                 max(ranked(four.z, i + 2), ranked(four.w, i + 3))));
        }
    } else {
        for (u32 i = first + threadIdx.x; i < end; i += BEST_THREADS) best = max(best, ranked(logits[i], i));
    }
    best = largest(best, of_warps);
    if (threadIdx.x == 0) parts[blockIdx.x] = best;
}

// ids[i] = the id of the largest logit of row i, of equals the lowest; 0 where its first logit is a NaN. One block a row.
extern "C" __global__ void __launch_bounds__(BEST_THREADS)
argmax(const float* logits, u32 vocab, const u64* parts, u32 count, u32* ids) {
    let_later_begin();
    wait_for_earlier();
    logits += (u64)blockIdx.x * vocab, parts += (u64)blockIdx.x * count, ids += blockIdx.x;
    Shared shared;
    u64* of_warps = shared.take<u64>(BEST_THREADS / WARP);
    u64 best = 0;
    for (u32 i = threadIdx.x; i < count; i += BEST_THREADS) best = max(best, parts[i]);
    best = largest(best, of_warps);
    if (threadIdx.x == 0) {
        float first = logits[0];
        ids[0] = first == first ? ~(u32)best : 0;
    }
}

// positions[i] += tokens for `count` sequences.
extern "C" __global__ void __launch_bounds__(128) advance(u32* positions, u32 count, u32 tokens) {
    let_later_begin();
    wait_for_earlier();
    u32 i = blockIdx.x * 128 + threadIdx.x;
    if (i < count) positions[i] += tokens;
}

// c tanh(l / c) of every logit, by the operations of the processor's decoder: the same bits.
extern "C" __global__ void __launch_bounds__(256) soft_cap(float* logits, u64 count, float cap) {
    let_later_begin();
    wait_for_earlier();
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    logits[i] = soft_capped(logits[i], cap);
}

#ifndef LLMPRESS_STEP

// ---- drawing -----------------------------------------------------------------------------------------------------
//
// A token is drawn among the likeliest ones (of equals the lower id comes first): the first top_k of them, of these the
// fewest that have the share top_p of the weight, of these one by its weight. All sums are of integers, so that no order of
// additions matters; nothing is sorted:
//
//   weight   floor(2^40 e^((logit - largest) / temperature))
//   find     the token at which a running sum (of ones, or of weights) passes a target: by the histogram of the first eight
//            bits of the logits, then of the next eight among those that begin alike, ... and by ids among equal logits
//
// A block adds up some tokens and then adds its sums to the histogram in global memory. The next launch reads it.

constexpr u32 DRAW_THREADS = 256;
// Tokens of a block: so few that sums of half weights fit 32 bits.
constexpr u32 DRAW_TOKENS = 2048;
constexpr u32 BINS = 256;
constexpr u32 LEVELS = 4;
// A weight of one is 2^40; its halves have 20 bits.
constexpr u32 HALF_BITS = 20;

// What is searched for, one after the other.
constexpr u32 BY_TOP_K = 0, BY_TOP_P = 1, BY_DRAW = 2, SEARCHES = 3;

// Floats in their order as integers: -0 below 0, NaNs below everything.
DEVICE u32 key_of(float x) {
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0;
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
DEVICE float float_of(u32 key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

DEVICE u64 weight_of(u32 key, u32 best, float temperature) {
    if (key == 0) return 0;
    float x = float_of(key), top = float_of(best);
    // Infinities have no difference.
    if (x == top) return 1ull << (2 * HALF_BITS);
    return (u64)__fmul_rn(exponential(__fdiv_rn(__fsub_rn(x, top), temperature)), 1099511627776.0f);
}

// A search after some levels: `prefix` are the first bits of the logit it leads to; `target` is what is left of the sum to
// pass, `before` the weight of all tokens with larger first bits.
struct Search {
    u64 prefix, target, before;
};

// Counts and weights of tokens by eight bits of their keys.
struct Histogram {
    u64 counts[BINS];
    u64 weights[BINS];
};

// The workspace, all zeros at first. Level 0 is the same for all searches.
struct Drawing {
    u64 best;
    Search searches[SEARCHES][LEVELS];
    Histogram first;
    Histogram others[SEARCHES][LEVELS - 1];

    DEVICE_METHOD const Histogram& histogram(u32 search, u32 level) const {
        return level == 0 ? first : others[search][level - 1];
    }
};

// How tokens are drawn.
struct Limits {
    u32 vocab, top_k;
    float temperature, top_p;
    u64 draw;
};

// Shared memory of a block that looks into histograms.
struct Looking {
    u64* of_warps;
    Search* found;
    u64* total;

    DEVICE_METHOD void take(Shared& shared) {
        of_warps = shared.take<u64>(2 * DRAW_THREADS / WARP);
        found = shared.take<Search>(1);
        total = shared.take<u64>(1);
    }
};

// The sum up to this thread, itself included.
DEVICE u64 running_sum(u64 x, u64* of_warps) {
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (u32 distance = 1; distance < WARP; distance *= 2) {
        u64 other = __shfl_up_sync(ALL_LANES, x, distance);
        if (lane >= distance) x += other;
    }
    if (lane == WARP - 1) of_warps[warp] = x;
    __syncthreads();
    for (u32 w = 0; w < warp; w++) x += of_warps[w];
    return x;
}

// Takes a search one level further, by the whole block.
DEVICE Search narrow(Search s, const Histogram& h, bool by_count, const Looking& l) {
    u32 bin = BINS - 1 - threadIdx.x;
    u64 count = h.counts[bin], weight = h.weights[bin];
    if (threadIdx.x == 0) *l.found = {s.prefix << 8, 0, s.before};
    u64 counts = running_sum(count, l.of_warps), weights = running_sum(weight, l.of_warps + DRAW_THREADS / WARP);
    u64 sum = by_count ? counts : weights, own = by_count ? count : weight;
    if (sum > s.target && sum - own <= s.target) {
        *l.found = {s.prefix << 8 | bin, s.target - (sum - own), s.before + (weights - weight)};
    }
    __syncthreads();
    Search next = *l.found;
    __syncthreads();
    return next;
}

// The weight of all tokens up to the one that a finished search leads to.
DEVICE u64 weight_up_to(const Search& s, bool by_count, u64 weight) {
    return s.before + (by_count ? s.target + 1 : weight == 0 ? 0 : s.target / weight + 1) * weight;
}

// The high half of a product.
DEVICE u64 multiply_high(u64 a, u64 b) {
    u64 al = a & 0xffffffffu, ah = a >> 32, bl = b & 0xffffffffu, bh = b >> 32;
    u64 middle = ah * bl + ((al * bl) >> 32);
    return ah * bh + (middle >> 32) + (((middle & 0xffffffffu) + al * bh) >> 32);
}

// The search `which` before level 1, from those that are finished before it.
DEVICE Search begin(const Drawing& d, u32 which, const Limits& limits, const Looking& l) {
    if (which == BY_TOP_K) return {0, limits.top_k - 1, 0};
    bool by_top_k = limits.top_k != 0 && limits.top_k < limits.vocab, by_top_p = limits.top_p < 1.0f;
    u64 total;
    if ((which == BY_DRAW && by_top_p) || by_top_k) {
        u32 before = which == BY_DRAW && by_top_p ? BY_TOP_P : BY_TOP_K;
        bool by_count = before == BY_TOP_K;
        Search s = narrow(d.searches[before][LEVELS - 1], d.others[before][LEVELS - 2], by_count, l);
        total = weight_up_to(s, by_count, weight_of((u32)s.prefix, (u32)d.best, limits.temperature));
    } else {
        u64 sum = running_sum(d.first.weights[threadIdx.x], l.of_warps);
        if (threadIdx.x == BINS - 1) *l.total = sum;
        __syncthreads();
        total = *l.total;
        __syncthreads();
    }
    if (which == BY_DRAW) return {0, multiply_high(limits.draw, total), 0};
    // The share in 32 bits, which a top_p below 1 fits.
    u64 share = (u64)__fmul_rn(limits.top_p, 4294967296.0f);
    u64 reached = (total >> 32) * share + (((total & 0xffffffffu) * share) >> 32);
    return {0, reached == 0 ? 0 : reached - 1, 0};
}

DEVICE Search search_at(const Drawing& d, u32 which, u32 level, const Limits& limits, const Looking& l) {
    Search s = level == 1 ? begin(d, which, limits, l) : d.searches[which][level - 1];
    return narrow(s, d.histogram(which, level - 1), which == BY_TOP_K, l);
}

// Clears the workspace. One block.
extern "C" __global__ void __launch_bounds__(1024) draw_clear(u64* workspace) {
    for (u32 i = threadIdx.x; i < sizeof(Drawing) / 8; i += blockDim.x) workspace[i] = 0;
}

// The key of the largest logit.
extern "C" __global__ void __launch_bounds__(DRAW_THREADS) draw_best(const float* logits, u32 vocab, u64* workspace) {
    u32 best = 0, end = min(vocab, (blockIdx.x + 1) * DRAW_TOKENS);
    for (u32 i = blockIdx.x * DRAW_TOKENS + threadIdx.x; i < end; i += DRAW_THREADS) best = max(best, key_of(logits[i]));
    for (int distance = 16; distance; distance /= 2) best = max(best, __shfl_xor_sync(ALL_LANES, best, distance));
    if (threadIdx.x % WARP == 0) atomicMax(&((Drawing*)workspace)->best, (u64)best);
}

// The histogram of a level of a search: of the tokens that begin as the levels before it found.
extern "C" __global__ void __launch_bounds__(DRAW_THREADS)
draw_count(const float* logits, u32 vocab, float temperature, u32 top_k, float top_p, const u64* draw, u32 which, u32 level,
           u64* workspace) {
    Shared shared;
    Looking looking;
    looking.take(shared);
    u32* counts = shared.take<u32>(BINS);
    u32* low = shared.take<u32>(BINS);
    u32* high = shared.take<u32>(BINS);
    Drawing& d = *(Drawing*)workspace;
    Limits limits = {vocab, top_k, temperature, top_p, *draw};
    counts[threadIdx.x] = low[threadIdx.x] = high[threadIdx.x] = 0;
    u64 prefix = 0;
    if (level != 0) {
        Search s = search_at(d, which, level, limits, looking);
        if (blockIdx.x == 0 && threadIdx.x == 0) d.searches[which][level] = s;
        prefix = s.prefix;
    }
    __syncthreads();
    u32 best = (u32)d.best, end = min(vocab, (blockIdx.x + 1) * DRAW_TOKENS);
    for (u32 i = blockIdx.x * DRAW_TOKENS + threadIdx.x; i < end; i += DRAW_THREADS) {
        u32 key = key_of(logits[i]);
        if ((u64)key >> (32 - 8 * level) != prefix) continue;
        u32 bin = key >> (24 - 8 * level) & (BINS - 1);
        u64 weight = weight_of(key, best, temperature);
        atomicAdd(counts + bin, 1);
        atomicAdd(low + bin, (u32)(weight & ((1u << HALF_BITS) - 1)));
        atomicAdd(high + bin, (u32)(weight >> HALF_BITS));
    }
    __syncthreads();
    Histogram& h = level == 0 ? d.first : d.others[which][level - 1];
    u32 bin = threadIdx.x;
    if (counts[bin] == 0) return;
    atomicAdd(h.counts + bin, (u64)counts[bin]);
    atomicAdd(h.weights + bin, ((u64)high[bin] << HALF_BITS) + low[bin]);
}

// ids[0] = the token that the last search leads to; 0 where all logits are NaNs. One block, each warp with a run of tokens.
extern "C" __global__ void __launch_bounds__(DRAW_THREADS)
draw_pick(const float* logits, u32 vocab, float temperature, u32 top_k, float top_p, const u64* draw, const u64* workspace,
          u32* ids) {
    Shared shared;
    Looking looking;
    looking.take(shared);
    u32* of_warps = shared.take<u32>(DRAW_THREADS / WARP);
    const Drawing& d = *(const Drawing*)workspace;
    Limits limits = {vocab, top_k, temperature, top_p, *draw};
    Search s = search_at(d, BY_DRAW, LEVELS, limits, looking);
    u32 wanted = (u32)s.prefix, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (d.best == 0) {
        if (threadIdx.x == 0) ids[0] = 0;
        return;
    }
    u64 weight = weight_of(wanted, (u32)d.best, temperature), index = weight == 0 ? 0 : s.target / weight;
    u32 run = (vocab + DRAW_THREADS - 1) / DRAW_THREADS * WARP, first = warp * run, end = min(vocab, first + run);
    u32 count = 0;
    for (u32 i = first; i < end; i += WARP) {
        count += __popc(__ballot_sync(ALL_LANES, i + lane < end && key_of(logits[i + lane]) == wanted));
    }
    if (lane == 0) of_warps[warp] = count;
    __syncthreads();
    u64 before = 0;
    for (u32 w = 0; w < warp; w++) before += of_warps[w];
    if (index < before || index >= before + count) return;
    for (u32 i = first; i < end; i += WARP) {
        bool equal = i + lane < end && key_of(logits[i + lane]) == wanted;
        u32 equals = __ballot_sync(ALL_LANES, equal);
        if (equal && before + __popc(equals & ((1u << lane) - 1)) == index) ids[0] = i + lane;
        before += __popc(equals);
    }
}
#endif

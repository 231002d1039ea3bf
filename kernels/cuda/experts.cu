// Experts (Fedus et al., Switch Transformers; Jiang et al., Mixtral): which ones a token goes through, the tokens of each, and
// what becomes of their outputs.
//
//   logits -> route_tokens -> choices with weights -> group_tokens -> slots by expert, jobs -> products -> combine_experts -> h
//
// Choice k of token t is slot t top_k + k; a token's choices are kept in the order of the experts' numbers.
#include "warp.cuh"

constexpr u32 ROUTE_WARPS = 4;
constexpr u32 GROUP_THREADS = 1024;

// Floats in the order that the processor sorts them by, from the lowest up.
DEVICE u32 order_of(float x) {
    u32 bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The softmax over all experts, of which a token takes the `top_k` largest (of equals the first), by the operations of the
// processor (model/src/mlp.rs): exponentials of the differences to the largest logit are added by ascending expert and multiplied by
// the sum's reciprocal. With `normalise` they are divided by the sum of those that were taken, added from the largest down. A warp
// a token; at most 1024 experts, 32 of which are taken.
extern "C" __global__ void __launch_bounds__(ROUTE_WARPS * WARP)
route_tokens(const float* logits, u32 tokens, u32 experts, u32 top_k, u32 normalise, u32* chosen, float* weights) {
    let_later_begin();
    wait_for_earlier();
    Shared shared;
    float* all = shared.take<float>(ROUTE_WARPS * experts);
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, token = blockIdx.x * ROUTE_WARPS + warp;
    // Whole warps leave; nothing below waits for the block.
    if (token >= tokens) return;
    float* p = all + warp * experts;
    const float* from = logits + (u64)token * experts;
    float top = __uint_as_float(0xff800000u), sum = 0;
    for (u32 i = lane; i < experts; i += WARP) top = from[i] > top ? from[i] : top;
    top = warp_max(top);
    for (u32 i = lane; i < experts; i += WARP) p[i] = exponential(__fsub_rn(from[i], top));
    __syncwarp();
    for (u32 i = 0; i < experts; i++) sum = __fadd_rn(sum, p[i]);
    float scale = __fdiv_rn(1.0f, sum);
    __syncwarp();
    for (u32 i = lane; i < experts; i += WARP) p[i] = __fmul_rn(p[i], scale);
    __syncwarp();
    // Bit n: the lane's expert number n was taken. Lane k keeps what was taken as number k.
    u32 taken = 0, own = 0;
    float own_weight = 0, total = 0;
    for (u32 k = 0; k < top_k; k++) {
        u32 best = 0, at = experts;
        for (u32 i = lane, n = 0; i < experts; i += WARP, n++) {
            u32 order = order_of(p[i]);
            if ((taken >> n & 1) == 0 && (at == experts || order > best)) best = order, at = i;
        }
        for (int distance = 16; distance; distance /= 2) {
            u32 other = __shfl_xor_sync(ALL_LANES, best, distance), other_at = __shfl_xor_sync(ALL_LANES, at, distance);
            bool better = at == experts || other > best || (other == best && other_at < at);
            if (other_at < experts && better) best = other, at = other_at;
        }
        if (at % WARP == lane) taken |= 1u << at / WARP;
        total = k == 0 ? p[at] : __fadd_rn(total, p[at]);
        if (lane == k) own = at, own_weight = p[at];
    }
    u32 place = 0;
    for (u32 k = 0; k < top_k; k++) place += __shfl_sync(ALL_LANES, own, k) < own;
    if (lane >= top_k) return;
    chosen[(u64)token * top_k + place] = own;
    weights[(u64)token * top_k + place] = normalise ? __fdiv_rn(own_weight, total) : own_weight;
}

// The sum of the threads before; `all` becomes the sum of all. `of_warps`: of each warp, and nobody else's until the next barrier.
DEVICE u32 sum_before(u32 x, u32* of_warps, u32& all) {
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, sum = x, before = 0;
    for (u32 distance = 1; distance < WARP; distance *= 2) {
        u32 below = __shfl_up_sync(ALL_LANES, sum, distance);
        if (lane >= distance) sum += below;
    }
    if (lane == WARP - 1) of_warps[warp] = sum;
    __syncthreads();
    all = 0;
    for (u32 w = 0; w < GROUP_THREADS / WARP; w++) {
        if (w == warp) before = all;
        all += of_warps[w];
    }
    return before + sum - x;
}

// slots: those of expert 0, ascending, then those of expert 1, ... jobs: up to `width` slots of an expert each, as (expert, the
// first's place among the slots, how many); those up to `most_jobs` that are not needed have none. counts: of each expert. One
// block; at most as many experts as threads.
extern "C" __global__ void __launch_bounds__(GROUP_THREADS)
group_tokens(const u32* chosen, u32 count, u32 experts, u32 width, u32 most_jobs, u32* slots, uint4* jobs, u32* counts) {
    let_later_begin();
    wait_for_earlier();
    Shared shared;
    u32* of_expert = shared.take<u32>(experts);
    u32* first_of = shared.take<u32>(experts);
    u32* of_warps = shared.take<u32>(GROUP_THREADS / WARP);
    u32* jobs_of_warps = shared.take<u32>(GROUP_THREADS / WARP);
    u32 thread = threadIdx.x, lane = thread % WARP, all, all_jobs;
    for (u32 i = thread; i < experts; i += GROUP_THREADS) of_expert[i] = 0;
    __syncthreads();
    for (u32 i = thread; i < count; i += GROUP_THREADS) atomicAdd(of_expert + chosen[i], 1);
    __syncthreads();
    u32 own = thread < experts ? of_expert[thread] : 0, own_jobs = (own + width - 1) / width;
    u32 first = sum_before(own, of_warps, all), first_job = sum_before(own_jobs, jobs_of_warps, all_jobs);
    if (thread < experts) {
        first_of[thread] = first;
        counts[thread] = own;
    }
    for (u32 i = 0; i < own_jobs; i++) {
        jobs[first_job + i] = make_uint4(thread, first + i * width, min(width, own - i * width), 0);
    }
    for (u32 i = all_jobs + thread; i < most_jobs; i += GROUP_THREADS) jobs[i] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    // A warp an expert.
    for (u32 expert = thread / WARP; expert < experts; expert += GROUP_THREADS / WARP) {
        if (of_expert[expert] == 0) continue;
        u32* to = slots + first_of[expert];
        for (u32 base = 0; base < count; base += WARP) {
            bool is = base + lane < count && chosen[base + lane] == expert;
            u32 those = __ballot_sync(ALL_LANES, is);
            if (is) to[__popc(those & ((1u << lane) - 1))] = base + lane;
            to += __popc(those);
        }
    }
}

// h[token] += the sum of weights[slot] * y[slot] over the token's slots, which starts at zero and takes one after the other;
// nothing is fused. One block a token and 256 features.
extern "C" __global__ void __launch_bounds__(256)
combine_experts(const float* y, const float* weights, u32 top_k, u32 hidden, float* h) {
    let_later_begin();
    wait_for_earlier();
    u64 token = blockIdx.y;
    u32 i = blockIdx.x * 256 + threadIdx.x;
    if (i >= hidden) return;
    float sum = 0;
    for (u32 k = 0; k < top_k; k++) {
        u64 slot = token * top_k + k;
        sum = __fadd_rn(sum, __fmul_rn(weights[slot], y[slot * hidden + i]));
    }
    h[token * hidden + i] = __fadd_rn(h[token * hidden + i], sum);
}

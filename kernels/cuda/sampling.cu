// The next token, and what must move on with it.
#include "device.cuh"

// The largest of two candidates; of equals the lower id. A NaN is never larger.
DEVICE void keep_larger(float& value, u32& id, float other, u32 other_id) {
    if (other > value || (other == value && other_id < id)) {
        value = other;
        id = other_id;
    }
}

// ids[0] = the id of the largest logit, of equals the lowest; 0 where the first logit is a NaN. One block.
extern "C" __global__ void __launch_bounds__(1024) argmax(const float* logits, u32 vocab, u32* ids) {
    Shared shared;
    float* values = shared.take<float>(WARP);
    u32* places = shared.take<u32>(WARP);
    float value = logits[0];
    u32 id = 0;
    for (u32 i = threadIdx.x; i < vocab; i += blockDim.x) keep_larger(value, id, logits[i], i);
    for (int distance = 16; distance; distance /= 2) {
        float other = __shfl_xor_sync(ALL_LANES, value, distance);
        u32 other_id = __shfl_xor_sync(ALL_LANES, id, distance);
        keep_larger(value, id, other, other_id);
    }
    if (threadIdx.x % WARP == 0) {
        values[threadIdx.x / WARP] = value;
        places[threadIdx.x / WARP] = id;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (u32 warp = 1; warp < blockDim.x / WARP; warp++) keep_larger(value, id, values[warp], places[warp]);
        ids[0] = id;
    }
}

// *position += tokens.
extern "C" __global__ void advance(u32* position, u32 tokens) { *position += tokens; }

// c tanh(l / c) of every logit, by the operations of the processor's decoder: the same bits.
extern "C" __global__ void __launch_bounds__(256) soft_cap(float* logits, u64 count, float cap) {
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    // tanh y = 1 - 2 / (e^2y + 1)
    float e = exponential(__fdiv_rn(__fmul_rn(2.0f, logits[i]), cap));
    logits[i] = __fmul_rn(cap, __fsub_rn(1.0f, __fdiv_rn(2.0f, __fadd_rn(e, 1.0f))));
}

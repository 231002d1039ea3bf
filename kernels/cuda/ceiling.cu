// The read ceiling of a GPU: a buffer read once, with nothing else to do.
#include "device.cuh"

// Each thread joins the words of the vectors of its stride by exclusive or; block b writes the result of its threads to
// out[b], so that no load can be left out. Four loads are under way at a time.
extern "C" __global__ void __launch_bounds__(512) read_all(const uint4* data, u64 count, u32* out) {
    Shared shared;
    u32* of_warps = shared.take<u32>(WARP);
    u64 stride = (u64)gridDim.x * blockDim.x;
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    u32 sum = 0;
    for (; i + 3 * stride < count; i += 4 * stride) {
        uint4 a = load_once(data + i), b = load_once(data + i + stride);
        uint4 c = load_once(data + i + 2 * stride), d = load_once(data + i + 3 * stride);
        sum ^= a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w;
        sum ^= c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
    }
    for (; i < count; i += stride) {
        uint4 a = load_once(data + i);
        sum ^= a.x ^ a.y ^ a.z ^ a.w;
    }
    for (u32 distance = WARP / 2; distance; distance /= 2) sum ^= __shfl_xor_sync(ALL_LANES, sum, distance);
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (u32 warp = 1; warp < blockDim.x / WARP; warp++) sum ^= of_warps[warp];
        out[blockIdx.x] = sum;
    }
}

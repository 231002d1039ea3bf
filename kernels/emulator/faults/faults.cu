// Kernels that break one rule each: the emulator must say which.
#include "device.cuh"

// Thread t reads what thread t + 1 wrote, with no barrier between.
extern "C" __global__ void missing_barrier(u32* out) {
    Shared shared;
    u32* values = shared.take<u32>(blockDim.x);
    values[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = values[(threadIdx.x + 1) % blockDim.x];
}

// The same with the barrier.
extern "C" __global__ void with_barrier(u32* out) {
    Shared shared;
    u32* values = shared.take<u32>(blockDim.x);
    values[threadIdx.x] = threadIdx.x;
    __syncthreads();
    out[threadIdx.x] = values[(threadIdx.x + 1) % blockDim.x];
}

// The buffer is used again before all have read it.
extern "C" __global__ void overwritten_too_early(u32* out) {
    Shared shared;
    u32* values = shared.take<u32>(blockDim.x);
    values[threadIdx.x] = threadIdx.x;
    __syncthreads();
    u32 value = values[(threadIdx.x + 40) % blockDim.x];
    values[threadIdx.x] = value;
    __syncthreads();
    out[threadIdx.x] = values[threadIdx.x];
}

// A warp's threads see each other's writes after __syncwarp, another warp's do not.
extern "C" __global__ void warp_barrier(u32* out, u32 distance) {
    Shared shared;
    u32* values = shared.take<u32>(blockDim.x);
    values[threadIdx.x] = threadIdx.x;
    __syncwarp();
    out[threadIdx.x] = values[(threadIdx.x + distance) % blockDim.x];
}

// All threads write one word of a buffer.
extern "C" __global__ void all_write_one(u32* out) { out[0] = threadIdx.x + blockIdx.x; }

// All threads add to one word.
extern "C" __global__ void all_add_to_one(u32* out) { atomicAdd(out, 1); }

// Each block reads what the next one overwrites.
extern "C" __global__ void blocks_race(u32* data) {
    u32 next = data[(blockIdx.x + 1) % gridDim.x];
    if (threadIdx.x == 0) data[blockIdx.x] = next;
}

extern "C" __global__ void reads_at(const u32* in, u32* out, u64 at) { out[0] = in[at]; }

extern "C" __global__ void writes_at(u32* out, u64 at) { out[at] = 7; }

extern "C" __global__ void reads_shared_at(u32* out, u32 at) {
    Shared shared;
    u32* first = shared.take<u32>(5);
    u32* second = shared.take<u32>(4);
    if (threadIdx.x < 5) first[threadIdx.x] = 1;
    if (threadIdx.x < 4) second[threadIdx.x] = 2;
    __syncthreads();
    out[threadIdx.x] = first[at];
}

extern "C" __global__ void reads_unwritten_shared(u32* out) {
    Shared shared;
    u32* values = shared.take<u32>(64);
    if (threadIdx.x < 63) values[threadIdx.x] = 1;
    __syncthreads();
    out[threadIdx.x] = values[threadIdx.x];
}

extern "C" __global__ void takes_more_than_given(u32* out) {
    Shared shared;
    out[threadIdx.x] = 0;
    shared.take<u32>(16);
    shared.take<u32>(1);
}

// Half of the threads go to a barrier that the others never reach.
extern "C" __global__ void half_at_barrier(u32* out) {
    if (threadIdx.x < blockDim.x / 2) __syncthreads();
    out[threadIdx.x] = 1;
}

// One lane leaves before its warp's shuffle.
extern "C" __global__ void lane_leaves(u32* out) {
    if (threadIdx.x == 3) return;
    out[threadIdx.x] = __shfl_sync(ALL_LANES, threadIdx.x, 0);
}

// Lanes of one warp stand at different operations.
extern "C" __global__ void different_operations(u32* out) {
    u32 value = threadIdx.x < 16 ? __ballot_sync(ALL_LANES, 1) : __shfl_sync(ALL_LANES, threadIdx.x, 0);
    out[threadIdx.x] = value;
}

extern "C" __global__ void half_mask(u32* out) { out[threadIdx.x] = __shfl_sync(0xffffu, threadIdx.x, 0); }

extern "C" __global__ void misaligned(const u8* in, u32* out) { out[0] = *(const u32*)(in + 2); }

extern "C" __global__ void misaligned_vector(const u32* in, u32* out) { out[0] = load_once((const uint4*)(in + 1)).y; }

extern "C" __global__ void once_of_written(u32* data, u32* out) {
    data[threadIdx.x] = 5;
    out[threadIdx.x] = load_once((const u32*)data + threadIdx.x);
}

// Stage `waits` of the copy is left out: 0 none, 1 the wait, 2 the barrier after it.
extern "C" __global__ void background_copy(const uint4* in, u32* out, u32 left_out) {
    Shared shared;
    uint4* tile = shared.take<uint4>(blockDim.x);
    cp_async16(tile + threadIdx.x, in + threadIdx.x);
    cp_async_commit();
    if (left_out != 1) cp_async_wait<0>();
    if (left_out != 2) __syncthreads();
    out[threadIdx.x] = tile[(threadIdx.x + 32) % blockDim.x].x;
}

// Two stages, of which the second is still under way.
extern "C" __global__ void background_stages(const uint4* in, u32* out, u32 stage) {
    Shared shared;
    uint4* tiles = shared.take<uint4>(2 * blockDim.x);
    for (u32 i = 0; i < 2; i++) {
        cp_async16(tiles + i * blockDim.x + threadIdx.x, in + i * blockDim.x + threadIdx.x);
        cp_async_commit();
    }
    cp_async_wait<1>();
    __syncthreads();
    out[threadIdx.x] = tiles[stage * blockDim.x + threadIdx.x].x;
}

// Waits for what no thread does.
extern "C" __global__ void never_ends(u32* out) {
    while (atomicAdd(out, 0) != 0) {
    }
}

// The last block adds what all wrote; `counts` says whether it first learns that they did.
extern "C" __global__ void last_block_adds(float* parts, u32* counter, float* out, u32 counts) {
    Shared shared;
    u32* before = shared.take<u32>(1);
    parts[4 * blockIdx.x + threadIdx.x] = (float)(blockIdx.x + threadIdx.x);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *before = counts ? atomicAdd(counter, 1) : blockIdx.x;
    __syncthreads();
    if (*before != gridDim.x - 1 || threadIdx.x != 0) return;
    float sum = 0;
    for (u32 i = 0; i < gridDim.x; i++) {
        float4 part = load_fresh((const float4*)(parts + 4 * i));
        sum += part.x + part.y + part.z + part.w;
    }
    *out = sum;
}

// Every lane reads what its neighbour wrote, then changes it again after a barrier of the warp.
extern "C" __global__ void changes_after_others_read(u32* out, u32 meets) {
    Shared shared;
    u32* values = shared.take<u32>(blockDim.x);
    u32 lane = threadIdx.x % WARP, next = threadIdx.x - lane + (lane + 1) % WARP;
    values[threadIdx.x] = lane;
    __syncwarp();
    u32 sum = values[next];
    if (meets) __syncwarp();
    values[threadIdx.x] += 1;
    __syncwarp();
    out[threadIdx.x] = sum + values[next];
}

// Multiplies with given places of which two in four are kept.
extern "C" __global__ void keeps(u32* out, u32 places) {
    float sums[4] = {0, 0, 0, 0};
    u32 left[4] = {0, 0, 0, 0};
    mma_sparse_bf16(sums, left, make_uint4(0, 0, 0, 0), places, true);
    out[threadIdx.x] = (u32)sums[0];
}

// Copies a word; `early` says what it does before it waits for earlier launches: 1 reads, 2 writes.
extern "C" __global__ void copies_early(const u32* in, u32* out, u32 early) {
    let_later_begin();
    u32 value = early & 1 ? in[threadIdx.x] : 0;
    if (early & 2) out[threadIdx.x] = value;
    wait_for_earlier();
    if (!(early & 1)) value = in[threadIdx.x];
    if (!(early & 2)) out[threadIdx.x] = value;
}

// The same, but waits for nothing, so that it is never launched early, and lets nothing begin before it has ended.
extern "C" __global__ void copies(const u32* in, u32* out) { out[threadIdx.x] = in[threadIdx.x]; }

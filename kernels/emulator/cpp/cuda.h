// What a kernel sees in place of CUDA. Whatever must know of other threads is a call into emulator.cpp.
#pragma once

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define DEVICE static inline __attribute__((unused))
#define UNCHECKED __attribute__((no_sanitize("thread")))

// ---- the emulator ------------------------------------------------------------------------------------------------

struct Index3 {
    u32 x, y, z;
};

extern "C" {
Index3 emulator_thread_index();
Index3 emulator_block_index();
Index3 emulator_block_size();
Index3 emulator_grid_size();
void emulator_barrier();
void emulator_wait_for_earlier();
void emulator_let_later_begin();
void emulator_sync_warp();
u64 emulator_shuffle(u32 mask, u64 value, u32 source);
u32 emulator_ballot(u32 mask, bool vote);
void emulator_mma_bf16(float* d, const u32* a, u32 b0, u32 b1);
void emulator_mma_sparse_bf16(float* d, const u32* a, const u32* b, u32 kept, bool upper);
void emulator_load_matrices(u32* words);
void emulator_mma_u8(i32* d, const u32* a, u32 b0, u32 b1);
void emulator_mma_b1(i32* d, u32 a0, u32 a1, u32 b);
u32 emulator_add_exactly_bf16x2(u32 a, u32 b);
void emulator_check_once(const void* p, u32 bytes);
void emulator_check_fresh(const void* p, u32 bytes);
void emulator_copy_async(void* shared, const void* global, u32 bytes);
void emulator_commit_async();
void emulator_wait_async(int pending);
void* emulator_take_shared(u32 used, u32 bytes);
void emulator_check_atomic(void* p, u32 bytes);
float emulator_fma(float a, float b, float c);
}

#define threadIdx emulator_thread_index()
#define blockIdx emulator_block_index()
#define blockDim emulator_block_size()
#define gridDim emulator_grid_size()

DEVICE void __syncthreads() { emulator_barrier(); }
DEVICE void __syncwarp(u32 = ALL_LANES) { emulator_sync_warp(); }
DEVICE void __threadfence() {}

// ---- vectors -----------------------------------------------------------------------------------------------------

struct alignas(8) uint2 {
    u32 x, y;
};
struct alignas(16) uint4 {
    u32 x, y, z, w;
};
struct alignas(8) int2 {
    i32 x, y;
};
struct alignas(16) int4 {
    i32 x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
DEVICE uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
DEVICE uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
DEVICE int2 make_int2(i32 x, i32 y) { return {x, y}; }
DEVICE int4 make_int4(i32 x, i32 y, i32 z, i32 w) { return {x, y, z, w}; }
DEVICE float2 make_float2(float x, float y) { return {x, y}; }
DEVICE float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- loads and copies --------------------------------------------------------------------------------------------

template <typename T>
UNCHECKED static T load_once(const T* p) {
    emulator_check_once(p, sizeof(T));
    return *p;
}
UNCHECKED static float4 load_fresh(const float4* p) {
    emulator_check_fresh(p, sizeof(float4));
    return *p;
}
// Launches run one after the other; what a thread does before it waits is checked.
DEVICE void wait_for_earlier() { emulator_wait_for_earlier(); }
DEVICE void let_later_begin() { emulator_let_later_begin(); }
DEVICE u32 opaque(u32 x) { return x; }
DEVICE void cp_async16(void* shared, const void* global) { emulator_copy_async(shared, global, 16); }
DEVICE void cp_async8(void* shared, const void* global) { emulator_copy_async(shared, global, 8); }
DEVICE void cp_async4(void* shared, const void* global) { emulator_copy_async(shared, global, 4); }
DEVICE void cp_async16_or_zeros(void* shared, const void* global, bool valid) {
    emulator_copy_async(shared, valid ? global : nullptr, 16);
}
DEVICE void cp_async_commit() { emulator_commit_async(); }
template <int pending>
static inline void cp_async_wait() {
    emulator_wait_async(pending);
}

// ---- shared memory -----------------------------------------------------------------------------------------------

struct Shared {
    u32 used = 0;
    template <typename T>
    T* take(u32 count) {
        void* piece = emulator_take_shared(used, count * (u32)sizeof(T));
        used += (count * (u32)sizeof(T) + 15) / 16 * 16;
        return static_cast<T*>(piece);
    }
};

// ---- arithmetic --------------------------------------------------------------------------------------------------

DEVICE u32 __float_as_uint(float x) {
    u32 y;
    __builtin_memcpy(&y, &x, 4);
    return y;
}
DEVICE float __uint_as_float(u32 x) {
    float y;
    __builtin_memcpy(&y, &x, 4);
    return y;
}
DEVICE i32 __float_as_int(float x) { return (i32)__float_as_uint(x); }
DEVICE float __int_as_float(i32 x) { return __uint_as_float((u32)x); }
DEVICE float __fmaf_rn(float a, float b, float c) { return emulator_fma(a, b, c); }
DEVICE float __fadd_rn(float a, float b) { return a + b; }
DEVICE float __fsub_rn(float a, float b) { return a - b; }
DEVICE float __fmul_rn(float a, float b) { return a * b; }
DEVICE float __fdiv_rn(float a, float b) { return a / b; }
DEVICE float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
DEVICE float fabsf(float a) { return __builtin_fabsf(a); }
// As on the GPU, the number wins over a NaN.
DEVICE float fmaxf(float a, float b) { return __builtin_fmaxf(a, b); }
DEVICE float fminf(float a, float b) { return __builtin_fminf(a, b); }

DEVICE u32 min(u32 a, u32 b) { return a < b ? a : b; }
DEVICE i32 min(i32 a, i32 b) { return a < b ? a : b; }
DEVICE u64 min(u64 a, u64 b) { return a < b ? a : b; }
DEVICE float min(float a, float b) { return fminf(a, b); }
DEVICE u32 max(u32 a, u32 b) { return a > b ? a : b; }
DEVICE i32 max(i32 a, i32 b) { return a > b ? a : b; }
DEVICE u64 max(u64 a, u64 b) { return a > b ? a : b; }
DEVICE float max(float a, float b) { return fmaxf(a, b); }

DEVICE i32 __popc(u32 x) { return __builtin_popcount(x); }
DEVICE i32 __popcll(u64 x) { return __builtin_popcountll(x); }
DEVICE i32 __clz(u32 x) { return x ? __builtin_clz(x) : 32; }
DEVICE i32 __ffs(u32 x) { return __builtin_ffs((i32)x); }
DEVICE u32 __umulhi(u32 a, u32 b) { return (u32)((u64)a * b >> 32); }
DEVICE u32 __brev(u32 x) {
    u32 y = 0;
    for (int i = 0; i < 32; i++) y |= (x >> i & 1) << (31 - i);
    return y;
}
// Byte i of the result is the byte that nibble i of the selector picks from b:a, or copies of its sign bit.
DEVICE u32 __byte_perm(u32 a, u32 b, u32 selector) {
    u64 bytes = (u64)b << 32 | a;
    u32 y = 0;
    for (int i = 0; i < 4; i++) {
        u32 pick = selector >> (4 * i) & 15;
        u32 byte = (u32)(bytes >> (8 * (pick & 7))) & 0xff;
        if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
        y |= byte << (8 * i);
    }
    return y;
}
DEVICE u32 __funnelshift_l(u32 low, u32 high, u32 shift) {
    shift &= 31;
    return shift ? high << shift | low >> (32 - shift) : high;
}
DEVICE u32 __funnelshift_r(u32 low, u32 high, u32 shift) {
    shift &= 31;
    return shift ? high << (32 - shift) | low >> shift : low;
}
DEVICE u32 __funnelshift_lc(u32 low, u32 high, u32 shift) {
    return shift >= 32 ? low : __funnelshift_l(low, high, shift);
}
DEVICE u32 __funnelshift_rc(u32 low, u32 high, u32 shift) {
    return shift >= 32 ? high : __funnelshift_r(low, high, shift);
}
template <int table>
static inline u32 lop3(u32 a, u32 b, u32 c) {
    u32 y = 0;
    if (table & 0x01) y |= ~a & ~b & ~c;
    if (table & 0x02) y |= ~a & ~b & c;
    if (table & 0x04) y |= ~a & b & ~c;
    if (table & 0x08) y |= ~a & b & c;
    if (table & 0x10) y |= a & ~b & ~c;
    if (table & 0x20) y |= a & ~b & c;
    if (table & 0x40) y |= a & b & ~c;
    if (table & 0x80) y |= a & b & c;
    return y;
}
DEVICE void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { emulator_mma_bf16(d, a, b0, b1); }
DEVICE void mma_sparse_bf16(float (&d)[4], const u32 (&a)[4], uint4 b, u32 kept, bool upper) {
    u32 words[4] = {b.x, b.y, b.z, b.w};
    emulator_mma_sparse_bf16(d, a, words, kept, upper);
}
// The lane reads its row, and then gets its words of all.
DEVICE uint4 load_matrices(const uint4* row) {
    uint4 v = *row;
    u32 words[4] = {v.x, v.y, v.z, v.w};
    emulator_load_matrices(words);
    return make_uint4(words[0], words[1], words[2], words[3]);
}
DEVICE void mma_u8(i32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { emulator_mma_u8(d, a, b0, b1); }
DEVICE void mma_b1(i32 (&d)[4], u32 a0, u32 a1, u32 b) { emulator_mma_b1(d, a0, a1, b); }
DEVICE u32 add_exactly_bf16x2(u32 a, u32 b) { return emulator_add_exactly_bf16x2(a, b); }

// ---- between the lanes of a warp ---------------------------------------------------------------------------------

template <typename T>
static inline u64 to_bits(T x) {
    u64 y = 0;
    __builtin_memcpy(&y, &x, sizeof x);
    return y;
}
template <typename T>
static inline T from_bits(u64 x) {
    T y;
    __builtin_memcpy(&y, &x, sizeof y);
    return y;
}
DEVICE u32 lane_of_thread() { return threadIdx.x & 31; }
template <typename T>
static inline T __shfl_sync(u32 mask, T value, int source, int width = 32) {
    u32 first = lane_of_thread() / width * width;
    return from_bits<T>(emulator_shuffle(mask, to_bits(value), first + ((u32)source & (width - 1))));
}
template <typename T>
static inline T __shfl_xor_sync(u32 mask, T value, int lanes, int width = 32) {
    u32 lane = lane_of_thread(), source = lane ^ lanes;
    if (source >= lane / width * width + width) source = lane;
    return from_bits<T>(emulator_shuffle(mask, to_bits(value), source));
}
template <typename T>
static inline T __shfl_up_sync(u32 mask, T value, u32 delta, int width = 32) {
    u32 lane = lane_of_thread();
    return from_bits<T>(emulator_shuffle(mask, to_bits(value), lane % width >= delta ? lane - delta : lane));
}
template <typename T>
static inline T __shfl_down_sync(u32 mask, T value, u32 delta, int width = 32) {
    u32 lane = lane_of_thread();
    return from_bits<T>(emulator_shuffle(mask, to_bits(value), lane % width + delta < (u32)width ? lane + delta : lane));
}
DEVICE u32 __ballot_sync(u32 mask, int vote) { return emulator_ballot(mask, vote != 0); }
DEVICE int __any_sync(u32 mask, int vote) { return emulator_ballot(mask, vote != 0) != 0; }
DEVICE int __all_sync(u32 mask, int vote) { return emulator_ballot(mask, vote != 0) == mask; }

// ---- atomics -----------------------------------------------------------------------------------------------------

template <typename T>
struct Same {
    using Type = T;
};
#define EMULATED_ATOMIC(NAME, RESULT)                        \
    template <typename T>                                    \
    UNCHECKED static T NAME(T* p, typename Same<T>::Type value) { \
        emulator_check_atomic(p, sizeof(T));                 \
        T old = *p;                                          \
        *p = RESULT;                                         \
        return old;                                          \
    }
EMULATED_ATOMIC(atomicAdd, old + value)
EMULATED_ATOMIC(atomicSub, old - value)
EMULATED_ATOMIC(atomicMax, (old > value ? old : value))
EMULATED_ATOMIC(atomicMin, (old < value ? old : value))
EMULATED_ATOMIC(atomicOr, (old | value))
EMULATED_ATOMIC(atomicAnd, (old & value))
EMULATED_ATOMIC(atomicExch, value)
#undef EMULATED_ATOMIC
template <typename T>
UNCHECKED static T atomicCAS(T* p, typename Same<T>::Type expected, typename Same<T>::Type value) {
    emulator_check_atomic(p, sizeof(T));
    T old = *p;
    if (old == expected) *p = value;
    return old;
}

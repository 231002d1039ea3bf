// What every kernel builds on: fixed-width integers, bfloat16, shared memory, and the PTX instructions that have no
// name in CUDA C++.
//
// A kernel uses only what stands here and the CUDA built-ins listed in the emulator's cuda.h. The same source is
// compiled by NVRTC for a GPU and by a host compiler for the emulator, which checks every access.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i32 = int;
using i64 = long long;
using u64 = unsigned long long;

constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

#ifdef LLMPRESS_EMULATOR
#include "cuda.h"
#define DEVICE_METHOD
#else
#define DEVICE __device__ __forceinline__
#define DEVICE_METHOD __device__ __forceinline__

// ---- launches that overlap ---------------------------------------------------------------------------------------
//
// On compute capability 9.0 and newer the kernels of a step may begin before what was started earlier has ended
// (programmatic dependent launch): they are compiled a second time with LLMPRESS_STEP. Each of their threads waits before it
// reads or writes anything that a kernel writes; weights it may read before.

// Waits until all that was started before has ended, and sees what it wrote.
DEVICE void wait_for_earlier() {
#ifdef LLMPRESS_STEP
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets what is started next begin as soon as all blocks of this launch have begun.
DEVICE void let_later_begin() {
#ifdef LLMPRESS_STEP
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The same number, which the compiler does not know how to compute anew: it stays in a register.
DEVICE u32 opaque(u32 x) {
    asm volatile("" : "+r"(x));
    return x;
}

// ---- loads and copies --------------------------------------------------------------------------------------------

// Sixteen, eight or four bytes that are read once: they pass the caches by where they can.
DEVICE uint4 load_once(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}
DEVICE uint2 load_once(const uint2* p) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}
DEVICE u32 load_once(const u32* p) {
    u32 v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}

// Sixteen bytes that other blocks of this launch wrote before a __threadfence and an atomic that this block has seen.
DEVICE float4 load_fresh(const float4* p) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

// Sixteen bytes from global to shared memory, in the background. They are there for the thread that asked after
// cp_async_wait, for others after a barrier that follows it.
DEVICE void cp_async16(void* shared, const void* global) {
    u32 to = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
// The same of eight and of four bytes.
DEVICE void cp_async8(void* shared, const void* global) {
    u32 to = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(global) : "memory");
}
DEVICE void cp_async4(void* shared, const void* global) {
    u32 to = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(global) : "memory");
}
// Sixteen bytes, or sixteen zeros.
DEVICE void cp_async16_or_zeros(void* shared, const void* global, bool valid) {
    u32 to = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
// Closes a group of copies.
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's groups are under way.
template <int pending>
DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four matrices of 8 rows of 16 bytes from shared memory: lane 8 i + g says where row g of matrix i is, lane 4 g + q gets word q of
// row g of each.
DEVICE uint4 load_matrices(const uint4* row) {
    uint4 v;
    u32 from = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(from)
                 : "memory");
    return v;
}

// ---- arithmetic --------------------------------------------------------------------------------------------------

// Any function of three bits, bit by bit: bit 4a + 2b + c of `table`.
template <int table>
DEVICE u32 lop3(u32 a, u32 b, u32 c) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(table));
    return d;
}

// d += a b over 16 rows x 16 k and 16 k x 8 columns of bfloat16, single-precision sums. Lane 4 g + q holds
//   a[0] (g, 2q..)  a[1] (g + 8, 2q..)  a[2] (g, 2q + 8..)  a[3] (g + 8, 2q + 8..)    row, k of the lower half
//   b0 (2q.., g)    b1 (2q + 8.., g)                                                  k of the lower half, column
//   d[0], d[1] (g, 2q), (g, 2q + 1)   d[2], d[3] the same of row g + 8                row, column
// The emulator adds in order of k with fused multiply-adds; a tensor core rounds in its own way.
DEVICE void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d += a b over 16 rows x 32 k, of which each four consecutive ones of a row keep two, and 32 k x 8 columns. a: the 16 kept ones, as
// mma_bf16 takes 16 k. Lane 4 g + q holds b[i] (8i + 2q.., g), and d as mma_bf16 does. Which are kept: a nibble for each four k, in the
// lower half-word of row g and the upper one of row g + 8, the first place in the lower bits; of k 0..15 from lane 4 g + 2 `upper`, of
// k 16..31 from the next one. First places lie before second ones: what later architectures call ordered metadata, by a name that PTX
// of CUDA 12.4 does not have.
// The emulator adds in order of k with fused multiply-adds, as of mma_bf16.
DEVICE void mma_sparse_bf16(float (&d)[4], const u32 (&a)[4], uint4 b, u32 kept, bool upper) {
    // The selector is a part of the instruction.
    if (upper) {
        asm volatile(
            "mma.sp.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, "
            "%12, 0x1;"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w), "r"(kept));
    } else {
        asm volatile(
            "mma.sp.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, "
            "%12, 0x0;"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w), "r"(kept));
    }
}

// a + b of two BF16 each, where the sums are BF16 themselves: the emulator ends the launch where one is not.
DEVICE u32 add_exactly_bf16x2(u32 a, u32 b) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3f803f80u), "r"(b));
    return d;
}

// d += a b over 16 rows x 32 k and 32 k x 8 columns of unsigned bytes, in 32 bits. Lane 4 g + q holds
//   a[0] (g, 4q..)  a[1] (g + 8, 4q..)  a[2] (g, 4q + 16..)  a[3] (g + 8, 4q + 16..)   row, k of the lowest byte
//   b0 (4q.., g)    b1 (4q + 16.., g)                                                 k of the lowest byte, column
// and d as mma_bf16 does.
DEVICE void mma_u8(i32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d += how many of 128 bits of a row of a and of a column of b are both set: 16 rows, 8 columns. Lane 4 g + q holds bits 32 q ..
// 32 q + 31 of rows g and g + 8 in a0 and a1 and of column g in b, and d as mma_bf16 does.
DEVICE void mma_b1(i32 (&d)[4], u32 a0, u32 a1, u32 b) {
    asm volatile(
        "mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a0), "r"(a1), "r"(b));
}

// ---- shared memory -----------------------------------------------------------------------------------------------

extern __shared__ uint4 shared_memory[];

// Hands out a block's shared memory, piece by piece, each aligned to 16 bytes. Every thread takes the same pieces in
// the same order. The launch gives the sum of the pieces' sizes, each rounded up to 16 bytes.
struct Shared {
    u32 used = 0;
    template <typename T>
    DEVICE_METHOD T* take(u32 count) {
        T* piece = reinterpret_cast<T*>(reinterpret_cast<u8*>(shared_memory) + used);
        used += (count * (u32)sizeof(T) + 15) / 16 * 16;
        return piece;
    }
};
#endif

// ---- bfloat16 ----------------------------------------------------------------------------------------------------

DEVICE float bf16_to_float(u16 word) { return __uint_as_float((u32)word << 16); }

// Rounds to the nearest, ties to even; a NaN stays one.
DEVICE u16 float_to_bf16(float x) {
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (u16)(bits >> 16 | 0x40);
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Two in a word, the first in the lower half. The instruction does the same, but gives one NaN for all.
DEVICE u32 floats_to_bf16x2(float low, float high) {
#ifdef LLMPRESS_EMULATOR
    return (u32)float_to_bf16(low) | (u32)float_to_bf16(high) << 16;
#else
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
#endif
}

// ---- half precision ----------------------------------------------------------------------------------------------

// The same number in single precision.
DEVICE float half_to_float(u16 word) {
#ifdef LLMPRESS_EMULATOR
    u32 sign = (u32)(word & 0x8000) << 16, rest = (u32)(word & 0x7fff) << 13;
    // Infinities and NaNs keep their exponent of ones; all else is scaled, which makes what is subnormal normal.
    if (rest >= 0x0f800000u) return __uint_as_float(sign | rest | 0x7f800000u);
    return __uint_as_float(sign | __float_as_uint(__fmul_rn(__uint_as_float(rest), 5192296858534827628530496329220096.0f)));
#else
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(word));
    return wide;
#endif
}

// ---- functions ---------------------------------------------------------------------------------------------------

// e^x by the operations of the processor's kernel (kernels/src/cpu/exp.rs): the same bits.
DEVICE float exponential(float x) {
    x = x < -105.0f ? -105.0f : x;
    x = x > 89.0f ? 89.0f : x;
    const float round = 12582912.0f;  // 1.5 * 2^23: the rounded quotient is left in the low bits
    float shifted = __fmaf_rn(x, 1.44269504088896340736f, round);
    i32 n = (i32)(__float_as_uint(shifted) - __float_as_uint(round));
    float whole = __fsub_rn(shifted, round);
    float r = __fmaf_rn(whole, -0.6933594f, x);
    r = __fmaf_rn(whole, 2.1219444e-4f, r);
    float sum = (float)(1.0 / 5040.0);
    sum = __fmaf_rn(r, sum, (float)(1.0 / 720.0));
    sum = __fmaf_rn(r, sum, (float)(1.0 / 120.0));
    sum = __fmaf_rn(r, sum, (float)(1.0 / 24.0));
    sum = __fmaf_rn(r, sum, (float)(1.0 / 6.0));
    sum = __fmaf_rn(r, sum, 0.5f);
    sum = __fmaf_rn(r, sum, 1.0f);
    sum = __fmaf_rn(r, sum, 1.0f);
    i32 half = n >> 1;
    float low = __uint_as_float((u32)(half + 127) << 23);
    float high = __uint_as_float((u32)(n - half + 127) << 23);
    return __fmul_rn(__fmul_rn(sum, low), high);
}

// c tanh(x / c): tanh y = 1 - 2 / (e^2y + 1).
DEVICE float soft_capped(float x, float cap) {
    float e = exponential(__fdiv_rn(__fmul_rn(2.0f, x), cap));
    return __fmul_rn(cap, __fsub_rn(1.0f, __fdiv_rn(2.0f, __fadd_rn(e, 1.0f))));
}

// Do wgmma and mma.sync give the same bits? 64 x 8 sums of BF16 products over 16 to 4,096 k, in both, on one GPU.
//
//     nvcc -gencode=arch=compute_90a,code=sm_90a -o wgmma_bits docs/bench/wgmma_bits.cu && ./wgmma_bits
//
// Kind 0: normal numbers; 1: sizes that differ by 2^20; 2: weights of one sign. `off` is the error against double precision, as a
// share of the sum of the terms' sizes.
#include <cstdio>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <cmath>
#include <vector>
typedef uint32_t u32; typedef uint16_t u16; typedef unsigned long long u64;
__device__ u64 desc(const void* p) { u32 a = (u32)__cvta_generic_to_shared(p); return (u64)((a & 0x3ffff) >> 4) | (u64)(128 >> 4) << 16 | (u64)(256 >> 4) << 32; }
// a: [steps][64][16], b: [steps][8][16] (n, k)
__global__ void by_wgmma(const u16* a, const u16* b, int steps, float* d) {
    __shared__ __align__(1024) u16 tile[128];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    float s[4] = {};
    for (int t = 0; t < steps; t++) {
        __syncthreads();
        // core matrix c (k 8c..8c+7): 8 rows of 8
        { int n = threadIdx.x / 16 % 8, k = threadIdx.x % 16; tile[k / 8 * 64 + n * 8 + k % 8] = b[(t * 8 + n) * 16 + k]; }
        asm volatile("fence.proxy.async;" ::: "memory");
        __syncthreads();
        const u16* r = a + (t * 64 + warp * 16) * 16;
        u32 f[4];
        f[0] = *(u32*)(r + g * 16 + 2 * q); f[1] = *(u32*)(r + (g + 8) * 16 + 2 * q);
        f[2] = *(u32*)(r + g * 16 + 2 * q + 8); f[3] = *(u32*)(r + (g + 8) * 16 + 2 * q + 8);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, {%4,%5,%6,%7}, %8, 1, 1, 1, 0;"
            : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]) : "r"(f[0]), "r"(f[1]), "r"(f[2]), "r"(f[3]), "l"(desc(tile)));
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    }
    for (int i = 0; i < 4; i++) d[(warp * 16 + g + i / 2 * 8) * 8 + 2 * q + i % 2] = s[i];
}
__global__ void by_mma(const u16* a, const u16* b, int steps, float* d) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    float s[4] = {};
    for (int t = 0; t < steps; t++) {
        const u16* r = a + (t * 64 + warp * 16) * 16; const u16* c = b + t * 8 * 16;
        u32 f[4];
        f[0] = *(u32*)(r + g * 16 + 2 * q); f[1] = *(u32*)(r + (g + 8) * 16 + 2 * q);
        f[2] = *(u32*)(r + g * 16 + 2 * q + 8); f[3] = *(u32*)(r + (g + 8) * 16 + 2 * q + 8);
        u32 b0 = *(u32*)(c + g * 16 + 2 * q), b1 = *(u32*)(c + g * 16 + 2 * q + 8);
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]) : "r"(f[0]), "r"(f[1]), "r"(f[2]), "r"(f[3]), "r"(b0), "r"(b1));
    }
    for (int i = 0; i < 4; i++) d[(warp * 16 + g + i / 2 * 8) * 8 + 2 * q + i % 2] = s[i];
}
static u16 bf(float x) { u32 u; memcpy(&u, &x, 4); return (u16)((u + 0x7fff + (u >> 16 & 1)) >> 16); }
static float wide(u16 x) { u32 u = (u32)x << 16; float f; memcpy(&f, &u, 4); return f; }
int main() {
    for (int steps : {1, 2, 4, 64, 256}) for (int kind = 0; kind < 3; kind++) {
        std::vector<u16> a(steps * 64 * 16), b(steps * 8 * 16);
        auto rnd = [&] { float u = 0; for (int i = 0; i < 12; i++) u += rand() / (float)RAND_MAX; u -= 6; return kind == 1 ? u * exp2f(rand() % 20 - 10) : u; };
        for (auto& x : a) x = bf(rnd() * 0.02f);
        for (auto& x : b) x = bf(rnd());
        if (kind == 2) for (auto& x : a) x &= 0x7fff;
        u16 *da, *db; float *d0, *d1; cudaMalloc(&da, a.size() * 2); cudaMalloc(&db, b.size() * 2); cudaMalloc(&d0, 2048); cudaMalloc(&d1, 2048);
        cudaMemcpy(da, a.data(), a.size() * 2, cudaMemcpyHostToDevice); cudaMemcpy(db, b.data(), b.size() * 2, cudaMemcpyHostToDevice);
        by_wgmma<<<1, 128>>>(da, db, steps, d0); by_mma<<<1, 128>>>(da, db, steps, d1);
        float h0[512], h1[512]; cudaMemcpy(h0, d0, 2048, cudaMemcpyDeviceToHost); cudaMemcpy(h1, d1, 2048, cudaMemcpyDeviceToHost);
        int differ = 0; double worst = 0, off0 = 0, off1 = 0;
        for (int m = 0; m < 64; m++) for (int n = 0; n < 8; n++) {
            int i = m * 8 + n; double r = 0, z = 0; for (int t = 0; t < steps; t++) for (int k = 0; k < 16; k++) { double p = (double)wide(a[(t * 64 + m) * 16 + k]) * wide(b[(t * 8 + n) * 16 + k]); r += p; z += fabs(p); }
            differ += memcmp(&h0[i], &h1[i], 4) != 0; worst = fmax(worst, fabs(h0[i] - h1[i]) / z); off0 = fmax(off0, fabs(h0[i] - r) / z); off1 = fmax(off1, fabs(h1[i] - r) / z);
        }
        printf("steps %d kind %d: %d of 512 bits differ, apart %.2g, wgmma off %.2g, mma off %.2g (%s)\n", steps, kind, differ, worst, off0, off1, cudaGetErrorString(cudaGetLastError()));
    }
}

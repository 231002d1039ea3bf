// Products with the weights of experts: each token with those that it goes through, all of them in one launch.
//
//   slots    of tokens' choices, expert by expert: choice k of token t is slot t top_k + k
//   jobs     a block a job: some neighbouring slots of one expert
//
// The order of additions is that of product.cuh for a matrix of one expert: what else is in a job changes nothing.
#pragma once
#include "product.cuh"

// The slots of a job. A slot's activations are row slot / share of x, its output is row slot of y.
struct Chosen : Operands {
    static constexpr bool IN_A_ROW = false;
    const u32* slots;
    u32 share;
    DEVICE_METHOD const u16* x_of(u32 token) const { return x + slots[token] / share * (u64)stride; }
    DEVICE_METHOD float* y_of(u32 token) const { return y + slots[token] * y_stride; }
};

// What the kernels have in common: `job` is the expert, the first of its slots here and how many they are. Grids have room for as
// many jobs as there may be; those that are not have no slots. Nothing may be read before what was started earlier has ended: it
// says which weights are needed.
#define EXPERT_ARGUMENTS                                                                                         \
    u64 rows, u64 cols, const u16 *x, u32 stride, float *y, u64 y_stride, u32 log_slices, const u32 *slots, u32 share, \
        const uint4 *jobs
#define EXPERT_JOB                                                                                               \
    let_later_begin();                                                                                           \
    wait_for_earlier();                                                                                          \
    uint4 job = jobs[blockIdx.z];                                                                                \
    if (job.z == 0) return;                                                                                      \
    Chosen operands;                                                                                             \
    operands.x = x, operands.stride = stride, operands.tokens = job.z, operands.y = y, operands.y_stride = y_stride; \
    operands.bias = nullptr, operands.adds = 0, operands.log_slices = log_slices;                                \
    operands.slots = slots + job.y, operands.share = share;

// Plain weights: expert e's begin at firsts[e].
#define PLAIN_EXPERTS(NAME, ELEMENT)                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                        \
    NAME(const Dense<ELEMENT>::Word* words, const u64* firsts, EXPERT_ARGUMENTS) {                               \
        EXPERT_JOB                                                                                               \
        Dense<ELEMENT> weights = {words + firsts[job.x], rows, (u32)((cols + 7) / 8 * 8), (u32)((cols + 63) / 64), \
                                  log_slices >> 8, nullptr};                                                     \
        EXPERT_PRODUCT;                                                                                          \
    }

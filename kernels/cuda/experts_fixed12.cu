// Products of experts with fixed12 weights, decoded in registers.
//
// KERNEL_NAME(experts_fixed12_stream_1_1_3)
// KERNEL_NAME(experts_fixed12_stream_4_1_3)
// KERNEL_NAME(experts_fixed12_panel_8_1_2)
#include "experts.cuh"
#include "fixed12.cuh"

// Tiles of the experts one after the other, each with whole strips of its own.
#define EXPERTS(NAME)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                        \
    NAME(const u8* sign_mantissa, const u8* codes, const u32* escape_offsets, const u32* escapes, const u32* bases, \
         EXPERT_ARGUMENTS) {                                                                                     \
        EXPERT_JOB                                                                                               \
        u32 across = (u32)((cols + 63) / 64);                                                                    \
        u64 strip = job.x * ((rows + TILE_ROWS - 1) / TILE_ROWS), tile = strip * across;                         \
        Fixed12 weights = {sign_mantissa + tile * TILE_ROWS * TILE_K, codes + tile * TILE_ROWS * TILE_K / 2,     \
                           escape_offsets + tile, escapes, bases + strip, across};                               \
        EXPERT_PRODUCT;                                                                                          \
    }

#define EXPERT_PRODUCT stream_product<COLUMNS, 1, 3>(weights, rows, operands)
#define COLUMNS 1
EXPERTS(experts_fixed12_stream_1_1_3)
#undef COLUMNS
#define COLUMNS 4
EXPERTS(experts_fixed12_stream_4_1_3)
#undef EXPERT_PRODUCT

#ifndef LLMPRESS_STEP
#define EXPERT_PRODUCT panel_product<8, 1, 2>(weights, rows, operands, {nullptr, nullptr})
EXPERTS(experts_fixed12_panel_8_1_2)
#endif

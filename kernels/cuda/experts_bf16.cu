// Products of experts with plain BF16 weights.
//
// KERNEL_NAME(experts_bf16_stream_1_1_3)
// KERNEL_NAME(experts_bf16_stream_4_1_3)
// KERNEL_NAME(experts_bf16_panel_8_1_2)
#include "dense.cuh"
#include "experts.cuh"

#define EXPERT_PRODUCT stream_product<COLUMNS, 1, 3>(weights, rows, operands)
#define COLUMNS 1
PLAIN_EXPERTS(experts_bf16_stream_1_1_3, Brain)
#undef COLUMNS
#define COLUMNS 4
PLAIN_EXPERTS(experts_bf16_stream_4_1_3, Brain)
#undef EXPERT_PRODUCT

#ifndef LLMPRESS_STEP
#define EXPERT_PRODUCT panel_product<8, 1, 2>(weights, rows, operands, {nullptr, nullptr})
PLAIN_EXPERTS(experts_bf16_panel_8_1_2, Brain)
#endif

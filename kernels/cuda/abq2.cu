// Products with weights of two bits a code.
//
// KERNEL_NAME(abq2_stream_1_1)
// KERNEL_NAME(abq2_stream_1_2)
// KERNEL_NAME(abq2_stream_2_2)
// KERNEL_NAME(abq2_panel_4_1)
// KERNEL_NAME(abq2_panel_8_1)
// KERNEL_NAME(abq2_decode)
// KERNEL_NAME(abq2_bits_1)
// KERNEL_NAME(abq2_bits_2)
// KERNEL_NAME(abq2_bytes_1)
// KERNEL_NAME(abq2_bytes_2)
// KERNEL_NAME(abq2_bytes_8)
#define WIDTH 2
#include "abq_width.cuh"

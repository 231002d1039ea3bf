// Products with weights of six bits a code.
//
// KERNEL_NAME(abq6_stream_1_1)
// KERNEL_NAME(abq6_stream_1_2)
// KERNEL_NAME(abq6_stream_2_2)
// KERNEL_NAME(abq6_panel_4_1)
// KERNEL_NAME(abq6_panel_8_1)
// KERNEL_NAME(abq6_decode)
// KERNEL_NAME(abq6_bits_1)
// KERNEL_NAME(abq6_bits_2)
// KERNEL_NAME(abq6_bytes_1)
// KERNEL_NAME(abq6_bytes_2)
// KERNEL_NAME(abq6_bytes_8)
#define WIDTH 6
#include "abq_width.cuh"

// Products with weights of eight bits a code.
//
// KERNEL_NAME(abq8_stream_1_1)
// KERNEL_NAME(abq8_stream_1_2)
// KERNEL_NAME(abq8_stream_2_2)
// KERNEL_NAME(abq8_panel_4_1)
// KERNEL_NAME(abq8_panel_8_1)
// KERNEL_NAME(abq8_decode)
// KERNEL_NAME(abq8_bits_1)
// KERNEL_NAME(abq8_bits_2)
// KERNEL_NAME(abq8_bytes_1)
// KERNEL_NAME(abq8_bytes_2)
// KERNEL_NAME(abq8_bytes_8)
#define WIDTH 8
#include "abq_width.cuh"

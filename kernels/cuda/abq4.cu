// Products with weights of four bits a code.
//
// KERNEL_NAME(abq4_stream_1_1)
// KERNEL_NAME(abq4_stream_1_2)
// KERNEL_NAME(abq4_stream_2_2)
// KERNEL_NAME(abq4_panel_4_1)
// KERNEL_NAME(abq4_panel_8_1)
// KERNEL_NAME(abq4_decode)
// KERNEL_NAME(abq4_bits_1)
// KERNEL_NAME(abq4_bits_2)
// KERNEL_NAME(abq4_bytes_1)
// KERNEL_NAME(abq4_bytes_2)
// KERNEL_NAME(abq4_bytes_8)
#define WIDTH 4
#include "abq_width.cuh"

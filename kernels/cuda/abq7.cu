// Products with weights of seven bits a code.
//
// KERNEL_NAME(abq7_stream_1_1)
// KERNEL_NAME(abq7_stream_1_2)
// KERNEL_NAME(abq7_stream_2_2)
// KERNEL_NAME(abq7_panel_4_1)
// KERNEL_NAME(abq7_panel_8_1)
// KERNEL_NAME(abq7_decode)
// KERNEL_NAME(abq7_bits_1)
// KERNEL_NAME(abq7_bits_2)
// KERNEL_NAME(abq7_bytes_1)
// KERNEL_NAME(abq7_bytes_2)
// KERNEL_NAME(abq7_bytes_8)
#define WIDTH 7
#include "abq_width.cuh"

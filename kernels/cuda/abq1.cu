// Products with weights of one bit a code.
//
// KERNEL_NAME(abq1_stream_1_1)
// KERNEL_NAME(abq1_stream_1_2)
// KERNEL_NAME(abq1_stream_2_2)
// KERNEL_NAME(abq1_panel_4_1)
// KERNEL_NAME(abq1_panel_8_1)
// KERNEL_NAME(abq1_decode)
// KERNEL_NAME(abq1_bits_1)
// KERNEL_NAME(abq1_bits_2)
// KERNEL_NAME(abq1_bytes_1)
// KERNEL_NAME(abq1_bytes_2)
// KERNEL_NAME(abq1_bytes_8)
#define WIDTH 1
#include "abq_width.cuh"

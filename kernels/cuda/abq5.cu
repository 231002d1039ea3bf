// Products with weights of five bits a code.
//
// KERNEL_NAME(abq5_stream_1_1)
// KERNEL_NAME(abq5_stream_1_2)
// KERNEL_NAME(abq5_stream_2_2)
// KERNEL_NAME(abq5_panel_4_1)
// KERNEL_NAME(abq5_panel_8_1)
// KERNEL_NAME(abq5_decode)
// KERNEL_NAME(abq5_bits_1)
// KERNEL_NAME(abq5_bits_2)
// KERNEL_NAME(abq5_bytes_1)
// KERNEL_NAME(abq5_bytes_2)
// KERNEL_NAME(abq5_bytes_8)
#define WIDTH 5
#include "abq_width.cuh"

// Products with weights of three bits a code.
//
// KERNEL_NAME(abq3_stream_1_1)
// KERNEL_NAME(abq3_stream_1_2)
// KERNEL_NAME(abq3_stream_2_2)
// KERNEL_NAME(abq3_panel_4_1)
// KERNEL_NAME(abq3_panel_8_1)
// KERNEL_NAME(abq3_decode)
// KERNEL_NAME(abq3_bits_1)
// KERNEL_NAME(abq3_bits_2)
// KERNEL_NAME(abq3_bytes_1)
// KERNEL_NAME(abq3_bytes_2)
// KERNEL_NAME(abq3_bytes_8)
#define WIDTH 3
#include "abq_width.cuh"

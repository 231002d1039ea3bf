// Sums and maxima over the lanes of a warp.
#pragma once
#include "device.cuh"

// The sum over all lanes, the same in each: lanes 16 apart are added first, then 8, 4, 2 and 1 apart.
DEVICE float warp_sum(float x) {
    for (int distance = 16; distance; distance /= 2) x = __fadd_rn(x, __shfl_xor_sync(ALL_LANES, x, distance));
    return x;
}

// The largest value over all lanes; a NaN counts as less than everything.
DEVICE float warp_max(float x) {
    for (int distance = 16; distance; distance /= 2) {
        float other = __shfl_xor_sync(ALL_LANES, x, distance);
        x = other > x ? other : x;
    }
    return x;
}

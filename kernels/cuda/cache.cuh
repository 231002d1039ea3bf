// Where a layer's cache holds keys and values, in BF16.
//
//   keys    [kv_heads][positions][width]            a row a position
//   values  [kv_heads][positions / 8][width][8]     eight positions of a feature are one vector of 16 bytes
//
// Several sequences lie one after the other. Positions are the capacity rounded up to a multiple of eight, and the width is that of a head; a key's features beyond the head
// are zeros, a value's are never read.
#pragma once
#include "device.cuh"

DEVICE u64 cache_positions(u64 capacity) { return (capacity + 7) / 8 * 8; }
DEVICE u32 cache_width(u32 head_dim) { return (head_dim + 7) / 8 * 8; }

// The element of a head's feature at a position: of keys, and of values.
DEVICE u64 key_place(u64 capacity, u32 head_dim, u32 head, u64 position, u32 feature) {
    return (head * cache_positions(capacity) + position) * cache_width(head_dim) + feature;
}
DEVICE u64 value_place(u64 capacity, u32 head_dim, u32 head, u64 position, u32 feature) {
    return ((head * cache_positions(capacity) + position / 8 * 8) * cache_width(head_dim) + 8 * feature) + position % 8;
}

// Elements of the keys, or of the values, of a sequence.
DEVICE u64 cache_elements(u64 capacity, u32 head_dim, u32 kv_heads) {
    return kv_heads * cache_positions(capacity) * cache_width(head_dim);
}

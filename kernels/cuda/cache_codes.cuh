// Where a layer's cache holds keys and values as codes of 8 or 4 bits, with a scale and a zero point for each group of features.
//
//   keys, values of a sequence: codes | scales F32 [kv_heads][positions][groups] | zero points U8 [kv_heads][positions][groups]
//   codes of keys    [kv_heads][positions][bytes]          a row a position
//   codes of values  [kv_heads][positions / 8][bytes][8]   eight positions of a byte are one vector of 8 bytes
//
// A group is 128 features. Byte i of 8 bits is feature i; of 4 bits feature i, and i + bytes in the upper half. Bytes are a multiple of 8;
// positions are those of cache.cuh. A sequence begins where the one before it ends. Codes beyond a head mean nothing.
//
//   low = min(x, 0)   high = max(x, 0)   scale = (high - low) / (2^bits - 1), 1 where that is 0   zero = round(-low / scale)
//   code = round(x / scale) + zero; both kept in 0 .. 2^bits - 1      F32, each operation rounded; halves go to the even integer
//   x stands for scale (code - zero)
#pragma once
#include "cache.cuh"

constexpr u32 GROUP_FEATURES = 128;
// Of a head of at most 256 features.
constexpr u32 MOST_GROUPS = 2;

DEVICE u32 code_groups(u32 head_dim) { return (head_dim + GROUP_FEATURES - 1) / GROUP_FEATURES; }
DEVICE u32 code_bytes(u32 head_dim, u32 bits) { return ((bits == 8 ? head_dim : (head_dim + 1) / 2) + 7) / 8 * 8; }

// Codes, scales and zero points of the keys, or of the values, of a sequence.
template <typename Byte, typename Float>
struct Coded {
    Byte* codes;
    Float* scales;
    Byte* zeros;

    // Of sequence number `place`, in memory that begins at `all`.
    DEVICE_METHOD static Coded of(Byte* all, u32 place, u64 capacity, u32 head_dim, u32 kv_heads, u32 bits) {
        u64 heads = kv_heads * cache_positions(capacity);
        u32 bytes = code_bytes(head_dim, bits), groups = code_groups(head_dim);
        Byte* codes = all + place * (heads * (bytes + 5 * groups));
        Float* scales = (Float*)(codes + heads * bytes);
        return {codes, scales, (Byte*)(scales + heads * groups)};
    }
};

// The scale and zero point of a group at a position.
DEVICE u64 grid_place(u64 capacity, u32 groups, u32 head, u64 position, u32 group) {
    return (head * cache_positions(capacity) + position) * groups + group;
}
// A byte of the codes of a key, and of a value.
DEVICE u64 key_code_place(u64 capacity, u32 bytes, u32 head, u64 position, u32 byte) {
    return (head * cache_positions(capacity) + position) * bytes + byte;
}
DEVICE u64 value_code_place(u64 capacity, u32 bytes, u32 head, u64 position, u32 byte) {
    return (head * cache_positions(capacity) + position / 8 * 8) * bytes + 8 * byte + position % 8;
}

DEVICE float stands_for(float scale, u32 code, u32 zero) { return __fmul_rn(scale, __fsub_rn((float)code, (float)zero)); }

// DFloat11 to plain BF16 (docs/format.md, section 4.3).
//
//   a block of threads = one 4,096-byte block of the stream at a time, two windows (16 bytes) a thread
//   pass 1: how many codes start in the two windows -> prefix sums tell where each thread's symbols go
//   pass 2: the exponents go to shared memory in order; then the block joins them with sign and mantissa, four at a time
//
// Both passes look the next 11 bits up in a table in shared memory that gives up to two symbols; longer codes walk the
// format's own tables. Whatever the bytes hold, no access leaves a buffer and every step moves on by a bit at least.
#include "device.cuh"

constexpr u32 THREADS = 256;
constexpr u32 BLOCK_BYTES = 4096;
constexpr u32 GAP_BYTES = 320;
constexpr u32 TABLE_BITS = 11;
// Bits of a thread's two windows: it takes the codes that start in them.
constexpr u32 OWN_BITS = 128;

// The stream from a thread's windows on: 64 bits at hand, of which `used` (below 32) are gone, and 96 to come.
struct Bits {
    u32 high, low, next[3], used, taken;

    DEVICE_METHOD u32 peek() const { return __funnelshift_l(low, high, used); }
    DEVICE_METHOD void skip(u32 count) {
        used += count;
        taken += count;
        if (used >= 32) {
            used -= 32;
            high = low, low = next[0], next[0] = next[1], next[1] = next[2], next[2] = 0;
        }
    }
};

// One or two symbols: the first in bits 0..7, the second in 8..15, the bits of the first in 16..23, of all in 24..31. Equal
// lengths: one symbol. Zero: the code is longer than the table's index.
struct Tables {
    const u32* pairs;
    const u8* luts;
    u32 rows;

    // A code that the table does not hold, by the format's rows.
    DEVICE_METHOD u32 walk(u32 bits) const {
        u32 row = 0, entry = 0;
        for (u32 depth = 0; depth < 4; depth++) {
            entry = luts[row * 256 + (bits >> (24 - 8 * depth) & 255)];
            if (entry < 240 || 256 - entry >= rows) break;
            row = 256 - entry;
        }
        u32 length = luts[rows * 256 + entry];
        // Only damaged tables have no length here; the walk goes on all the same.
        length = length == 0 || length > 32 ? 1 : length;
        return entry | length << 16 | length << 24;
    }
    DEVICE_METHOD u32 look_up(u32 bits) const {
        u32 pair = pairs[bits >> (32 - TABLE_BITS)];
        return pair != 0 ? pair : walk(bits);
    }
};

// The codes that start before OWN_BITS, one call of `take` for each.
template <typename Take>
DEVICE void for_each_symbol(Bits bits, const Tables& tables, Take take) {
    while (bits.taken < OWN_BITS) {
        u32 pair = tables.look_up(bits.peek()), first = pair >> 16 & 255, both = pair >> 24;
        take(pair & 255);
        if (both != first && bits.taken + first < OWN_BITS) {
            take(pair >> 8 & 255);
            bits.skip(both);
        } else {
            bits.skip(first);
        }
    }
}

// stream: whole blocks and 16 bytes more. gaps: 5 bits a window, most significant first. positions: blocks + 1 entries that
// ascend. pairs: 2^11 entries. luts: `rows` rows, then lengths. capacity: most symbols of a block. out: as many words as
// there are symbols.
extern "C" __global__ void __launch_bounds__(THREADS)
decode_dfloat11(const u8* stream, const u8* gaps, const u32* positions, const u8* sign_mantissa, const u32* pairs,
                const u8* luts, u32 rows, u32 blocks, u32 capacity, u16* out) {
    Shared shared;
    u32* table = shared.take<u32>(1 << TABLE_BITS);
    u32* of_warps = shared.take<u32>(THREADS / WARP);
    u8* exponents = shared.take<u8>(capacity + 8);
    u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    for (u32 i = thread; i < 1 << TABLE_BITS; i += THREADS) table[i] = pairs[i];
    Tables tables = {table, luts, rows};
    for (u32 block = blockIdx.x; block < blocks; block += gridDim.x) {
        // Also: the table is filled, and the last block's symbols are no longer needed.
        __syncthreads();
        const u8* own = stream + (u64)block * BLOCK_BYTES + thread * 16;
        uint4 words = load_once((const uint4*)own);
        u32 after = load_once((const u32*)(own + 16));
        Bits bits;
        // The stream's first byte is the most significant.
        bits.high = __byte_perm(words.x, 0, 0x0123);
        bits.low = __byte_perm(words.y, 0, 0x0123);
        bits.next[0] = __byte_perm(words.z, 0, 0x0123);
        bits.next[1] = __byte_perm(words.w, 0, 0x0123);
        bits.next[2] = __byte_perm(after, 0, 0x0123);
        // Window 2 t of the block: bits 10 t .. 10 t + 4 of its gaps.
        u32 at = 10 * thread, byte = at / 8;
        const u8* gap_bytes = gaps + (u64)block * GAP_BYTES;
        u32 two = (u32)gap_bytes[byte] << 8 | (byte + 1 < GAP_BYTES ? gap_bytes[byte + 1] : 0);
        u32 gap = two >> (11 - at % 8) & 31;
        bits.used = bits.taken = gap;

        u32 count = 0;
        for_each_symbol(bits, tables, [&](u32) { count++; });
        u32 sum = count;
        for (u32 distance = 1; distance < WARP; distance *= 2) {
            u32 below = __shfl_up_sync(ALL_LANES, sum, distance);
            if (lane >= distance) sum += below;
        }
        if (lane == WARP - 1) of_warps[warp] = sum;
        __syncthreads();
        u32 start = sum - count, total = 0;
        for (u32 w = 0; w < THREADS / WARP; w++) {
            if (w == warp) start += total;
            total += of_warps[w];
        }
        // What follows the last symbol in the stream decodes to something: the positions tell where it ends.
        u32 first = positions[block];
        total = min(min(total, positions[block + 1] - first), capacity);
        // The exponents lie as far from a multiple of four as the output.
        u32 offset = first % 4;
        for_each_symbol(bits, tables, [&](u32 symbol) {
            if (start < total) exponents[offset + start] = (u8)symbol;
            start++;
        });
        __syncthreads();

        const u8* signs = sign_mantissa + first;
        u16* to = out + first;
        u32 head = min((4 - offset) % 4, total);
        if (thread < head) {
            u32 sm = signs[thread];
            to[thread] = (u16)((sm & 0x80) << 8 | (u32)exponents[offset + thread] << 7 | (sm & 0x7f));
        }
        u32 fours = (total - head) / 4;
        for (u32 i = thread; i < fours; i += THREADS) {
            u32 place = head + 4 * i;
            u32 sm = load_once((const u32*)(signs + place)), e = *(const u32*)(exponents + offset + place);
            uint2 four;
            u32 s = __byte_perm(sm, 0, 0x4140);
            four.x = (s & 0x007f007fu) | __byte_perm(e, 0, 0x4140) << 7 | (s << 8 & 0x80008000u);
            s = __byte_perm(sm, 0, 0x4342);
            four.y = (s & 0x007f007fu) | __byte_perm(e, 0, 0x4342) << 7 | (s << 8 & 0x80008000u);
            *(uint2*)(to + place) = four;
        }
        u32 tail = head + 4 * fours + thread;
        if (tail < total) {
            u32 sm = signs[tail];
            to[tail] = (u16)((sm & 0x80) << 8 | (u32)exponents[offset + tail] << 7 | (sm & 0x7f));
        }
    }
}

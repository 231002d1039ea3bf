// DFloat11 to plain BF16 (docs/format.md, section 4.3), and FP8 weights in the same stream, times their scales (section 4.11).
//
//   a block of threads = one 4,096-byte block of the stream at a time, two windows (16 bytes) a thread
//   how many codes start in a thread's windows is counted once, when a unit is loaded -> prefix sums tell where its symbols go
//   the exponents go to shared memory in order; then the block joins them with sign and mantissa, eight at a time
//
// The next 10 bits are looked up in a table in shared memory that gives up to four symbols; longer codes walk the format's own
// tables. Whatever the bytes hold, no access leaves a buffer and every step moves on by a bit at least.
#include "device.cuh"

constexpr u32 THREADS = 256;
constexpr u32 BLOCK_BYTES = 4096;
constexpr u32 GAP_BYTES = 320;
constexpr u32 TABLE_BITS = 10;
constexpr u32 LINK_BITS = 5;
// Blocks that a multiprocessor should hold: all threads that it has room for.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 870 || __CUDA_ARCH__ == 890)
constexpr u32 RESIDENT = 6;
#else
constexpr u32 RESIDENT = 8;
#endif

// What a thread has of a block, as it lies in memory.
struct Windows {
    uint4 words;
    u32 after, gap_bits;

    DEVICE_METHOD void load(const u8* stream, const u8* gaps, u32 block, u32 thread) {
        const u8* own = stream + (u64)block * BLOCK_BYTES + thread * 16;
        words = load_once((const uint4*)own);
        after = load_once((const u32*)(own + 16));
        // Window 2 t of the block: bits 10 t .. 10 t + 4 of its gaps.
        u32 byte = 10 * thread / 8;
        const u8* gap_bytes = gaps + (u64)block * GAP_BYTES;
        gap_bits = (u32)gap_bytes[byte] << 8 | (byte + 1 < GAP_BYTES ? gap_bytes[byte + 1] : 0);
    }
    DEVICE_METHOD u32 gap(u32 thread) const { return gap_bits >> (11 - 10 * thread % 8) & 31; }
};

// The stream from a thread's windows on: 64 bits at hand, and 96 to come.
struct Bits {
    u32 high, low, next[3];

    // The stream's first byte is the most significant.
    DEVICE_METHOD Bits(const Windows& w) {
        high = __byte_perm(w.words.x, 0, 0x0123);
        low = __byte_perm(w.words.y, 0, 0x0123);
        next[0] = __byte_perm(w.words.z, 0, 0x0123);
        next[1] = __byte_perm(w.words.w, 0, 0x0123);
        next[2] = __byte_perm(w.after, 0, 0x0123);
    }
    // What comes after `used` % 32 bits.
    DEVICE_METHOD u32 peek(u32 used) const { return __funnelshift_l(low, high, used); }
    // Beyond the last word comes anything.
    DEVICE_METHOD void skip_word() { high = low, low = next[0], next[0] = next[1], next[1] = next[2]; }
};

// The code at the front of `bits`, by the format's rows: its symbol, and its length 16 bits up.
DEVICE u32 walk(const u8* luts, u32 rows, u32 bits) {
    u32 row = 0, entry = 0;
    for (u32 depth = 0; depth < 4; depth++) {
        entry = luts[row * 256 + (bits >> (24 - 8 * depth) & 255)];
        if (entry < 240 || 256 - entry >= rows) break;
        row = 256 - entry;
    }
    u32 length = luts[rows * 256 + entry];
    // Only damaged tables have no length here; the walk goes on all the same.
    length = length == 0 || length > 32 ? 1 : length;
    return entry | length << 16;
}

#ifndef LLMPRESS_STEP
// Bits of a thread's two windows: it takes the codes that start in them.
constexpr u32 OWN_BITS = 128;

// counts: a byte for each thread of each block: how many codes start in its windows. At most 128 do. One block of threads a
// block. luts: `rows` rows, then lengths.
extern "C" __global__ void __launch_bounds__(THREADS)
count_dfloat11(const u8* stream, const u8* gaps, const u8* luts, u32 rows, u8* counts) {
    Windows windows;
    windows.load(stream, gaps, blockIdx.x, threadIdx.x);
    u32 taken = windows.gap(threadIdx.x), count = 0;
    Bits bits(windows);
    for (; taken < OWN_BITS; count++) {
        u32 before = taken;
        taken += walk(luts, rows, bits.peek(taken)) >> 16;
        if ((taken ^ before) & 32) bits.skip_word();
    }
    counts[(u64)blockIdx.x * THREADS + threadIdx.x] = (u8)count;
}
#endif

// Two weights: sign and mantissa of each in two bytes of `sm`, the exponents in bytes 0 and 2 of `e`.
DEVICE u32 two_weights(u32 sm, u32 e) { return (sm & 0x807f807fu) | e << 7; }
DEVICE u16 one_weight(u32 sm, u32 e) { return (u16)((sm & 0x80) << 8 | e << 7 | (sm & 0x7f)); }

// What FP8 weights are multiplied with: a scale for every block of `height` rows and `width` columns. Rows are a multiple of eight
// long, and blocks as wide as that or as a row, so that eight weights in a row share a scale.
struct Scales {
    const float* values;
    u32 cols, height, width;

    DEVICE_METHOD float at(u32 element) const {
        u32 row = element / cols, col = element - row * cols;
        return values[row / height * ((cols + width - 1) / width) + col / width];
    }
};

// An FP8 weight (E4M3) times its scale, rounded to BF16: `half` is its sign and mantissa, e its exponent.
DEVICE float scaled_weight(u32 half, u32 e, float scale) {
    float value = e ? __uint_as_float((e + 120) << 23 | (half & 7) << 20) : __fmul_rn((float)(half & 7), 0.001953125f);
    return __fmul_rn(__uint_as_float(__float_as_uint(value) | (half & 8) << 28), scale);
}
// Exponents are below 16 in bytes of `e`; what is no number stays none, with one pattern of bits.
DEVICE u32 two_scaled(u32 halves, u32 e, float scale) {
    u32 low = e & 15, high = e >> 8 & 15;
    u32 both = floats_to_bf16x2(scaled_weight(halves & 15, low, scale), scaled_weight(halves >> 4 & 15, high, scale));
    if (low == 15 && (halves & 7) == 7) both = (both & 0xffff0000u) | 0x7fc0;
    if (high == 15 && (halves >> 4 & 7) == 7) both = (both & 0xffffu) | 0x7fc00000u;
    return both;
}

// stream: whole blocks and 16 bytes more. gaps: 5 bits a window, most significant first. positions: blocks + 1 entries that
// ascend. table: `entries` of up to four symbols in x, the first in the lowest bits, and in y the bits that they take together
// and, 16 bits up, eight times their number. The first 2^10 are those of the next 10 bits; zero in y: the code is longer, and x
// is where the 2^5 entries of the next 5 bits begin; zero there too: its rows must be walked. capacity: most symbols of a
// block. out: as many words as there are symbols, at a multiple of 16 bytes.
//
// owners: none, or of each block whose weights it holds: bit 31 where some belong to no expert, and two experts, each by its number
// plus one at bits 0 and 15, both 0x7fff where there are more. Then only blocks with bit 31 are decoded, or with `wanted` those of
// experts for which it is not zero.
//
// FP8: `sign_mantissa` has half a byte a weight, and `scales` what they are multiplied with.
template <bool FP8>
DEVICE void decode(const u8* stream, const u8* gaps, const u32* positions, const u8* counts, const u8* sign_mantissa,
                   const uint2* table, u32 entries, const u8* luts, u32 rows, u32 blocks, u32 capacity, u16* out,
                   const u32* owners, const u32* wanted, Scales scales) {
    let_later_begin();
    Shared shared;
    uint2* symbols = shared.take<uint2>(entries);
    u32* first_words = shared.take<u32>(THREADS);
    u32* of_warps = shared.take<u32>(THREADS / WARP);
    u8* exponents = shared.take<u8>(capacity + 16);
    u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    // The first block from `from` on that is decoded: lanes look at one each.
    auto next = [&](u32 from) {
        if (!owners) return from;
        while (from < blocks) {
            u32 own = from + lane * gridDim.x, owner = own < blocks && own >= from ? owners[own] : 0;
            u32 one = owner & 0x7fff, other = owner >> 15 & 0x7fff;
            bool needed = owner >> 31;
            if (wanted) {
                needed = (one == 0x7fff && other == 0x7fff) || (one && one < 0x7fff && wanted[one - 1]) ||
                         (other && other < 0x7fff && wanted[other - 1]);
            }
            u32 those = __ballot_sync(ALL_LANES, needed);
            if (those) return from + (u32)(__ffs(those) - 1) * gridDim.x;
            u32 after = from + WARP * gridDim.x;
            if (after < from) return blocks;
            from = after;
        }
        return blocks;
    };
    // An earlier kernel says what is wanted.
    if (wanted) wait_for_earlier();
    u32 block = next(blockIdx.x), count = 0;
    Windows windows;
    if (block < blocks) {
        windows.load(stream, gaps, block, thread);
        count = counts[(u64)block * THREADS + thread];
    }
    for (u32 i = thread; i < entries; i += THREADS) symbols[i] = table[i];
    // What is written next, products before may still read.
    wait_for_earlier();
    while (block < blocks) {
        u32 first = positions[block], total = positions[block + 1] - first;
        u32 sum = count;
        for (u32 distance = 1; distance < WARP; distance *= 2) {
            u32 below = __shfl_up_sync(ALL_LANES, sum, distance);
            if (lane >= distance) sum += below;
        }
        if (lane == WARP - 1) of_warps[warp] = sum;
        // Also: the table is filled, and the last block's symbols are no longer needed.
        __syncthreads();
        u32 start = sum - count, all = 0;
        for (u32 w = 0; w < THREADS / WARP; w++) {
            if (w == warp) start += all;
            all += of_warps[w];
        }
        // What follows the last symbol in the stream decodes to something: the positions tell where it ends.
        total = min(min(total, all), capacity);
        // The exponents lie as far from a multiple of eight as the output.
        u32 offset = first % 8;
        u32 from = offset + start, end = offset + min(start + count, total);
        if (from < end) {
            Bits bits(windows);
            // Symbols are gathered to words of four. A word whose beginning belongs to another thread goes elsewhere first.
            u32 first_word = from & ~3u;
            u32* at = from % 4 ? first_words + thread : (u32*)(exponents + first_word);
            u32* next_at = (u32*)(exponents + first_word) + 1;
            // Bits that are used of the first word at hand and, 16 bits up, that are filled from the first word on.
            u32 state = windows.gap(thread) | from % 4 << 19, word = 0, more;
            u32 limit = opaque((end - first_word) << 19);
            while (true) {
                u32 front = bits.peek(state);
                uint2 entry = symbols[front >> (32 - TABLE_BITS)];
                if (entry.y == 0) {
                    u32 link = entry.x;
                    if (link) entry = symbols[link + (front >> (32 - TABLE_BITS - LINK_BITS) & ((1 << LINK_BITS) - 1))];
                    if (entry.y == 0) {
                        u32 code = walk(luts, rows, front);
                        entry = make_uint2(code & 255, code >> 16 | 8 << 16);
                    }
                }
                word |= __funnelshift_l(0, entry.x, state >> 16);
                more = __funnelshift_l(entry.x, 0, state >> 16);
                u32 after = state + entry.y;
                if (after >= limit) break;
                if ((after ^ state) & 0xffe00000u) {
                    *at = word;
                    at = next_at++;
                    word = more;
                }
                if (after & 32) {
                    bits.skip_word();
                    after -= 32;
                }
                state = after;
            }
            u32 place = first_word + (state >> 21) * 4;
            if (from % 4 && place != first_word) {
                u32 whole = first_words[thread];
#pragma unroll
                for (u32 i = 1; i < 4; i++) {
                    if (i >= from % 4) exponents[first_word + i] = (u8)(whole >> 8 * i);
                }
            }
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                if (place + i >= from && place + i < end) {
                    exponents[place + i] = (u8)((i < 4 ? word : more) >> 8 * (i % 4));
                }
            }
        }
        block = next(block + gridDim.x);
        // The next block's are under way while this one's are joined.
        if (block < blocks) {
            windows.load(stream, gaps, block, thread);
            count = counts[(u64)block * THREADS + thread];
        }
        __syncthreads();

        u16* to = out + first;
        const u8* own = exponents + offset;
        u32 head = min((8 - offset) % 8, total);
        u32 eights = (total - head) / 8;
        u32 tail = head + 8 * eights + thread;
        if constexpr (FP8) {
            auto single = [&](u32 place) {
                u32 element = first + place;
                u32 half = sign_mantissa[element / 2] >> 4 * (element % 2) & 15;
                to[place] = (u16)two_scaled(half, own[place], scales.at(element));
            };
            if (thread < head) single(thread);
            if (tail < total) single(tail);
            const u32* halves = (const u32*)(sign_mantissa + (first + head) / 2);
            for (u32 i = thread; i < eights; i += THREADS) {
                u32 place = head + 8 * i, h = load_once(halves + i);
                float scale = scales.at(first + place);
                uint2 e = *(const uint2*)(own + place);
                uint4 words;
                words.x = two_scaled(h, e.x, scale);
                words.y = two_scaled(h >> 8, e.x >> 16, scale);
                words.z = two_scaled(h >> 16, e.y, scale);
                words.w = two_scaled(h >> 24, e.y >> 16, scale);
                *(uint4*)(to + place) = words;
            }
            continue;
        }
        const u8* signs = sign_mantissa + first;
        if (thread < head) to[thread] = one_weight(signs[thread], own[thread]);
        auto join = [&](u32 i, uint2 sm) {
            u32 place = head + 8 * i;
            uint2 e = *(const uint2*)(own + place);
            uint4 words;
            words.x = two_weights(__byte_perm(sm.x, 0, 0x1100), __byte_perm(e.x, 0, 0x4140));
            words.y = two_weights(__byte_perm(sm.x, 0, 0x3322), __byte_perm(e.x, 0, 0x4342));
            words.z = two_weights(__byte_perm(sm.y, 0, 0x1100), __byte_perm(e.y, 0, 0x4140));
            words.w = two_weights(__byte_perm(sm.y, 0, 0x3322), __byte_perm(e.y, 0, 0x4342));
            *(uint4*)(to + place) = words;
        };
        const uint2* from_signs = (const uint2*)(signs + head);
        u32 i = thread;
        // Two loads are under way at a time.
        for (; i + THREADS < eights; i += 2 * THREADS) {
            uint2 one = load_once(from_signs + i), other = load_once(from_signs + i + THREADS);
            join(i, one);
            join(i + THREADS, other);
        }
        if (i < eights) join(i, load_once(from_signs + i));
        if (tail < total) to[tail] = one_weight(signs[tail], own[tail]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
decode_dfloat11(const u8* stream, const u8* gaps, const u32* positions, const u8* counts, const u8* sign_mantissa,
                const uint2* table, u32 entries, const u8* luts, u32 rows, u32 blocks, u32 capacity, u16* out,
                const u32* owners, const u32* wanted) {
    decode<false>(stream, gaps, positions, counts, sign_mantissa, table, entries, luts, rows, blocks, capacity, out, owners,
                  wanted, Scales{});
}

// scales: F32 [ceil(rows of the matrix / height), ceil(cols / width)].
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
decode_dfloat8(const u8* stream, const u8* gaps, const u32* positions, const u8* counts, const u8* sign_mantissa,
               const uint2* table, u32 entries, const u8* luts, u32 rows, u32 blocks, u32 capacity, u16* out,
               const float* scales, u32 cols, u32 height, u32 width) {
    decode<true>(stream, gaps, positions, counts, sign_mantissa, table, entries, luts, rows, blocks, capacity, out, nullptr,
                 nullptr, Scales{scales, cols, height, width});
}

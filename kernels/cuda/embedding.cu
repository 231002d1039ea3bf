// Rows of the embedding, widened and scaled: the first residual stream.
#include "device.cuh"

// h[token][i] = table[ids[token]][i] * scale, the table's rows `stride` apart. One block a token. An id beyond the vocabulary reads
// the last row.
template <typename Word, float (*widen)(Word)>
DEVICE void embed(const Word* table, u64 vocab, u32 hidden, u32 stride, const u32* ids, float scale, float* h) {
    let_later_begin();
    wait_for_earlier();
    u64 row = min((u64)ids[blockIdx.x], vocab - 1);
    for (u32 i = threadIdx.x; i < hidden; i += blockDim.x) {
        h[(u64)blockIdx.x * hidden + i] = __fmul_rn(widen(table[row * stride + i]), scale);
    }
}

DEVICE float same(float x) { return x; }

extern "C" __global__ void __launch_bounds__(256)
embed_bf16(const u16* table, u64 vocab, u32 hidden, u32 stride, const u32* ids, float scale, float* h) {
    embed<u16, bf16_to_float>(table, vocab, hidden, stride, ids, scale, h);
}

extern "C" __global__ void __launch_bounds__(256)
embed_f16(const u16* table, u64 vocab, u32 hidden, u32 stride, const u32* ids, float scale, float* h) {
    embed<u16, half_to_float>(table, vocab, hidden, stride, ids, scale, h);
}

extern "C" __global__ void __launch_bounds__(256)
embed_f32(const float* table, u64 vocab, u32 hidden, u32 stride, const u32* ids, float scale, float* h) {
    embed<float, same>(table, vocab, hidden, stride, ids, scale, h);
}

// h[token][i] += table[position][i]: learned embeddings of positions, `rows` of them. Tokens are those of several sequences, `each` of one: the first
// of sequence s is at position positions[s]. A position beyond the table reads its last row. One block a token.
extern "C" __global__ void __launch_bounds__(256)
add_positions(const float* table, u32 rows, u32 hidden, const u32* positions, u32 each, float* h) {
    let_later_begin();
    wait_for_earlier();
    u64 row = min(positions[blockIdx.x / each] + blockIdx.x % each, rows - 1);
    for (u32 i = threadIdx.x; i < hidden; i += blockDim.x) {
        float* to = h + (u64)blockIdx.x * hidden + i;
        *to = __fadd_rn(*to, table[row * hidden + i]);
    }
}

// The same from tiles of fixed12 (fixed12.cu). A tile's escapes ascend by place, so each is found by bisection.
extern "C" __global__ void __launch_bounds__(256)
embed_fixed12(const u8* sign_mantissa, const u8* codes, const u32* escape_offsets, const u32* escapes, const u32* bases,
              u64 vocab, u32 hidden, const u32* ids, float scale, float* h) {
    let_later_begin();
    wait_for_earlier();
    u64 row = min((u64)ids[blockIdx.x], vocab - 1);
    u32 in_tile = (u32)(row % 16);
    u64 across = (hidden + 63) / 64;
    u32 base = bases[row / 16] >> 23;
    for (u32 i = threadIdx.x; i < hidden; i += blockDim.x) {
        u64 tile = row / 16 * across + i / 64;
        u32 column = i % 64, half = column / 32, lane = 4 * (in_tile % 8) + column % 32 / 8;
        u32 byte = sign_mantissa[tile * 1024 + 512 * half + 16 * lane + 8 * (in_tile / 8) + column % 8];
        // Column 2j of the eight is at bits 4j of the lane's word, column 2j + 1 at bits 16 + 4j.
        u32 shift = column % 8 / 2 * 4 + column % 2 * 16;
        u32 code = codes[tile * 512 + 16 * lane + 8 * half + 4 * (in_tile / 8) + shift / 8] >> (shift % 8) & 15;
        u32 exponent = base + (byte >> 7) + code;
        u32 first = escape_offsets[tile], end = escape_offsets[tile + 1];
        u32 wanted = ((2 * half + column % 8 / 4) * 32 + lane) * 8 + column % 4 / 2 * 4 + in_tile / 8 * 2 + column % 2;
        while (first < end) {
            u32 middle = first + (end - first) / 2, escape = escapes[middle], place = escape & 1023;
            if (place == wanted) {
                exponent = escape >> 23;
                break;
            }
            if (place < wanted) {
                first = middle + 1;
            } else {
                end = middle;
            }
        }
        u16 word = (u16)((byte & 0x80) << 8 | exponent << 7 | (byte & 0x7f));
        h[(u64)blockIdx.x * hidden + i] = __fmul_rn(bf16_to_float(word), scale);
    }
}

// Runs a grid on one thread of the processor, block after block, and checks every access.
//
//   a CUDA thread = a fiber with its own stack; it runs until it meets a barrier or an operation of its warp
//   an access     = a call that the compiler's thread sanitizer put in (__tsan_read4 and the like, defined below)
//
// What is checked, and how:
//   bounds, alignment    against the list of buffers; pieces of shared memory have red zones between them
//   uninitialised reads  a bit for each byte of shared memory
//   races                for each byte who wrote and read it last, and in which epoch: a barrier starts an epoch for the
//                        block, __syncwarp one for its warp. Two threads may not touch a byte in one epoch if one writes.
//                        Global memory: bytes written by the launch are remembered for its whole grid.
//   overlapping launches a launch that may begin before earlier ones have ended: until a thread has waited for them, it
//                        writes nothing and reads nothing that they write
//   barriers             when nobody can go on, somebody waits for a thread that never comes

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <bitset>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include "registry.h"

typedef uint32_t u32;
typedef int32_t i32;
typedef uint64_t u64;
typedef unsigned long long ull;

namespace {

constexpr u32 MAX_THREADS = 1024;
constexpr u32 LANES = 32;
constexpr u32 ALL_LANES = 0xffffffffu;
constexpr size_t STACK_BYTES = 128 << 10;
constexpr u32 MAX_SHARED = 227 << 10;
constexpr u32 RED_ZONE = 16;
constexpr size_t PAGE_BYTES = 4096;
// Accesses of a thread that meets no other, and of a launch, after which it counts as endless.
constexpr u64 MAX_ACCESSES_ALONE = 1ull << 26;
constexpr u64 MAX_ACCESSES = 1ull << 34;

struct Index3 {
    u32 x, y, z;
};

// ---- global memory -----------------------------------------------------------------------------------------------

// Who wrote a byte in this launch.
struct Written {
    u32 block, epoch, warp_epoch;
    uint16_t thread;
    bool is, atomic;
};

typedef std::bitset<PAGE_BYTES> Bytes;

struct Buffer {
    unsigned char* data;
    size_t bytes;
    u64 number;
    bool written = false;
    std::vector<std::unique_ptr<Written[]>> pages;
    // What earlier launches write that a launch may overlap with.
    std::vector<std::unique_ptr<Bytes>> earlier;
};

struct Device {
    std::map<uintptr_t, Buffer> buffers;
    u64 next_number = 0;
    std::vector<std::pair<Buffer*, size_t>> dirty;
    // Buffers that such launches write.
    std::vector<Buffer*> unsettled;
    char fault[512];

    // All launches have ended.
    void settle() {
        for (Buffer* buffer : unsettled) buffer->earlier.clear();
        unsettled.clear();
    }

    Buffer* find(uintptr_t address) {
        auto it = buffers.upper_bound(address);
        if (it == buffers.begin()) return nullptr;
        --it;
        return address - it->first < it->second.bytes ? &it->second : nullptr;
    }
};

// ---- a block -----------------------------------------------------------------------------------------------------

enum State : unsigned char { READY, AT_BARRIER, AT_WARP, FINISHED };

struct Copy {
    unsigned char* to;
    unsigned char data[16];
    u32 bytes;
    u32 group;
};

struct Fiber {
    jmp_buf resume;
    ucontext_t context;
    unsigned char* stack = nullptr;
    bool started = false;
    // Whether it waited for earlier launches.
    bool waited = false;
    State state = FINISHED;
    u32 thread = 0;
    u32 group = 0;
    std::vector<Copy> copies;
};

enum Operation : unsigned char { NONE, SYNC, SHUFFLE, BALLOT, MMA, MMA_U8, MMA_B1, MMA_SPARSE, MMA_SPARSE_UPPER, MATRICES };
const char* const OPERATION_NAMES[] = {"", "__syncwarp", "a shuffle", "a vote", "mma", "mma of bytes", "mma of bits", "mma of two in four",
                                       "mma of two in four by upper lanes", "a load of matrices"};

struct Payload {
    u64 words[7];
};

struct Warp {
    Operation operation = NONE;
    u32 arrived = 0;
    u32 turn = 0;
    u32 epoch = 0;
    // Two, since a lane may be at the next operation before others have read the results of this one.
    Payload payload[2][LANES];
};

constexpr uint16_t NOBODY = 0, SEVERAL = 0xffff, SEVERAL_WARPS = 0xfffe;

// The last write and read of a byte of shared memory. Threads count from 1.
struct Shadow {
    uint16_t writer, reader;
    u32 write_epoch, read_epoch, write_warp_epoch, read_warp_epoch;
    uint16_t reader_warp;
    bool valid, initialised, pending, atomic;
};

struct Piece {
    u32 used, bytes, start;
};

struct Runtime {
    Device* device = nullptr;
    const Kernel* kernel = nullptr;
    const u64* arguments = nullptr;
    Index3 grid, block_index;
    u32 threads = 0, block = 0, shared_bytes = 0;
    u32 epoch = 0, at_barrier = 0;
    u64 accesses = 0, accesses_alone = 0;
    Fiber* current = nullptr;
    jmp_buf scheduler;
    bool failed = false;
    // Whether a thread of this block has made an atomic operation.
    bool told = false;
    // Whether the launch may begin before earlier ones have ended, and what a thread did before it waited for them. It counts
    // where the kernel waits at all: others are launched with no overlap.
    bool overlaps = false, waits = false;
    // Whether it lets the next launch begin early: one that does not has ended when the next begins.
    bool lets = false;
    char early[320];
    Buffer* last = nullptr;
    std::vector<Fiber> fibers;
    Warp warps[MAX_THREADS / LANES];
    unsigned char* shared = nullptr;
    std::vector<Shadow> shadow;
    std::vector<Piece> pieces;
    u32 shared_used = 0;

    Runtime() : fibers(MAX_THREADS) {}
    ~Runtime() {
        for (Fiber& fiber : fibers) {
            if (fiber.stack) munmap(fiber.stack, STACK_BYTES);
        }
        free(shared);
    }
};

thread_local Runtime* runtime_of_thread = nullptr;
thread_local std::unique_ptr<Runtime> owner;

inline Runtime& runtime() { return *runtime_of_thread; }

[[noreturn]] void fault(const char* format, ...) {
    Runtime& r = runtime();
    char what[320];
    va_list list;
    va_start(list, format);
    vsnprintf(what, sizeof what, format, list);
    va_end(list);
    u32 t = r.current ? r.current->thread : 0;
    snprintf(r.device->fault, sizeof r.device->fault, "block (%u, %u, %u), thread %u %s", r.block_index.x,
             r.block_index.y, r.block_index.z, t, what);
    r.failed = true;
    _longjmp(r.scheduler, 1);
}

// ---- checks ------------------------------------------------------------------------------------------------------

enum Access { READ, WRITE, ATOMIC, COPY, FRESH };
const char* const VERBS[] = {"reads", "writes", "changes atomically", "copies in the background to", "reads afresh"};

// Whether an earlier access of `other`, in these epochs, is ordered before what the current thread does now.
inline bool ordered(u32 other, u32 epoch, u32 warp_epoch) {
    Runtime& r = runtime();
    u32 me = r.current->thread;
    if (other == me || epoch != r.epoch) return true;
    return other / LANES == me / LANES && warp_epoch != r.warps[me / LANES].epoch;
}

void check_shared(size_t offset, u32 bytes, Access access) {
    Runtime& r = runtime();
    u32 me = r.current->thread, warp = me / LANES;
    u32 warp_epoch = r.warps[warp].epoch;
    for (u32 i = 0; i < bytes; i++) {
        Shadow& s = r.shadow[offset + i];
        if (!s.valid) {
            fault("%s %u bytes of shared memory outside of every piece, %u bytes in", VERBS[access], bytes,
                  (u32)(offset + i));
        }
        if (s.pending && access != COPY) {
            fault("%s shared memory that cp.async is still copying to: wait for it first", VERBS[access]);
        }
        bool atomics = access == ATOMIC && s.atomic;
        if (s.writer != NOBODY && !atomics && !ordered(s.writer - 1, s.write_epoch, s.write_warp_epoch)) {
            fault("%s shared memory that thread %u writes with no barrier between", VERBS[access], s.writer - 1);
        }
        if (access == READ) {
            if (!s.initialised) fault("reads shared memory that nobody has written");
            if (s.read_epoch != r.epoch || s.reader == NOBODY) {
                s.reader = me + 1, s.reader_warp = warp, s.read_epoch = r.epoch;
            } else if (s.reader_warp != warp) {
                s.reader = SEVERAL_WARPS;
            } else if (s.reader != SEVERAL_WARPS && s.read_warp_epoch != warp_epoch) {
                // The warp met since the others read.
                s.reader = me + 1;
            } else if (s.reader != me + 1 && s.reader != SEVERAL_WARPS) {
                s.reader = SEVERAL;
            }
            s.read_warp_epoch = warp_epoch;
            continue;
        }
        if (s.reader != NOBODY && s.read_epoch == r.epoch && s.reader != me + 1) {
            bool by_warp = s.reader != SEVERAL_WARPS && s.reader_warp == warp && s.read_warp_epoch != warp_epoch;
            if (!by_warp) {
                fault("%s shared memory that another thread reads with no barrier between", VERBS[access]);
            }
        }
        s.writer = me + 1, s.write_epoch = r.epoch, s.write_warp_epoch = warp_epoch;
        s.atomic = access == ATOMIC;
        if (access == ATOMIC && !s.initialised) fault("changes shared memory that nobody has written");
        s.initialised = true;
        s.pending = access == COPY;
    }
}

void check_written(Buffer& buffer, size_t offset, u32 bytes, Access access) {
    Runtime& r = runtime();
    u32 me = r.current->thread;
    if (buffer.pages.empty()) buffer.pages.resize((buffer.bytes + PAGE_BYTES - 1) / PAGE_BYTES);
    for (u32 i = 0; i < bytes; i++) {
        size_t at = offset + i, page = at / PAGE_BYTES;
        if (!buffer.pages[page]) {
            if (access == READ || access == FRESH) continue;
            buffer.pages[page].reset(new Written[PAGE_BYTES]());
            r.device->dirty.push_back({&buffer, page});
        }
        Written& w = buffer.pages[page][at % PAGE_BYTES];
        if (w.is && !(access == ATOMIC && w.atomic)) {
            // What earlier blocks wrote may be read afresh by a block that an atomic told of it.
            bool fine = w.block == r.block ? ordered(w.thread, w.epoch, w.warp_epoch) : access == FRESH && r.told;
            if (!fine) {
                fault("%s byte %zu of buffer %llu, which block %u, thread %u writes with nothing to order the two",
                      VERBS[access], at, (ull)buffer.number, w.block, (u32)w.thread);
            }
        }
        if (access != READ && access != FRESH) {
            w = {r.block, r.epoch, r.warps[me / LANES].epoch, (uint16_t)me, true, access == ATOMIC};
        }
    }
}

// An access to global memory by a thread that has not waited for earlier launches.
void check_early(Buffer& buffer, size_t offset, u32 bytes, Access access) {
    Runtime& r = runtime();
    if (r.early[0]) return;
    bool wrong = access != READ && access != FRESH;
    for (size_t at = offset; at < offset + bytes && !wrong && !buffer.earlier.empty(); at++) {
        const Bytes* page = buffer.earlier[at / PAGE_BYTES].get();
        wrong = page && page->test(at % PAGE_BYTES);
    }
    if (!wrong) return;
    snprintf(r.early, sizeof r.early, "%s byte %zu of buffer %llu before it waits for earlier launches%s", VERBS[access],
             offset, (ull)buffer.number, access == READ || access == FRESH ? ", which write it" : "");
    if (r.waits) fault("%s", r.early);
}

// The first byte of the program or library that this is a part of, and the end of it.
extern "C" __attribute__((visibility("hidden"))) char __ehdr_start, _end;

inline void check(const void* p, u32 bytes, bool aligned, Access access) {
    Runtime* const found = runtime_of_thread;
    if (!found || !found->current) return;
    Runtime& r = *found;
    uintptr_t address = (uintptr_t)p;
    if (address - (uintptr_t)r.current->stack < STACK_BYTES) return;
    if (++r.accesses_alone > MAX_ACCESSES_ALONE) fault("runs without end");
    if (aligned && (address & (bytes - 1))) fault("%s %u bytes at an address that is not aligned", VERBS[access], bytes);
    size_t shared = address - (uintptr_t)r.shared;
    if (shared < MAX_SHARED * 2) {
        if (shared + bytes > r.shadow.size()) {
            fault("%s %u bytes of shared memory, %zu bytes in; the block has %u", VERBS[access], bytes, shared,
                  r.shared_bytes);
        }
        check_shared(shared, bytes, access);
        return;
    }
    Buffer* buffer = r.last;
    if (!buffer || address - (uintptr_t)buffer->data >= buffer->bytes) {
        buffer = r.device->find(address);
        if (!buffer) {
            // Tables and literals of the program itself.
            if (access == READ && p >= &__ehdr_start && p < &_end) return;
            // Say which buffer it is just beyond.
            auto it = r.device->buffers.upper_bound(address);
            if (it != r.device->buffers.begin()) {
                Buffer& near = (--it)->second;
                size_t beyond = address - (uintptr_t)near.data - near.bytes;
                if (beyond < (1 << 20)) {
                    fault("%s %u bytes outside of every buffer, %zu bytes after buffer %llu of %zu bytes", VERBS[access],
                          bytes, beyond, (ull)near.number, near.bytes);
                }
            }
            fault("%s %u bytes at %p, outside of every buffer", VERBS[access], bytes, p);
        }
        r.last = buffer;
    }
    size_t offset = address - (uintptr_t)buffer->data;
    if (offset + bytes > buffer->bytes) {
        fault("%s %u bytes at byte %zu of buffer %llu of %zu bytes", VERBS[access], bytes, offset, (ull)buffer->number,
              buffer->bytes);
    }
    if (r.overlaps && !r.current->waited) check_early(*buffer, offset, bytes, access);
    if (access != READ && access != FRESH) buffer->written = true;
    if (access == ATOMIC) r.told = true;
    if (buffer->written) check_written(*buffer, offset, bytes, access);
}

// ---- fibers ------------------------------------------------------------------------------------------------------

void body_of_fiber() {
    for (;;) {
        Runtime& r = runtime();
        r.kernel->call(r.arguments);
        Fiber* me = runtime().current;
        me->state = FINISHED;
        if (_setjmp(me->resume) == 0) _longjmp(runtime().scheduler, 1);
    }
}

void enter(Fiber& fiber) {
    Runtime& r = runtime();
    r.current = &fiber;
    r.accesses += r.accesses_alone;
    r.accesses_alone = 0;
    if (_setjmp(r.scheduler) == 0) {
        if (fiber.started) _longjmp(fiber.resume, 1);
        fiber.started = true;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack;
        fiber.context.uc_stack.ss_size = STACK_BYTES;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, body_of_fiber, 0);
        setcontext(&fiber.context);
    }
    runtime().current = nullptr;
}

// Lets others run until somebody makes this thread ready again.
void wait_as(State state) {
    Fiber* me = runtime().current;
    me->state = state;
    if (_setjmp(me->resume) == 0) _longjmp(runtime().scheduler, 1);
}

float as_float(u32 bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
u32 as_bits(float x) {
    u32 bits;
    memcpy(&bits, &x, 4);
    return bits;
}

#if defined(__x86_64__)
#define FAST_FMA __attribute__((target_clones("fma", "default")))
#else
#define FAST_FMA
#endif

// Payload of lane 4 g + q: a[0..4] in words 0 and 1, b in word 2, d[0..4] in words 3 and 4.
FAST_FMA void multiply_accumulate(Payload* lanes) {
    float a[16][16], b[16][8];
    for (u32 lane = 0; lane < LANES; lane++) {
        u32 g = lane / 4, q = lane % 4;
        for (u32 i = 0; i < 4; i++) {
            u32 word = (u32)(lanes[lane].words[i / 2] >> (32 * (i % 2)));
            u32 row = g + 8 * (i % 2), k = 2 * q + 8 * (i / 2);
            a[row][k] = as_float(word << 16);
            a[row][k + 1] = as_float(word & 0xffff0000u);
        }
        for (u32 i = 0; i < 2; i++) {
            u32 word = (u32)(lanes[lane].words[2] >> (32 * i));
            b[2 * q + 8 * i][g] = as_float(word << 16);
            b[2 * q + 8 * i + 1][g] = as_float(word & 0xffff0000u);
        }
    }
    for (u32 lane = 0; lane < LANES; lane++) {
        u32 g = lane / 4, q = lane % 4;
        for (u32 i = 0; i < 2; i++) {
            u64 out = 0;
            for (u32 j = 0; j < 2; j++) {
                float d = as_float((u32)(lanes[lane].words[3 + i] >> (32 * j)));
                for (u32 k = 0; k < 16; k++) d = __builtin_fmaf(a[g + 8 * i][k], b[k][2 * q + j], d);
                out |= (u64)as_bits(d) << (32 * j);
            }
            lanes[lane].words[3 + i] = out;
        }
    }
}

// The word i of a payload.
u32 word_of(const Payload& p, u32 i) { return (u32)(p.words[i / 2] >> (32 * (i % 2))); }

// d += product(row, column) of what the lanes hold, d in words 3 and 4 as above.
template <typename Product>
void add_integers(Payload* lanes, const Product& product) {
    for (u32 lane = 0; lane < LANES; lane++) {
        u32 g = lane / 4, q = lane % 4;
        for (u32 i = 0; i < 2; i++) {
            u64 out = 0;
            for (u32 j = 0; j < 2; j++) {
                u32 d = (u32)(lanes[lane].words[3 + i] >> (32 * j)) + product(g + 8 * i, 2 * q + j);
                out |= (u64)d << (32 * j);
            }
            lanes[lane].words[3 + i] = out;
        }
    }
}

// Payload: a[0..4] in words 0 and 1, b in word 2.
void multiply_bytes(Payload* lanes) {
    unsigned char a[16][32], b[8][32];
    for (u32 lane = 0; lane < LANES; lane++) {
        u32 g = lane / 4, q = lane % 4;
        for (u32 i = 0; i < 4; i++) {
            u32 word = word_of(lanes[lane], i);
            memcpy(&a[g + 8 * (i % 2)][4 * q + 16 * (i / 2)], &word, 4);
        }
        for (u32 i = 0; i < 2; i++) {
            u32 word = word_of(lanes[lane], 4 + i);
            memcpy(&b[g][4 * q + 16 * i], &word, 4);
        }
    }
    add_integers(lanes, [&](u32 row, u32 column) {
        u32 sum = 0;
        for (u32 k = 0; k < 32; k++) sum += (u32)a[row][k] * b[column][k];
        return sum;
    });
}

// Payload: a[0], a[1] in word 0, b in the lower half of word 2.
void multiply_bits(Payload* lanes) {
    add_integers(lanes, [&](u32 row, u32 column) {
        u32 sum = 0;
        for (u32 q = 0; q < 4; q++) {
            u32 a = word_of(lanes[row % 8 * 4 + q], row / 8), b = word_of(lanes[column * 4 + q], 4);
            sum += (u32)__builtin_popcount(a & b);
        }
        return sum;
    });
}

// Payload: a and d as multiply_accumulate has them, b[0..4] in words 2 and 5, which are kept in word 6.
FAST_FMA void multiply_sparse(Payload* lanes, u32 first_lane) {
    float a[16][16], b[32][8];
    for (u32 lane = 0; lane < LANES; lane++) {
        u32 g = lane / 4, q = lane % 4;
        for (u32 i = 0; i < 4; i++) {
            u32 left = word_of(lanes[lane], i), right = word_of(lanes[lane], i < 2 ? 4 + i : 8 + i);
            float* to = &a[g + 8 * (i % 2)][2 * q + 8 * (i / 2)];
            to[0] = as_float(left << 16), to[1] = as_float(left & 0xffff0000u);
            b[8 * i + 2 * q][g] = as_float(right << 16), b[8 * i + 2 * q + 1][g] = as_float(right & 0xffff0000u);
        }
    }
    for (u32 lane = 0; lane < LANES; lane++) {
        u32 g = lane / 4, q = lane % 4;
        for (u32 i = 0; i < 2; i++) {
            u64 out = 0;
            for (u32 j = 0; j < 2; j++) {
                float d = as_float((u32)(lanes[lane].words[3 + i] >> (32 * j)));
                for (u32 k = 0; k < 16; k++) {
                    // Of quad k / 2, the first kept one or the second.
                    u32 kept = (u32)lanes[4 * g + first_lane + k / 8].words[6] >> (16 * i + 4 * (k / 2 % 4)) & 15;
                    u32 place = kept >> (2 * (k % 2)) & 3;
                    d = __builtin_fmaf(a[g + 8 * i][k], b[4 * (k / 2) + place][2 * q + j], d);
                }
                out |= (u64)as_bits(d) << (32 * j);
            }
            lanes[lane].words[3 + i] = out;
        }
    }
}

FAST_FMA float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// Meets the other lanes of the warp; the payloads of all, in order of lanes.
Payload* exchange(Operation operation, u32 mask, const Payload& mine) {
    Runtime& r = runtime();
    u32 me = r.current->thread, lane = me % LANES;
    Warp& warp = r.warps[me / LANES];
    if (mask != ALL_LANES) fault("is at %s with mask %08x: the kernels use whole warps", OPERATION_NAMES[operation], mask);
    if (warp.arrived == 0) {
        warp.operation = operation;
    } else if (warp.operation != operation) {
        fault("is at %s while others of its warp are at %s", OPERATION_NAMES[operation], OPERATION_NAMES[warp.operation]);
    }
    Payload* all = warp.payload[warp.turn];
    all[lane] = mine;
    warp.arrived |= 1u << lane;
    if (warp.arrived != ALL_LANES) {
        wait_as(AT_WARP);
        return all;
    }
    if (operation == MMA) multiply_accumulate(all);
    if (operation == MMA_U8) multiply_bytes(all);
    if (operation == MMA_B1) multiply_bits(all);
    if (operation == MMA_SPARSE) multiply_sparse(all, 0);
    if (operation == MMA_SPARSE_UPPER) multiply_sparse(all, 2);
    if (operation == SYNC) warp.epoch++;
    warp.arrived = 0;
    warp.turn ^= 1;
    for (u32 other = me / LANES * LANES; other < me / LANES * LANES + LANES; other++) {
        if (r.fibers[other].state == AT_WARP) r.fibers[other].state = READY;
    }
    return all;
}

const char* state_name(State state) {
    switch (state) {
        case AT_BARRIER: return "waits at a barrier";
        case AT_WARP: return "waits for its warp";
        case FINISHED: return "has returned";
        default: return "is ready";
    }
}

// Runs the current block; whether it came to its end.
bool run_block() {
    Runtime& r = runtime();
    r.epoch++;
    r.at_barrier = 0;
    r.told = false;
    for (Warp& warp : r.warps) {
        warp.operation = NONE;
        warp.arrived = 0;
    }
    for (Shadow& s : r.shadow) {
        bool valid = s.valid;
        s = Shadow();
        s.valid = valid;
    }
    memset(r.shared, 0xff, r.shadow.size());
    for (u32 t = 0; t < r.threads; t++) {
        r.fibers[t].state = READY;
        r.fibers[t].thread = t;
        r.fibers[t].group = 0;
        r.fibers[t].waited = false;
        r.fibers[t].copies.clear();
    }
    for (;;) {
        bool moved = false;
        u32 finished = 0;
        for (u32 t = 0; t < r.threads; t++) {
            if (r.fibers[t].state == READY) {
                moved = true;
                enter(r.fibers[t]);
                if (r.failed) return false;
                if (r.accesses > MAX_ACCESSES) {
                    snprintf(r.device->fault, sizeof r.device->fault, "runs without end");
                    r.failed = true;
                    return false;
                }
            }
            finished += r.fibers[t].state == FINISHED;
        }
        if (finished == r.threads) return true;
        if (moved) continue;
        // Nobody can go on: name one who waits and one who does otherwise.
        u32 waiting = 0;
        while (r.fibers[waiting].state == FINISHED) waiting++;
        u32 other = 0;
        bool whole_warp = r.fibers[waiting].state == AT_WARP;
        for (u32 t = 0; t < r.threads; t++) {
            bool differs = r.fibers[t].state != r.fibers[waiting].state;
            if (differs && (!whole_warp || t / LANES == waiting / LANES)) other = t;
        }
        snprintf(r.device->fault, sizeof r.device->fault,
                 "block (%u, %u, %u), thread %u %s for ever: thread %u %s", r.block_index.x, r.block_index.y,
                 r.block_index.z, waiting, state_name(r.fibers[waiting].state), other,
                 other == waiting ? "is alone in it" : state_name(r.fibers[other].state));
        r.failed = true;
        return false;
    }
}

Runtime& prepare() {
    if (!runtime_of_thread) {
        owner.reset(new Runtime);
        runtime_of_thread = owner.get();
        owner->shared = static_cast<unsigned char*>(aligned_alloc(256, MAX_SHARED * 2));
    }
    return *runtime_of_thread;
}

}  // namespace

// ---- what kernels call -------------------------------------------------------------------------------------------

extern "C" {

Index3 emulator_thread_index() { return {runtime().current->thread, 0, 0}; }
Index3 emulator_block_index() { return runtime().block_index; }
Index3 emulator_block_size() { return {runtime().threads, 1, 1}; }
Index3 emulator_grid_size() { return runtime().grid; }

void emulator_barrier() {
    Runtime& r = runtime();
    if (++r.at_barrier < r.threads) {
        wait_as(AT_BARRIER);
        return;
    }
    r.at_barrier = 0;
    r.epoch++;
    for (u32 t = 0; t < r.threads; t++) {
        if (r.fibers[t].state == AT_BARRIER) r.fibers[t].state = READY;
    }
}

void emulator_let_later_begin() { runtime().lets = true; }

void emulator_wait_for_earlier() {
    Runtime& r = runtime();
    r.current->waited = r.waits = true;
    if (r.early[0]) fault("%s", r.early);
}

void emulator_sync_warp() { exchange(SYNC, ALL_LANES, Payload()); }

u64 emulator_shuffle(u32 mask, u64 value, u32 source) {
    Payload mine = {};
    mine.words[0] = value;
    return exchange(SHUFFLE, mask, mine)[source % LANES].words[0];
}

u32 emulator_ballot(u32 mask, bool vote) {
    Payload mine = {};
    mine.words[0] = vote;
    Payload* all = exchange(BALLOT, mask, mine);
    u32 votes = 0;
    for (u32 lane = 0; lane < LANES; lane++) votes |= (u32)all[lane].words[0] << lane;
    return votes;
}

void emulator_mma_bf16(float* d, const u32* a, u32 b0, u32 b1) {
    Payload mine = {};
    mine.words[0] = a[0] | (u64)a[1] << 32;
    mine.words[1] = a[2] | (u64)a[3] << 32;
    mine.words[2] = b0 | (u64)b1 << 32;
    for (u32 i = 0; i < 2; i++) mine.words[3 + i] = as_bits(d[2 * i]) | (u64)as_bits(d[2 * i + 1]) << 32;
    u32 lane = runtime().current->thread % LANES;
    Payload& out = exchange(MMA, ALL_LANES, mine)[lane];
    for (u32 i = 0; i < 4; i++) d[i] = as_float((u32)(out.words[3 + i / 2] >> (32 * (i % 2))));
}

namespace {

void multiply_integers(Operation operation, i32* d, const u32* a, u32 count, u32 b0, u32 b1) {
    Payload mine = {};
    for (u32 i = 0; i < count; i++) mine.words[i / 2] |= (u64)a[i] << (32 * (i % 2));
    mine.words[2] = b0 | (u64)b1 << 32;
    for (u32 i = 0; i < 2; i++) mine.words[3 + i] = (u32)d[2 * i] | (u64)(u32)d[2 * i + 1] << 32;
    u32 lane = runtime().current->thread % LANES;
    Payload& out = exchange(operation, ALL_LANES, mine)[lane];
    for (u32 i = 0; i < 4; i++) d[i] = (i32)(u32)(out.words[3 + i / 2] >> (32 * (i % 2)));
}

}  // namespace

void emulator_mma_u8(i32* d, const u32* a, u32 b0, u32 b1) { multiply_integers(MMA_U8, d, a, 4, b0, b1); }
void emulator_mma_b1(i32* d, u32 a0, u32 a1, u32 b) {
    u32 a[2] = {a0, a1};
    multiply_integers(MMA_B1, d, a, 2, b, 0);
}

void emulator_mma_sparse_bf16(float* d, const u32* a, const u32* b, u32 kept, bool upper) {
    Payload mine = {};
    for (u32 i = 0; i < 2; i++) {
        mine.words[i] = a[2 * i] | (u64)a[2 * i + 1] << 32;
        mine.words[3 + i] = as_bits(d[2 * i]) | (u64)as_bits(d[2 * i + 1]) << 32;
    }
    mine.words[2] = b[0] | (u64)b[1] << 32;
    mine.words[5] = b[2] | (u64)b[3] << 32;
    mine.words[6] = kept;
    u32 lane = runtime().current->thread % LANES;
    // What other lanes hold is not looked at.
    for (u32 quad = 0; quad < 8 && lane % 4 / 2 == upper; quad++) {
        u32 places = kept >> (4 * quad) & 15;
        if ((places & 3) >= places >> 2) fault("multiplies with the places %u and %u of four", places & 3, places >> 2);
    }
    Payload& out = exchange(upper ? MMA_SPARSE_UPPER : MMA_SPARSE, ALL_LANES, mine)[lane];
    for (u32 i = 0; i < 4; i++) d[i] = as_float((u32)(out.words[3 + i / 2] >> (32 * (i % 2))));
}

void emulator_load_matrices(u32* words) {
    Payload mine = {};
    for (u32 i = 0; i < 2; i++) mine.words[i] = words[2 * i] | (u64)words[2 * i + 1] << 32;
    u32 lane = runtime().current->thread % LANES;
    Payload* all = exchange(MATRICES, ALL_LANES, mine);
    for (u32 i = 0; i < 4; i++) words[i] = word_of(all[8 * i + lane / 4], lane % 4);
}

u32 emulator_add_exactly_bf16x2(u32 a, u32 b) {
    u32 both = 0;
    for (u32 i = 0; i < 2; i++) {
        float x = as_float(a >> (16 * i) << 16), y = as_float(b >> (16 * i) << 16);
        double sum = (double)x + y;
        u32 bits = as_bits((float)sum);
        if ((bits & 0xffff) || (double)(float)sum != sum) fault("adds %g to %g, which is no BF16", y, x);
        both |= bits >> 16 << (16 * i);
    }
    return both;
}

// A load through the read-only cache must not meet what the same launch writes.
void emulator_check_once(const void* p, u32 bytes) {
    check(p, bytes, true, READ);
    Runtime& r = runtime();
    Buffer* buffer = r.device->find((uintptr_t)p);
    if (!buffer || !buffer->written || buffer->pages.empty()) return;
    size_t offset = (uintptr_t)p - (uintptr_t)buffer->data;
    for (size_t at = offset; at < offset + bytes; at++) {
        Written* page = buffer->pages[at / PAGE_BYTES].get();
        if (page && page[at % PAGE_BYTES].is) fault("reads with load_once what this launch writes");
    }
}

void emulator_check_fresh(const void* p, u32 bytes) { check(p, bytes, true, FRESH); }

void emulator_check_atomic(void* p, u32 bytes) { check(p, bytes, true, ATOMIC); }

// Zeros where `global` is null.
void emulator_copy_async(void* shared, const void* global, u32 bytes) {
    Runtime& r = runtime();
    if ((uintptr_t)shared - (uintptr_t)r.shared >= MAX_SHARED * 2) fault("copies in the background, but not to shared memory");
    if (global) check(global, bytes, true, READ);
    check(shared, bytes, true, COPY);
    Copy copy = {};
    copy.to = static_cast<unsigned char*>(shared);
    copy.group = r.current->group;
    copy.bytes = bytes;
    if (global) memcpy(copy.data, global, bytes);
    r.current->copies.push_back(copy);
}

void emulator_commit_async() { runtime().current->group++; }

void emulator_wait_async(int pending) {
    Runtime& r = runtime();
    Fiber& me = *r.current;
    size_t kept = 0;
    for (Copy& copy : me.copies) {
        if (copy.group + pending >= me.group) {
            me.copies[kept++] = copy;
            continue;
        }
        size_t offset = copy.to - r.shared;
        for (u32 i = 0; i < copy.bytes; i++) {
            Shadow& s = r.shadow[offset + i];
            s.pending = false;
            // The write is seen from here on.
            s.writer = me.thread + 1, s.write_epoch = r.epoch, s.write_warp_epoch = r.warps[me.thread / LANES].epoch;
        }
        memcpy(copy.to, copy.data, copy.bytes);
    }
    me.copies.resize(kept);
}

void* emulator_take_shared(u32 used, u32 bytes) {
    Runtime& r = runtime();
    for (Piece& piece : r.pieces) {
        if (piece.used == used && piece.bytes == bytes) return r.shared + piece.start;
        if (piece.used == used && bytes && piece.bytes) fault("takes other pieces of shared memory than a thread before it");
    }
    u32 rounded = (bytes + 15) / 16 * 16;
    if (used + rounded > r.shared_bytes) {
        fault("takes %u bytes of shared memory; the launch gives %u", used + rounded, r.shared_bytes);
    }
    u32 start = (u32)r.shadow.size() + RED_ZONE;
    if (start + rounded + RED_ZONE > MAX_SHARED * 2) fault("takes too many pieces of shared memory");
    r.shadow.resize(start + rounded);
    for (u32 i = 0; i < bytes; i++) r.shadow[start + i].valid = true;
    r.pieces.push_back({used, bytes, start});
    return r.shared + start;
}

float emulator_fma(float a, float b, float c) { return fused(a, b, c); }

// ---- what the compiler's instrumentation calls -------------------------------------------------------------------

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
#define ACCESSES(BYTES)                                                                  \
    void __tsan_read##BYTES(void* p) { check(p, BYTES, true, READ); }                    \
    void __tsan_write##BYTES(void* p) { check(p, BYTES, true, WRITE); }                  \
    void __tsan_unaligned_read##BYTES(void* p) { check(p, BYTES, true, READ); }          \
    void __tsan_unaligned_write##BYTES(void* p) { check(p, BYTES, true, WRITE); }        \
    void __tsan_volatile_read##BYTES(void* p) { check(p, BYTES, true, READ); }           \
    void __tsan_volatile_write##BYTES(void* p) { check(p, BYTES, true, WRITE); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* p, size_t bytes) { check(p, (u32)bytes, false, READ); }
void __tsan_write_range(void* p, size_t bytes) { check(p, (u32)bytes, false, WRITE); }

// ---- what the Rust side calls ------------------------------------------------------------------------------------

void* llmpress_emulator_new() { return new Device(); }

void llmpress_emulator_delete(void* p) {
    Device* device = static_cast<Device*>(p);
    for (auto& entry : device->buffers) free(entry.second.data);
    delete device;
}

u64 llmpress_emulator_allocate(void* p, size_t bytes) {
    Device* device = static_cast<Device*>(p);
    void* data = aligned_alloc(256, (bytes + 511) / 256 * 256);
    if (!data) return 0;
    // Not-a-numbers in every format: what a kernel forgets to write shows.
    memset(data, 0xff, bytes);
    Buffer buffer;
    buffer.data = static_cast<unsigned char*>(data);
    buffer.bytes = bytes;
    buffer.number = device->next_number++;
    device->buffers.emplace((uintptr_t)data, std::move(buffer));
    return (u64)(uintptr_t)data;
}

void llmpress_emulator_free(void* p, u64 address) {
    Device* device = static_cast<Device*>(p);
    auto it = device->buffers.find((uintptr_t)address);
    if (it == device->buffers.end()) return;
    device->settle();
    free(it->second.data);
    device->buffers.erase(it);
}

// All that was launched has ended.
void llmpress_emulator_settle(void* p) { static_cast<Device*>(p)->settle(); }

// Whether the bytes lie in one buffer.
int llmpress_emulator_inside(void* p, u64 address, size_t bytes) {
    Buffer* buffer = static_cast<Device*>(p)->find((uintptr_t)address);
    return buffer && bytes <= buffer->bytes - ((uintptr_t)address - (uintptr_t)buffer->data);
}

void llmpress_emulator_write(u64 address, const unsigned char* data, size_t bytes) {
    memcpy((void*)(uintptr_t)address, data, bytes);
}

void llmpress_emulator_read(u64 address, unsigned char* data, size_t bytes) {
    memcpy(data, (void*)(uintptr_t)address, bytes);
}

// The kinds of a kernel's arguments and their number; -1 where there is no such kernel.
int llmpress_emulator_kernel(const char* file, const char* name, const unsigned char** kinds) {
    const Kernel* kernel = find_kernel(file, name);
    if (!kernel) return -1;
    *kinds = reinterpret_cast<const unsigned char*>(kernel->kinds);
    return (int)kernel->count;
}

// Runs a grid. 0, or 1 after a fault, of which `reason` tells until the next launch. `accesses`: how often its threads reached
// for memory.
int llmpress_emulator_launch(void* p, const char* file, const char* name, const u32* grid, u32 threads, u32 shared,
                             int backwards, int overlaps, const u64* arguments, u64* accesses, const char** reason) {
    Device* device = static_cast<Device*>(p);
    Runtime& r = prepare();
    r.device = device;
    r.kernel = find_kernel(file, name);
    r.arguments = arguments;
    r.grid = {grid[0], grid[1], grid[2]};
    r.threads = threads;
    r.shared_bytes = shared;
    r.failed = false;
    if (!overlaps) device->settle();
    r.overlaps = overlaps;
    r.waits = r.lets = false;
    r.early[0] = 0;
    r.accesses = r.accesses_alone = 0;
    r.last = nullptr;
    r.pieces.clear();
    r.shadow.clear();
    for (u32 t = 0; t < threads; t++) {
        Fiber& fiber = r.fibers[t];
        if (!fiber.stack) {
            void* stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (stack == MAP_FAILED) {
                *reason = "no memory for the stacks of its threads";
                return 1;
            }
            fiber.stack = static_cast<unsigned char*>(stack);
        }
    }
    u64 blocks = (u64)grid[0] * grid[1] * grid[2];
    for (u64 i = 0; i < blocks && !r.failed; i++) {
        u64 block = backwards ? blocks - 1 - i : i;
        r.block = (u32)block;
        r.block_index = {(u32)(block % grid[0]), (u32)(block / grid[0] % grid[1]), (u32)(block / grid[0] / grid[1])};
        run_block();
    }
    for (auto& [buffer, page] : device->dirty) {
        if (buffer->earlier.empty()) {
            buffer->earlier.resize(buffer->pages.size());
            device->unsettled.push_back(buffer);
        }
        auto& earlier = buffer->earlier[page];
        if (!earlier) earlier.reset(new Bytes());
        for (size_t i = 0; i < PAGE_BYTES; i++) {
            if (buffer->pages[page][i].is) earlier->set(i);
        }
        buffer->pages[page].reset();
    }
    device->dirty.clear();
    *accesses = r.accesses + r.accesses_alone;
    if (!r.lets) device->settle();
    for (auto& entry : device->buffers) entry.second.written = false;
    r.current = nullptr;
    if (r.failed) {
        // Threads that were stopped midway begin anew.
        for (Fiber& fiber : r.fibers) fiber.started = false;
        *reason = device->fault;
        return 1;
    }
    return 0;
}
}

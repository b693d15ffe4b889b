// A Hopper by its definitions, for level.cu on a CPU: a fiber for each thread of a cluster, one cluster after another.
//
// A fiber runs until it has to wait; who is next is drawn, and which warp is late. What a GPU does sooner or later is
// done at once or as late as may be, as it is drawn too: copies, before their thread waits for them, or once all
// threads wait; products, when there must be no more of them at work; the launch before ends when nobody can go on
// without it, and what it writes is NaN until then. Shared memory begins as NaN, and is NaN once its block's last
// thread has ended. Where all threads wait in vain, or a block ends without a word that the next launch may start,
// `run_cluster` says so.

#include <math.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <vector>

#define DEVICE inline

constexpr int COUNTED = 128 * WGS + 128, STACK = 1 << 16;  // threads of a block; bytes that each may stack up
constexpr u32 RESERVED = 1024;  // bytes of shared memory that a block does not see

struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint4 { u32 x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }

struct Meeting { int arrived; unsigned phase; };
struct Barrier { int arrivals, left, bytes; unsigned phase; };
struct Copy { u32 to; const void* from; u32 bytes, barrier; };
struct Product { void (*work)(float*, u32, u32, bool); float* sums; u32 a, b; bool keep; int group; };

struct Written { char* at; u64 bytes; };

struct Block {
    char* shared;
    Barrier barriers[BARRIERS / 8];
    Meeting all, some[16], warps[32];
    std::vector<Copy> copies;
    int left;  // threads that have not ended
    bool lets_start;
};
struct Fiber {
    int block, thread, group;
    unsigned phase;
    bool begun, over;
    ucontext_t start;
    jmp_buf here;
    std::vector<Copy> copies;
    std::vector<Product> products;
};

static Block BLOCKS[CLUSTER], *BLOCK;
static Meeting WHOLE_CLUSTER;
static Fiber* FIBER;
static jmp_buf SCHEDULER;
static int THREAD;
static bool MOVED;  // whether some fiber went on in this round
static u64 DRAWN;
static std::vector<Written> WRITTEN_BEFORE;
static std::vector<Written> FETCHED;  // to the cache
static bool BEFORE_DONE;  // whether the launch before this one has ended

inline u32 draw(u32 below) {
    DRAWN ^= DRAWN << 13, DRAWN ^= DRAWN >> 7, DRAWN ^= DRAWN << 17;
    return (DRAWN >> 20) % below;
}
template <class Over> inline void wait_until(Over over) {
    while (!over())
        if (!_setjmp(FIBER->here)) _longjmp(SCHEDULER, 1);
    MOVED = true;
}
inline void meet(Meeting& at, int threads) {
    unsigned phase = at.phase;
    if (++at.arrived == threads) at.arrived = 0, at.phase++;
    wait_until([&] { return at.phase != phase; });
}

inline int warpgroup() { return THREAD / 128; }
// as a Hopper has them: in bits 24 and up the block's number in its cluster, and the first KB its own
inline u32 address(const void* shared) {
    return (u32)(BLOCK - BLOCKS) << 24 | (u32)((const char*)shared - BLOCK->shared + RESERVED);
}
inline u32 place_of(u32 at) { return (at & 0xFFFFFF) - RESERVED; }
inline Barrier& barrier_of(u32 at) { return BLOCK->barriers[place_of(at) / 8]; }
inline void do_copy(const Copy& c) {
    if (c.from) memcpy(BLOCK->shared + place_of(c.to), c.from, c.bytes);
    else memset(BLOCK->shared + place_of(c.to), 0, c.bytes);
}
inline void copy16(u32 to, const void* from, bool there) {
    Copy copy = {to, there ? from : nullptr, 16, 0};
    if (draw(2)) do_copy(copy);
    else FIBER->copies.push_back(copy);
}
inline void store16(void* to, uint4 v) { memcpy(to, &v, 16); }
inline void copies_done() {
    for (const Copy& each : FIBER->copies) do_copy(each);
    FIBER->copies.clear();
}
inline void fetch_to_cache(const void* from, u32 bytes) { FETCHED.push_back({(char*)from, bytes}); }
inline void turn(Barrier& b) {
    if (b.left == 0 && b.bytes == 0) b.phase++, b.left = b.arrivals;
}
inline void barrier_make(u32 barrier, u32 arrivals) { barrier_of(barrier) = {(int)arrivals, (int)arrivals, 0, 0}; }
inline void barrier_make_seen() {}
inline void barrier_arrive(u32 barrier) {
    Barrier& b = barrier_of(barrier);
    b.left--, turn(b);
}
inline void barrier_wait(u32 barrier, u32 parity) {
    wait_until([=] { return (barrier_of(barrier).phase & 1) != parity; });
}
inline void do_bulk(const Copy& c) {
    do_copy(c);
    Barrier& b = barrier_of(c.barrier);
    b.bytes -= c.bytes, turn(b);
}
inline void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
    barrier_of(barrier).bytes += bytes;
    barrier_arrive(barrier);
    BLOCK->copies.push_back({to, from, bytes, barrier});
    if (draw(2)) do_bulk(BLOCK->copies.back()), BLOCK->copies.pop_back();
}
inline void sync_block() { meet(BLOCK->all, COUNTED); }
inline void sync_warp() { meet(BLOCK->warps[THREAD / 32], 32); }
template <int ID, int N> inline void sync_some() { meet(BLOCK->some[ID], N); }
inline void sync_cluster() { meet(WHOLE_CLUSTER, CLUSTER * COUNTED); }
inline void cluster_read() {
    FIBER->phase = WHOLE_CLUSTER.phase;
    if (++WHOLE_CLUSTER.arrived == CLUSTER * COUNTED) WHOLE_CLUSTER.arrived = 0, WHOLE_CLUSTER.phase++;
}
inline void cluster_is_read() { wait_until([] { return WHOLE_CLUSTER.phase != FIBER->phase; }); }
inline float4 read_of(u32 at, u32 block) {
    float4 v;
    memcpy(&v, BLOCKS[block].shared + place_of(at), 16);
    return v;
}
inline void launch_before_done() { wait_until([] { return BEFORE_DONE; }); }
inline void launch_after_may_start() { BLOCK->lets_start = true; }

inline void do_products(int before) {  // those of earlier groups
    std::vector<Product>& all = FIBER->products;
    size_t i = 0;
    for (; i < all.size() && all[i].group < before; i++) all[i].work(all[i].sums, all[i].a, all[i].b, all[i].keep);
    all.erase(all.begin(), all.begin() + i);
}
inline void products_begin() {}
inline void products_end() {
    FIBER->group++;
    if (draw(2)) do_products(FIBER->group);
}
template <int LEFT> inline void products_done() { do_products(FIBER->group - LEFT); }

inline float exponential(float v) { return expf(v); }
inline float quotient(float a, float b) { return a / b; }

#ifdef IN_HALF
inline float widened(u16 v) { _Float16 h; memcpy(&h, &v, 2); return (float)h; }
inline u16 rounded(float v) { _Float16 h = (_Float16)v; u16 bits; memcpy(&bits, &h, 2); return bits; }
#else
inline float widened(u16 v) { u32 bits = (u32)v << 16; float f; memcpy(&f, &bits, 4); return f; }
inline u16 rounded(float v) {
    u32 bits;
    memcpy(&bits, &v, 4);
    return v != v ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
#endif
inline void unpack(float (&v)[8], uint4 from) {
    u16 all[8];
    memcpy(all, &from, 16);
    for (int i = 0; i < 8; i++) v[i] = widened(all[i]);
}
inline uint4 pack(const float (&v)[8]) {
    u16 all[8];
    for (int i = 0; i < 8; i++) all[i] = rounded(v[i]);
    uint4 made;
    memcpy(&made, all, 16);
    return made;
}

// where a descriptor's columns of eight begin, and how far they are apart; rows of eight are 128 bytes apart
struct Descriptor { u32 at, apart; };
struct Operand {
    Descriptor d;
    float at(int row, int k) const {
        u16 v;
        memcpy(&v, BLOCK->shared + d.at - RESERVED + row / 8 * 128 + k / 8 * d.apart + row % 8 * 16 + k % 8 * 2, 2);
        return widened(v);
    }
};
inline Operand operand(u32 d) { return {{(d & 0x3FFF) << 4, (d >> 16 & 0x3FFF) << 4}}; }

// m64nNk16: a thread's sums are of rows lane / 4 and 8 more, and of two columns in every eight
template <int N> inline void do_multiply(float* sums, u32 a, u32 b, bool keep) {
    Operand left = operand(a), right = operand(b);
    int lane = THREAD % 32, warp = THREAD / 32 % 4;
    for (int i = 0; i < N / 2; i++) {
        int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        float sum = keep ? sums[i] : 0;
        for (int k = 0; k < 16; k++) sum += left.at(row, k) * right.at(column, k);
        sums[i] = sum;
    }
}
template <int N> inline void multiply(float (&sums)[N / 2], u32 a, u32 b, bool keep) {
    FIBER->products.push_back({do_multiply<N>, sums, a, b, keep, FIBER->group});
}

template <int I> void dispatch(const Arguments& arguments, int block, char* shared);

static const Arguments* ARGUMENTS;
static int FIRST, BYTES;
static void begin() {
    dispatch<0>(*ARGUMENTS, FIRST + FIBER->block, BLOCK->shared);
    FIBER->over = MOVED = true;
    if (--BLOCK->left == 0) memset(BLOCK->shared, 0xFF, BYTES);  // which is another block's from now on
    _longjmp(SCHEDULER, 1);
}
static void resume(Fiber* fiber) {
    FIBER = fiber, BLOCK = BLOCKS + fiber->block, THREAD = fiber->thread;
    if (_setjmp(SCHEDULER)) return;
    if (fiber->begun) _longjmp(fiber->here, 1);
    fiber->begun = true;
    setcontext(&fiber->start);
}
// one of the bulk copies that are under way, if there is one
static bool deliver() {
    int first = draw(CLUSTER);
    for (int i = 0; i < CLUSTER; i++) {
        BLOCK = BLOCKS + (first + i) % CLUSTER;
        std::vector<Copy>& waiting = BLOCK->copies;
        if (waiting.empty()) continue;
        size_t which = draw(waiting.size());
        Copy copy = waiting[which];
        waiting.erase(waiting.begin() + which);
        do_bulk(copy);
        return true;
    }
    return false;
}
// the end of the launch before this one, unless it has ended: what it writes was hidden
static bool end_before(std::vector<std::vector<char>>& kept) {
    if (BEFORE_DONE) return false;
    for (size_t i = 0; i < kept.size(); i++) memcpy(WRITTEN_BEFORE[i].at, kept[i].data(), kept[i].size());
    return BEFORE_DONE = true;
}
// whether every thread came to its end
static bool run_cluster(const Arguments* arguments, int first, int bytes) {
    constexpr int ALL = CLUSTER * COUNTED;
    ARGUMENTS = arguments, FIRST = first, BYTES = bytes, WHOLE_CLUSTER = {};
    for (Block& block : BLOCKS) {
        block = {(char*)aligned_alloc(1024, (bytes + 1023) / 1024 * 1024)};
        memset(block.shared, 0xFF, bytes);
        block.left = COUNTED;
    }
    std::vector<std::vector<char>> kept;
    BEFORE_DONE = false;
    for (const Written& w : WRITTEN_BEFORE) kept.emplace_back(w.at, w.at + w.bytes), memset(w.at, 0xFF, w.bytes);
    std::vector<Fiber> fibers(ALL);
    char* stacks = (char*)malloc((size_t)ALL * STACK);
    for (int i = 0; i < ALL; i++) {
        Fiber& fiber = fibers[i];
        fiber.block = i / COUNTED, fiber.thread = i % COUNTED;
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = stacks + (size_t)i * STACK, fiber.start.uc_stack.ss_size = STACK;
        makecontext(&fiber.start, begin, 0);
    }
    int late = 0;  // a warp that does not come for some rounds, unless nobody else moves
    do {
        if (!MOVED) late = -1;
        else if (late < 0 || draw(8) == 0) late = draw(ALL / 32);
        MOVED = false;
        int at = draw(ALL), stride = 1 + 2 * draw(ALL);
        while (stride % 3 == 0) stride += 2;  // so that all have their turn: their number has no other divisors
        for (int i = 0; i < ALL; i++, at = (at + stride) % ALL)
            if (!fibers[at].over && at / 32 != late) resume(&fibers[at]);
    } while (MOVED || late >= 0 || deliver() || end_before(kept));
    bool ended = true;
    for (Fiber& fiber : fibers) ended &= fiber.over;
    for (Block& block : BLOCKS) ended &= block.lets_start, free(block.shared);
    free(stacks);
    return ended;
}

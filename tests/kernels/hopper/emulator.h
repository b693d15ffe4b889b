// A Hopper by its definitions, for level.cu on a CPU: a thread for each thread of a cluster, one cluster after another.
//
// Copies and products are done at once where a GPU does them later, so what reads too early is seen only where threads
// wait for each other in vain, or run ahead: nobody promises an order between two waits. Shared memory begins as NaN.

#include <barrier>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define DEVICE inline

struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint4 { u32 x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }

struct Waiting { int arrivals, left, bytes; unsigned phase; };

struct Block {
    std::vector<char> memory;
    std::mutex lock;
    std::condition_variable turned;
    std::map<u32, Waiting> barriers;
    std::barrier<> all;
    std::vector<std::unique_ptr<std::barrier<>>> some, warps;
    char* shared() { return memory.data() + (1024 - (size_t)memory.data() % 1024) % 1024; }
    Block(int threads, int multiply, int gate, int bytes) : memory(bytes + 1024, (char)0xFF), all(threads) {
        for (int n : {threads, multiply, gate}) some.push_back(std::make_unique<std::barrier<>>(n));
        for (int i = 0; i < threads / 32; i++) warps.push_back(std::make_unique<std::barrier<>>(32));
    }
    void turn(Waiting& b) {
        if (b.left == 0 && b.bytes == 0) b.phase++, b.left = b.arrivals, turned.notify_all();
    }
};

static std::vector<std::unique_ptr<Block>> CLUSTER_OF_BLOCKS;
static std::unique_ptr<std::barrier<>> WHOLE_CLUSTER;
static thread_local Block* BLOCK;
static thread_local int THREAD;

inline u32 address(const void* shared) { return (u32)((const char*)shared - BLOCK->shared()); }
inline void copy16(u32 to, const void* from, bool there) {
    if (there) memcpy(BLOCK->shared() + to, from, 16);
    else memset(BLOCK->shared() + to, 0, 16);
}
inline void copies_done() {}
inline void barrier_make(u32 barrier, u32 arrivals) {
    std::lock_guard hold(BLOCK->lock);
    BLOCK->barriers[barrier] = {(int)arrivals, (int)arrivals, 0, 0};
}
inline void barrier_make_seen() {}
inline void barrier_arrive(u32 barrier) {
    std::lock_guard hold(BLOCK->lock);
    Waiting& b = BLOCK->barriers.at(barrier);
    b.left--, BLOCK->turn(b);
}
inline void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
    memcpy(BLOCK->shared() + to, from, bytes);
    barrier_arrive(barrier);
}
inline void barrier_wait(u32 barrier, u32 parity) {
    std::unique_lock hold(BLOCK->lock);
    BLOCK->turned.wait(hold, [=] { return (BLOCK->barriers.at(barrier).phase & 1) != parity; });
}
inline void sync_block() { BLOCK->all.arrive_and_wait(); }
inline void sync_warp() { BLOCK->warps[THREAD / 32]->arrive_and_wait(); }
template <int ID, int N> inline void sync_some() { BLOCK->some[ID]->arrive_and_wait(); }
inline void sync_cluster() { WHOLE_CLUSTER->arrive_and_wait(); }
inline float4 read_of(u32 at, u32 block) {
    float4 v;
    memcpy(&v, CLUSTER_OF_BLOCKS[block]->shared() + at, 16);
    return v;
}
inline void launch_before_done() {}
inline void launch_after_may_start() {}
inline void products_begin() {}
inline void products_end() {}
template <int LEFT> inline void products_done() {}
inline float exponential(float v) { return expf(v); }

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
        memcpy(&v, BLOCK->shared() + d.at + row / 8 * 128 + k / 8 * d.apart + row % 8 * 16 + k % 8 * 2, 2);
        return widened(v);
    }
};
inline u64 descriptor(u32 at, u32 columns_apart) {
    return (u64)(at >> 4 & 0x3FFF) | (u64)(columns_apart >> 4) << 16 | (u64)(128 >> 4) << 32;
}
inline Operand operand(u64 d) { return {{(u32)(d & 0x3FFF) << 4, (u32)(d >> 16 & 0x3FFF) << 4}}; }

// m64nNk16: a thread's sums are of rows lane / 4 and 8 more, and of two columns in every eight
template <int N> inline void multiply(float (&sums)[N / 2], u64 a, u64 b, bool keep) {
    Operand left = operand(a), right = operand(b);
    int lane = THREAD % 32, warp = THREAD / 32 % 4;
    for (int i = 0; i < N / 2; i++) {
        int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        float sum = keep ? sums[i] : 0;
        for (int k = 0; k < 16; k++) sum += left.at(row, k) * right.at(column, k);
        sums[i] = sum;
    }
}

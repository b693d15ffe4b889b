// What level.cu asks of a Hopper: asynchronous copies, barriers in shared memory, clusters, and wgmma.
// Source: "Parallel Thread Execution ISA", sections on mbarrier, cp.async, wgmma and griddepcontrol.

#define DEVICE __device__ __forceinline__
#define THREAD ((int)threadIdx.x)

// this thread's among those that multiply, told in a way by which nvcc knows that a warp has but one
DEVICE int warpgroup() { return WGS == 1 ? 0 : __shfl_sync(0xFFFFFFFF, THREAD / 128, 0); }

DEVICE u32 address(const void* shared) { return (u32)__cvta_generic_to_shared(shared); }

// 16 bytes from global to shared memory, or as many zeros. It says nothing of memory, so that what the next copies need
// is read meanwhile: nobody looks at either place before `copies_done`
DEVICE void copy16(u32 to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0));
}
// 16 bytes to global memory at once, where nvcc makes four stores of a plain assignment
DEVICE void store16(void* to, uint4 v) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
// waits for this thread's copies, and shows them to wgmma, once other threads are told
DEVICE void copies_done() {
    asm volatile("cp.async.wait_all;\nfence.proxy.async.shared::cta;" ::: "memory");
}
// a whole piece, counted in bytes by a barrier
DEVICE void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// from memory to the L2 cache, in its own time
DEVICE void fetch_to_cache(const void* from, u32 bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
}

DEVICE void barrier_make(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\nfence.mbarrier_init.release.cluster;" ::"r"(barrier),
                 "r"(arrivals) : "memory");
}
DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// until the phase of this parity is over
DEVICE void barrier_wait(u32 barrier, u32 parity) {
    asm volatile("{\n.reg .pred over;\nagain: mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
                 "@!over bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
}
DEVICE void barrier_make_seen() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
template <int ID, int THREADS_OF_IT> DEVICE void sync_some() {
    asm volatile("barrier.sync %0, %1;" ::"n"(ID), "n"(THREADS_OF_IT) : "memory");
}
DEVICE void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// the same in two parts, and for shared memory alone, that no block may leave while others read it: what was read has
// been used by then, and what was written to global memory is not waited for
DEVICE void cluster_read() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
DEVICE void cluster_is_read() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
// 16 bytes of the shared memory of a block of this cluster
DEVICE float4 read_of(u32 at, u32 block) {
    u32 there;
    float4 v;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(block));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(there) : "memory");
    return v;
}

// until the launch before this one has ended, and what it wrote is there
DEVICE void launch_before_done() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void launch_after_may_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> DEVICE void products_done() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }

DEVICE float exponential(float v) { return __expf(v); }
DEVICE float quotient(float a, float b) { return __fdividef(a, b); }  // a few instructions; 0 where b is infinite

#ifdef IN_HALF
DEVICE void unpack_two(float& low, float& high, u32 two) {
    asm("{\n.reg .f16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}"
        : "=f"(low), "=f"(high) : "r"(two));
}
DEVICE u32 pack_two(float low, float high) {
    u32 made;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(made) : "f"(high), "f"(low));
    return made;
}
#else
DEVICE void unpack_two(float& low, float& high, u32 two) {
    low = __uint_as_float(two << 16), high = __uint_as_float(two & 0xFFFF0000u);
}
DEVICE u32 pack_two(float low, float high) {
    u32 made;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(made) : "f"(high), "f"(low));
    return made;
}
#endif
DEVICE void unpack(float (&v)[8], uint4 from) {
    unpack_two(v[0], v[1], from.x), unpack_two(v[2], v[3], from.y);
    unpack_two(v[4], v[5], from.z), unpack_two(v[6], v[7], from.w);
}
DEVICE uint4 pack(const float (&v)[8]) {
    return make_uint4(pack_two(v[0], v[1]), pack_two(v[2], v[3]), pack_two(v[4], v[5]), pack_two(v[6], v[7]));
}

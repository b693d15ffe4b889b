// A level of the network in one launch, on a Hopper: programs branch to their operation.
//
//     y = act(conv(x) + bias + border + (scale x + shift) gate)      gate "identity"
//     y = act((conv(x) + bias + border) 2 gate)                      gate "plain"
//     gate = sigmoid(gate_weight avg(x) + gate_bias)
//
// Source: "Non-deep Networks" (arXiv 2110.07641), section 3.1; the folding is in program/fold.py.
//
// A block computes BM pixels by `bn` channels, or a part of their sums over K. Pixels are numbered along rows that are
// one longer than the picture's, so that a tap is a step to another number, for all pixels alike: the nine taps of a
// chunk of channels read one block of inputs in shared memory, each from another place. Inputs and weights lie there in
// columns of eight channels, 16 bytes for each pixel, which wgmma reads from any pixel on.
//
// Warps: 4 WGS that multiply and fetch inputs, one that fetches weights, three that make the gates of the block's
// channels meanwhile. Where blocks share a tile they are of one cluster: each finishes some of its channels, and reads
// the others' sums of those from their shared memory.
//
// Before this text stand the constants from COUNT to NUMBERS, hopper.cuh and `multiply` (source.py).

constexpr int BM = 64 * WGS, CONSUMERS = 128 * WGS, THREADS = CONSUMERS + 128;

// In shared memory, in bytes: barriers, for each row of a block of inputs its pixel, three vectors of the channels that
// this block finishes, room for what the gates or the sums are made from, blocks of inputs and of weights, where later
// the sums of products lie.
template <int I> struct Plan {
    static constexpr Numbers s = NUMBERS[I];
    static constexpr int slice = s.bn / s.split;
    static constexpr int odd_rows = s.rows | 1;  // so that eight channels of a pixel fall into different banks
    static constexpr int input_bytes = odd_rows * s.kk * 32, weight_bytes = s.taps * s.bn * s.kk * 32;
    static constexpr int pixels = BARRIERS, vectors = pixels + (s.rows * 4 + 15) / 16 * 16, room = vectors + 3 * slice * 4;
    static constexpr int inputs = (room + ROOM + 127) / 128 * 128, weights = inputs + s.buffers * input_bytes;
};

// Of each tap, the row of a block of inputs where that of its first output pixel lies.
template <int I> struct Rows {
    int of_tap[9] = {};
    DEVICE constexpr Rows() {
        constexpr Numbers s = NUMBERS[I];
        for (int tap = 0; tap < 9; tap++) {
            int dy = tap / 3, dx = tap % 3;
            if (s.stride == 1) of_tap[tap] = dy * s.pitch + dx;
            // with stride 2 four pictures of every other pixel: of odd rows and columns, odd rows, odd columns, the rest
            else if (dy != 1 && dx != 1) of_tap[tap] = dy / 2 * s.pitch + dx / 2;
            else if (dy != 1) of_tap[tap] = BM + s.pitch + 1 + dy / 2 * s.pitch;
            else if (dx != 1) of_tap[tap] = 2 * (BM + s.pitch) + 1 + dx / 2;
            else of_tap[tap] = 3 * BM + 2 * s.pitch + 2;
        }
    }
};
template <int I> __constant__ const Rows<I> ROWS;

// The pixel in a row of a block of inputs whose first output pixel is p0, or -1 where zeros belong.
template <int I> DEVICE int pixel_of(int row, int p0) {
    constexpr Numbers s = NUMBERS[I];
    int q = p0 - s.pitch - 1 + row, odd_row = 0, odd_column = 0;
    if (s.stride == 2) {
        constexpr int one = BM + s.pitch + 1, two = one + BM + s.pitch, three = two + BM + 1;
        odd_row = row < two, odd_column = row < one || (row >= two && row < three);
        if (row >= three) q = p0 + row - three;
        else if (row >= two) q = p0 + row - two - 1;
        else if (row >= one) q = p0 + row - one - s.pitch;
    }
    int y = q / s.pitch, x = q % s.pitch;
    if (q < 0) return -1;
    y = y * s.stride + odd_row, x = x * s.stride + odd_column;
    return y < s.h && x < s.w ? y * s.w + x : -1;
}

// Send for a block of inputs: `chunk` counts over both of them.
template <int I>
DEVICE void fetch_inputs(const Operands& o, u32 to, const int* pixels, long long n, int group, int chunk) {
    constexpr Numbers s = NUMBERS[I];
    constexpr int PIECES = s.kk * 2, ALL = s.rows * PIECES, AT_ONCE = 4;  // of 16 bytes
    int c = chunk % s.chunks * PIECES;
    const u16* picture = (chunk / s.chunks ? o.b : o.a) + n * (s.h * s.w * s.c_padded);
    const char* from = (const char*)(picture + group * s.part + c * 8);
#pragma unroll 1
    for (int first = THREAD; first < ALL; first += AT_ONCE * CONSUMERS) {
        int pixel[AT_ONCE];  // read together, since no read of shared memory passes a copy to it
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            int i = first + j * CONSUMERS;
            pixel[j] = i < ALL ? pixels[i / PIECES] : -1;
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            int i = first + j * CONSUMERS, row = i / PIECES, piece = i % PIECES;
            bool there = pixel[j] >= 0 && c + piece < s.part_padded / 8;
            u32 bytes = there ? (pixel[j] * s.c_padded + piece * 8) * 2 : 0;
            if (i < ALL) copy16(to + (piece * Plan<I>::odd_rows + row) * 16, from + bytes, there);
        }
    }
}

// One thread: send for this block's weights, a step at a time, as places for them come free.
template <int I> DEVICE void fetch_weights(const Operands& o, u32 to, u32 full, u32 empty, int i_o, int begin, int end) {
    constexpr Numbers s = NUMBERS[I];
    constexpr int bytes = Plan<I>::weight_bytes, steps = s.inputs * s.chunks * 9 / s.taps;
    const char* from = (const char*)o.weight + ((long long)i_o * steps + begin) * bytes;
#pragma unroll 1
    for (int i = 0; i < end - begin; i++) {
        int stage = i % s.stages;
        if (i >= s.stages) barrier_wait(empty + 8 * stage, (i / s.stages - 1) & 1);
        copy_bulk(to + stage * bytes, from + (long long)i * bytes, bytes, full + 8 * stage);
    }
}

// One thread of each block that has a tile: send for the block's share of what the next launch reads.
DEVICE void fetch_ahead(const Arguments& arguments, int block) {
#pragma unroll 1
    for (const Ahead& piece : arguments.ahead) {
        u32 from = piece.share * block, left = from < piece.bytes ? piece.bytes - from : 0;
        if (left) fetch_to_cache(piece.from + from, left < piece.share ? left : piece.share);
    }
}

// The lower half of wgmma's descriptor: columns of 16 bytes begin at `at` and lie so far apart, in units of 16 bytes, so
// that a sum is the descriptor of a place further on. The upper half says that eight rows in a column follow each other.
// An address says in bits 24 and up which block of its cluster it is of; wgmma reads this block's alone.
DEVICE u32 descriptor(u32 at, u32 columns_apart) { return at >> 4 & 0x3FFF | columns_apart >> 4 << 16; }

// Products over steps `begin` to `end` of K; a step is a tap, or more, of a chunk of 16 kk channels.
template <int I>
DEVICE void multiply_steps(float (&sums)[NUMBERS[I].bn / 2], const Operands& o, char* shared, u32 full, u32 empty,
                           long long n, int group, int begin, int end) {
    constexpr Numbers s = NUMBERS[I];
    using P = Plan<I>;
    const int* pixels = (const int*)(shared + P::pixels);
    u32 inputs = address(shared + P::inputs), next = inputs, parity = 0;
    u32 of_weights = descriptor(address(shared + P::weights), s.bn * 16), of_inputs = 0;
    int chunk = begin * s.taps / 9, tap = begin * s.taps % 9, last = (end * s.taps - 1) / 9, stage = 0;
    fetch_inputs<I>(o, inputs, pixels, n, group, chunk);
#pragma unroll 1
    for (int i = begin; i < end; i++) {
        if (tap == 9) tap = 0, chunk++;
        bool first_tap = i == begin || tap == 0;
        if (first_tap) {
            copies_done();
            sync_some<1, CONSUMERS>();
            of_inputs = descriptor(next + warpgroup() * 1024, P::odd_rows * 16);
            next = s.buffers == 2 && next == inputs ? inputs + P::input_bytes : inputs;
        }
        barrier_wait(full + 8 * stage, parity);
        u32 b = of_weights + stage * (P::weight_bytes / 16);
        products_begin();
#pragma unroll
        for (int t = 0; t < s.taps; t++) {
            u32 a = of_inputs + ROWS<I>.of_tap[tap + t];
#pragma unroll
            for (int k = 0; k < s.kk; k++)
                multiply<s.bn>(sums, a + k * 2 * P::odd_rows, b + (t * s.kk + k) * 2 * s.bn, i > begin || t || k);
        }
        products_end();
        products_done<1>();
        if (i > begin) {
            sync_warp();
            if (THREAD % 32 == 0) barrier_arrive(empty + 8 * (stage ? stage - 1 : s.stages - 1));
        }
        if (first_tap && chunk < last) {  // beside its products, once nobody multiplies what lay there
            sync_some<1, CONSUMERS>();
            fetch_inputs<I>(o, next, pixels, n, group, chunk + 1);
        }
        tap += s.taps;
        if (++stage == s.stages) stage = 0, parity ^= 1;
    }
    products_done<0>();
}

// Averages of the channels that a group reads, to shared memory, by GATERS threads.
template <int I> DEVICE void average(const Operands& o, float* to, float* parts, long long n, int group, int thread) {
    constexpr Numbers s = NUMBERS[I];
    constexpr int FOURS = s.part_padded / 4, ITEMS = s.inputs * FOURS, WAYS = ITEMS < GATERS ? GATERS / ITEMS : 1;
    for (int i = thread; i < ITEMS * WAYS; i += GATERS) {
        int item = i % ITEMS, second = item / FOURS, tiles = second ? s.b_tiles : s.a_tiles;
        const float* from = (second ? o.b_sums : o.a_sums) + n * tiles * s.c_padded + group * s.part + item % FOURS * 4;
        float4 sum = {0, 0, 0, 0};
#pragma unroll 8
        for (int t = i / ITEMS; t < tiles; t += WAYS) {
            float4 v = *(const float4*)(from + (long long)t * s.c_padded);
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
        *(float4*)(parts + i * 4) = sum;
    }
    sync_some<2, GATERS>();
    for (int c = thread; c < ITEMS * 4; c += GATERS) {
        float sum = 0;
#pragma unroll 4
        for (int way = 0; way < WAYS; way++) sum += parts[way * ITEMS * 4 + c];
        to[c] = sum * (1.0f / (s.h * s.w));
    }
    sync_some<2, GATERS>();
}

// For the channels from `first` on that this block finishes, what `finish` multiplies sums and inputs by, and adds:
// three vectors in shared memory.
template <int I> DEVICE void make_gates(const Operands& o, char* shared, long long n, int group, int first, int thread) {
    constexpr Numbers s = NUMBERS[I];
    using P = Plan<I>;
    constexpr int EIGHTS = P::slice / 8, WAYS = GATERS / EIGHTS, ROWS = s.inputs * s.part;
    float *averages = (float*)(shared + P::room), *parts = averages + s.inputs * s.part_padded;
    average<I>(o, averages, parts, n, group, thread);
    if (thread < EIGHTS * WAYS) {
        int at = thread % EIGHTS * 8;
        float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        if (first + at < s.group) {
            const u16* from = o.gate_weight + group * s.group + first + at;
#pragma unroll 8
            for (int row = thread / EIGHTS; row < ROWS; row += WAYS) {
                float v[8], a = averages[row / s.part * s.part_padded + row % s.part];
                unpack(v, *(const uint4*)(from + (long long)row * s.cout_padded));
#pragma unroll
                for (int e = 0; e < 8; e++) sum[e] += a * v[e];
            }
        }
#pragma unroll
        for (int e = 0; e < 8; e++) parts[thread / EIGHTS * P::slice + at + e] = sum[e];
    }
    sync_some<2, GATERS>();
    float *of_sums = (float*)(shared + P::vectors), *of_inputs = of_sums + P::slice, *added = of_inputs + P::slice;
    for (int c = thread; c < P::slice; c += GATERS) {
        float by = 0, with = 0, plus = 0;
        if (first + c < s.group) {
            int computed = group * s.group + first + c;
            float v = o.gate_bias[computed], bias = o.bias[computed];
#pragma unroll 4
            for (int way = 0; way < WAYS; way++) v += parts[way * P::slice + c];
#pragma unroll 4
            for (int tap = 0; s.bordered && tap < 9; tap++) bias += o.border[tap * s.cout + computed];
            float gate = quotient(1, 1 + exponential(-v));
            by = s.identity ? 1 : 2 * gate;
            with = s.identity ? o.scale[computed] * gate : 0;
            plus = s.identity ? bias + o.shift[computed] * gate : bias * by;
        }
        of_sums[c] = by, of_inputs[c] = with, added[c] = plus;
    }
}

// Of eight channels of a pixel: add what the blocks of this tile have summed, less the border's taps outside.
template <int I> DEVICE void gather(float (&v)[8], const Operands& o, u32 sums, int leader, int y, int x, int computed) {
    constexpr Numbers s = NUMBERS[I];
#pragma unroll
    for (int k = 0; k < s.split; k++) {
        float4 low = read_of(sums, leader + k), high = read_of(sums + 16, leader + k);
        v[0] += low.x, v[1] += low.y, v[2] += low.z, v[3] += low.w;
        v[4] += high.x, v[5] += high.y, v[6] += high.z, v[7] += high.w;
    }
#pragma unroll 1
    for (int tap = 0; s.bordered && tap < 9; tap++) {
        int row = y * s.stride + tap / 3 - 1, column = x * s.stride + tap % 3 - 1;
        if (row < 0 || row >= s.h || column < 0 || column >= s.w)
            for (int e = 0; e < 8 && computed + e < s.cout; e++) v[e] -= o.border[tap * s.cout + computed + e];
    }
}

// Where a group's channel is stored.
template <int I> DEVICE int place(int group, int channel) {
    constexpr Numbers s = NUMBERS[I];
    return (channel / s.rest * s.groups + group) * s.rest + channel % s.rest;
}

// Gate, activation, rounding and channel sums of the channels from `first` on, by all threads of the block.
template <int I>
DEVICE void finish(const Operands& o, char* shared, long long n, int i_m, int group, int first, int split, int leader) {
    constexpr Numbers s = NUMBERS[I];
    using P = Plan<I>;
    constexpr int EIGHTS = P::slice / 8, WAYS = THREADS / EIGHTS;
    const float* of_sums = (const float*)(shared + P::vectors);
    const float *of_inputs = of_sums + P::slice, *added = of_inputs + P::slice;
    int at = THREAD % EIGHTS * 8, way = THREAD / EIGHTS, c = first + at;
    float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    if (way < WAYS && c < s.group)
        for (int row = way; row < BM; row += WAYS) {
            int p = i_m * BM + row, y = p / s.pitch, x = p % s.pitch;
            if (y >= s.hout || x >= s.wout) continue;
            float v[8] = {0, 0, 0, 0, 0, 0, 0, 0}, input[8];
            u32 sums = address(shared + P::inputs) + (row * (s.bn + 8) + split * P::slice + at) * 4;
            gather<I>(v, o, sums, leader, y, x, group * s.group + c);
            long long pixel = n * (s.hout * s.wout) + y * s.wout + x;
            if (s.identity) unpack(input, *(const uint4*)(o.a + pixel * s.c_padded + c));
#pragma unroll
            for (int e = 0; e < 8; e++) {
                v[e] = v[e] * of_sums[at + e] + added[at + e];
                if (s.identity) v[e] += input[e] * of_inputs[at + e];
                if (s.silu) v[e] = quotient(v[e], 1 + exponential(-v[e]));
                else v[e] = v[e] < 0 ? 0 : v[e];
            }
            uint4 rounded = pack(v);
            store16(o.y + pixel * s.cout_padded + place<I>(group, c), rounded);
            unpack(v, rounded);
#pragma unroll
            for (int e = 0; e < 8; e++) sum[e] += v[e];
        }
    if (CLUSTER > 1) cluster_read();
    if (!s.summed) return;
    float* parts = (float*)(shared + P::room);
#pragma unroll
    for (int e = 0; e < 8; e++)
        if (way < WAYS) parts[way * P::slice + at + e] = sum[e];
    sync_block();
    for (int i = THREAD; i < P::slice; i += THREADS)
        if (first + i < (s.group + 7) / 8 * 8) {
            float total = 0;
#pragma unroll 4
            for (int k = 0; k < WAYS; k++) total += parts[k * P::slice + i];
            o.sums[(n * s.tiles + i_m) * s.cout_padded + place<I>(group, first + i)] = total;
        }
}

// Block `block` of the launch, of operation I: clusters take as many tiles as they have room for.
template <int I> DEVICE void convolve(const Arguments& arguments, int block, char* shared) {
    constexpr Numbers s = NUMBERS[I];
    const Operands& o = arguments.of[I];
    int local = block - s.first;
    using P = Plan<I>;
    constexpr int steps = s.inputs * s.chunks * 9 / s.taps, across = s.groups * s.columns;
    int rank = local % CLUSTER, split = rank % s.split, tile = local / CLUSTER * (CLUSTER / s.split) + rank / s.split;
    int i_o = tile % across, i_m = tile / across % s.tiles, group = i_o / s.columns;
    int begin = split * steps / s.split, end = (split + 1) * steps / s.split;
    int first = i_o % s.columns * s.bn + split * P::slice;
    long long n = tile / across / s.tiles;
    bool here = tile < s.all;
    if (!here) launch_after_may_start();
    u32 full = address(shared), empty = full + 8 * s.stages;
    if (here) {
        if (THREAD == CONSUMERS) {
#pragma unroll 1
            for (int i = 0; i < s.stages; i++) barrier_make(full + 8 * i, 1), barrier_make(empty + 8 * i, 4 * WGS);
            barrier_make_seen();
        }
        int* pixels = (int*)(shared + P::pixels);
#pragma unroll 1
        for (int row = THREAD; row < s.rows; row += THREADS) pixels[row] = pixel_of<I>(row, i_m * BM);
        sync_block();
        if (THREAD < CONSUMERS) {
#if defined(__CUDACC_VER_MAJOR__) && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ < 1209
            // The first product makes the sums anew, but compilers before 12.9 let no product start before the last has
            // ended where they are not given values. Newer ones do without, and what GPUs have run stays as it was.
            float sums[s.bn / 2] = {};
#else
            float sums[s.bn / 2];
#endif
            launch_before_done();
            multiply_steps<I>(sums, o, shared, full, empty, n, group, begin, end);
            launch_after_may_start();
            sync_some<1, CONSUMERS>();
            int lane = THREAD % 32, row = THREAD / 32 * 16 + lane / 4;
            float* to = (float*)(shared + P::inputs) + row * (s.bn + 8) + lane % 4 * 2;
#pragma unroll
            for (int i = 0; i < s.bn / 4; i++)
                *(float2*)(to + i % 2 * 8 * (s.bn + 8) + i / 2 * 8) = make_float2(sums[i * 2], sums[i * 2 + 1]);
        } else {
            if (THREAD == CONSUMERS) {
                fetch_weights<I>(o, address(shared + P::weights), full, empty, i_o, begin, end);
                fetch_ahead(arguments, block);
            }
            launch_before_done();
            if (THREAD >= CONSUMERS + 32) make_gates<I>(o, shared, n, group, first, THREAD - CONSUMERS - 32);
        }
        sync_block();
    }
    if (CLUSTER > 1) sync_cluster();
    if (here) finish<I>(o, shared, n, i_m, group, first, split, rank - split);
    else if (CLUSTER > 1) cluster_read();
    if (CLUSTER > 1) cluster_is_read();
}

// Block `block` of the launch.
template <int I> DEVICE void dispatch(const Arguments& arguments, int block, char* shared) {
    if constexpr (I < COUNT) {
        if (block >= NUMBERS[I].first && block < NUMBERS[I].first + NUMBERS[I].blocks)
            convolve<I>(arguments, block, shared);
        else
            dispatch<I + 1>(arguments, block, shared);
    }
}

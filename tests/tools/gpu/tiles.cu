// Our kernels for devices on a GPU beside the same tiles on the host, on random numbers, and how long they take.
//
//     nvcc -std=c++17 -O3 -use_fast_math -arch=native -Inative tests/tools/gpu/tiles.cu native/kernels/device/decode.cu -o tiles && ./tiles
//
// Prints a Markdown table. The exit code is 1 where results differ by more than rounding, and 77 where there is no GPU.

#include "kernels/device/decode-cuda.h"
#include "kernels/device/host.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <tuple>

using namespace refreekv::tiles;

static void check(cudaError_t err) {
    if (err != cudaSuccess) {
        fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(err));
        exit(1);
    }
}

// memory of the host, and the same on the device
template <typename T>
struct both {
    std::vector<T> host;
    T *            device = nullptr;

    explicit both(size_t n) : host(n) { check(cudaMalloc(&device, std::max<size_t>(n, 1)*sizeof(T))); }
    ~both() { cudaFree(device); }

    void send()    { check(cudaMemcpy(device, host.data(), host.size()*sizeof(T), cudaMemcpyHostToDevice)); }
    void receive() { check(cudaMemcpy(host.data(), device, host.size()*sizeof(T), cudaMemcpyDeviceToHost)); }
};

struct shape {
    const char * name;
    int          n_head_kv, n_gqa, n_k, n_v, n_coded, n_tokens;
    float        theta, soft_cap;
    bool         sinks;
};

static const shape SHAPES[] = {
    { "llama-3-8B, 32k",          8,  4, 128, 128, 32768, 1, 0.003f, 0.0f,  false },
    { "llama-3-8B, 32k, codes",   8,  4, 128, 128, 32768, 1, INFINITY, 0.0f, false },
    { "llama-3-8B, 8k",           8,  4, 128, 128,  8192, 1, 0.003f, 0.0f,  false },
    { "llama-3-8B, 8k, 8 tokens", 8,  4, 128, 128,  8192, 8, 0.003f, 0.0f,  false },
    { "qwen2.5-1.5B, 32k",        2,  6, 128, 128, 32768, 1, 0.003f, 0.0f,  false },
    { "gemma-2, 8k",              4,  2, 256, 256,  8192, 1, 0.003f, 50.0f, false },
    { "one query head, sinks",    4,  1,  64,  64,  4096, 2, 0.003f, 0.0f,  true  },
    { "keys longer than values",  2, 16, 192, 128,  4096, 1, 0.003f, 0.0f,  false },
};

static const int N_HELD  = 512;
static const int N_TIMED = 100;

static uint16_t half_of(float x) { return __half_as_ushort(__float2half(x)); }

static bool run_one(const shape & s) {
    std::mt19937 rng(0);
    std::normal_distribution<float> normal;

    call c = {};
    c.s.n_tokens  = s.n_tokens;
    c.s.n_head_kv = s.n_head_kv;
    c.s.n_gqa     = s.n_gqa;
    c.s.n_k       = s.n_k;
    c.s.n_v       = s.n_v;
    c.s.n_coded   = s.n_coded;
    c.s.n_held    = N_HELD;

    c.s.pre_scale  = 1.0f/sqrtf(s.n_k)/(s.soft_cap > 0.0f ? s.soft_cap : 1.0f);
    c.s.soft_cap   = s.soft_cap;
    c.s.post_scale = 1.0f;
    c.s.theta      = s.theta;

    const int n_blocks = s.n_coded/CELLS;

    both<float>    q    ((size_t) s.n_tokens*c.s.n_head()*s.n_k);
    both<uint16_t> mask ((size_t) s.n_tokens*c.s.n_places());
    both<float>    sinks(c.s.n_head());
    both<uint16_t> k    ((size_t) N_HELD*s.n_head_kv*s.n_k);
    both<uint16_t> v    ((size_t) N_HELD*s.n_head_kv*s.n_v);
    both<uint8_t>  codes_k(s.n_head_kv*n_blocks*block_bytes(s.n_k, BITS_K));
    both<uint8_t>  codes_v(s.n_head_kv*n_blocks*block_bytes(s.n_v, BITS_V));
    both<uint64_t> exact  (s.n_coded);
    both<uint64_t> n_read (s.n_head_kv);
    both<float>    out    ((size_t) s.n_tokens*c.s.n_head()*s.n_v);
    both<float4>   scratch(s.n_tokens*c.s.scratch_size()/4 + 1);

    for (auto & x : q.host)     { x = 1.5f*normal(rng); }
    for (auto & x : sinks.host) { x = 4.0f*normal(rng); }
    for (auto * rows : { &k, &v }) {
        for (auto & x : rows->host) { x = half_of(normal(rng)); }
    }
    for (auto & x : mask.host) { x = rng()%50 == 0 ? 0xfc00 : 0; }
    for (auto [codes, n, bits] : { std::make_tuple(&codes_k, s.n_k, BITS_K), std::make_tuple(&codes_v, s.n_v, BITS_V) }) {
        for (auto & x : codes->host) { x = rng(); }

        for (int64_t b = 0; b < (int64_t) s.n_head_kv*n_blocks; ++b) {
            auto * meta = (uint16_t *) (codes->host.data() + b*block_bytes(n, bits));
            for (int d = 0; d < n; ++d) {
                meta[d]     = half_of(-2.0f);
                meta[n + d] = half_of(4.0f/((1 << bits) - 1));
            }
        }
    }

    // exact rows, in host memory that the device reads
    c.s.exact_type_k = c.s.exact_type_v = F16;
    c.s.exact_k    = 2*s.n_k;
    c.s.exact_head = 2*(s.n_k + s.n_v);

    uint16_t *   rows = nullptr;
    const size_t row  = (size_t) s.n_head_kv*(s.n_k + s.n_v);
    check(cudaMallocHost((void **) &rows, s.n_coded*row*sizeof(uint16_t)));
    for (size_t i = 0; i < s.n_coded*row; ++i) { rows[i] = half_of(1.2f*normal(rng)); }
    for (int i = 0; i < s.n_coded; ++i) { exact.host[i] = i%7 == 0 ? 0 : (uint64_t) (uintptr_t) (rows + i*row); }

    c.s.next_head_q     = s.n_k;
    c.s.next_token_q    = c.s.n_head()*s.n_k;
    c.s.mask_type       = F16;
    c.s.has_sinks       = s.sinks;
    c.s.k = { F16, 2*s.n_head_kv*s.n_k, 2*s.n_k, 0 };
    c.s.v = { F16, 2*s.n_head_kv*s.n_v, 2*s.n_v, 0 };
    c.s.next_token_mask = 2*c.s.n_places();

    const auto at = [&](auto && get) {
        call res = c;
        res.q       = get(q);
        res.mask    = (const uint8_t *) get(mask);
        res.sinks   = get(sinks);
        res.k       = (const uint8_t *) get(k);
        res.v       = (const uint8_t *) get(v);
        res.codes_k = get(codes_k);
        res.codes_v = get(codes_v);
        res.exact   = get(exact);
        res.n_read  = get(n_read);
        res.out     = get(out);
        res.scratch = (float *) get(scratch);
        return res;
    };
    q.send(); mask.send(); sinks.send(); k.send(); v.send(); codes_k.send(); codes_v.send(); exact.send(); n_read.send();

    const call on_host   = at([](auto & x) { return x.host.data(); });
    const call on_device = at([](auto & x) { return x.device; });

    cudaStream_t stream;
    check(cudaStreamCreate(&stream));

    launch(on_device, stream);
    check(cudaGetLastError());
    check(cudaStreamSynchronize(stream));

    run(on_host);
    const auto expected      = out.host;
    const auto n_read_host   = n_read.host;
    out.receive();
    n_read.receive();

    float distance = 0.0f;
    float largest  = 0.0f;
    for (size_t i = 0; i < expected.size(); ++i) {
        distance = std::max(distance, std::isfinite(out.host[i]) ? fabsf(out.host[i] - expected[i]) : INFINITY);
        largest  = std::max(largest, fabsf(expected[i]));
    }
    int64_t rows_host = 0;
    int64_t rows_device = 0;
    for (int h = 0; h < s.n_head_kv; ++h) {
        rows_host   += n_read_host[h];
        rows_device += n_read.host[h];
    }

    // again, as a CUDA graph: no bit may differ, and no launch may depend on the host
    cudaGraph_t     graph;
    cudaGraphExec_t exec;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    launch(on_device, stream);
    check(cudaStreamEndCapture(stream, &graph));
    check(cudaGraphInstantiate(&exec, graph, 0));

    cudaEvent_t begin;
    cudaEvent_t end;
    check(cudaEventCreate(&begin));
    check(cudaEventCreate(&end));
    check(cudaGraphLaunch(exec, stream));
    check(cudaEventRecord(begin, stream));
    for (int i = 0; i < N_TIMED; ++i) {
        check(cudaGraphLaunch(exec, stream));
    }
    check(cudaEventRecord(end, stream));
    check(cudaStreamSynchronize(stream));

    float ms = 0.0f;
    check(cudaEventElapsedTime(&ms, begin, end));

    const auto first = out.host;
    out.receive();
    const bool same = std::equal(first.begin(), first.end(), out.host.begin());

    const double us    = 1000.0*ms/N_TIMED;
    const double bytes = codes_k.host.size() + codes_v.host.size();

    // a row more or less by rounding
    const bool ok = same && distance <= 1e-3f*largest && llabs(rows_host - rows_device) <= 1 + rows_host/50;

    printf("| %s | %.1e | %lld | %lld | %s | %.1f | %.0f | %s |\n", s.name, distance/largest, (long long) rows_host, (long long) rows_device,
        same ? "yes" : "**no**", us, bytes/us/1e3, ok ? "" : "**wrong**");
    fflush(stdout);

    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
    cudaFreeHost(rows);

    return ok;
}

int main() {
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess || n == 0) {
        printf("There is no GPU: nothing was run.\n");
        return 77;
    }
    printf("| attention | largest difference, relative | rows read, host | GPU | same bits twice | us | GB/s of codes | |\n|---|---|---|---|---|---|---|---|\n");

    bool ok = true;
    for (const auto & s : SHAPES) {
        ok = run_one(s) && ok;
    }
    return ok ? 0 : 1;
}

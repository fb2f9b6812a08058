#pragma once

// The code of this folder is compiled three times: by nvcc and by Metal's compiler for a GPU, and by the host's compiler for tests. Metal's
// language is C++14 without the standard library, and it wants to know of each pointer which memory it points to.
#if defined(__METAL_VERSION__)

#define REFREEKV_DEVICE   inline
#define REFREEKV_CONSTANT constexpr constant

#else

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define REFREEKV_DEVICE __host__ __device__ inline
#else
#define REFREEKV_DEVICE inline
#endif
#define REFREEKV_CONSTANT constexpr

#endif

namespace refreekv { namespace tiles {

// pointers to the memory of the device, to that which the threads of a team share, and to a thread's own; and an argument that is only read
#ifdef __METAL_VERSION__
template <typename T> using device_ptr = device T *;
template <typename T> using team_ptr   = threadgroup T *;
template <typename T> using own_ptr    = thread T *;
template <typename T> using in         = const thread T &;
#else
template <typename T> using device_ptr = T *;
template <typename T> using team_ptr   = T *;
template <typename T> using own_ptr    = T *;
template <typename T> using in         = const T &;
#endif

// The threads that work on one tile. A function that takes a team is called by all of its threads. Each thread does every size-th item,
// from its rank on. No sum depends on the number of threads: where several threads add up numbers, the parts and their order are fixed.

#if defined(__METAL_VERSION__)

// the threads of a threadgroup, which also read what others have written to the memory of the device
struct metal_threadgroup {
    int rank;
    int size;

    void sync() const { metal::threadgroup_barrier(metal::mem_flags::mem_device | metal::mem_flags::mem_threadgroup); }
};

// what the standard library has elsewhere. Metal's own tanh is wrong for large numbers unless it is the precise one
inline float expf (float x)          { return metal::exp(x); }
inline float logf (float x)          { return metal::log(x); }
inline float tanhf(float x)          { return metal::precise::tanh(x); }
inline float fmaxf(float a, float b) { return metal::fmax(a, b); }

#else

// a team of one thread, on the host
struct lone {
    static constexpr int rank = 0;
    static constexpr int size = 1;

    REFREEKV_DEVICE void sync() const {}
};

#endif

#ifdef __CUDACC__
// the threads of a CUDA block
struct cuda_block {
    int rank;
    int size;

    // its callers are compiled for the host as well, where nothing calls it
    REFREEKV_DEVICE void sync() const {
#ifdef __CUDA_ARCH__
        __syncthreads();
#endif
    }
};
#endif

REFREEKV_DEVICE int lesser(int a, int b) { return a < b ? a : b; }

}} // namespace refreekv::tiles

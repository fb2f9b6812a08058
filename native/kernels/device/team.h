#pragma once

#include <cmath>
#include <cstdint>

// The code of this folder is compiled twice: by nvcc for a GPU, and by the host's compiler for tests.
#ifdef __CUDACC__
#include <cuda_fp16.h>
#define REFREEKV_DEVICE __host__ __device__ inline
#else
#define REFREEKV_DEVICE inline
#endif

namespace refreekv { namespace device {

// The threads that work on one tile. A function that takes a team is called by all of its threads. Each thread does every size-th item,
// from its rank on. No sum depends on the number of threads: where several threads add up numbers, the parts and their order are fixed.

// a team of one thread, on the host
struct lone {
    static constexpr int rank = 0;
    static constexpr int size = 1;

    REFREEKV_DEVICE void sync() const {}
};

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

}} // namespace refreekv::device

// The tiles of this folder as CUDA kernels. Part of ggml's CUDA backend (CMakeLists.txt). Never run on a GPU yet.

#include "kernels/device/decode-cuda.h"
#include "kernels/device/launches.h"

namespace refreekv { namespace tiles {

extern __shared__ __align__(16) float shared_room[]; // four numbers of it are read at once

static __device__ cuda_block this_block() {
    return { (int) threadIdx.x, (int) blockDim.x };
}

static __global__ void __launch_bounds__(JUDGES) judge_kernel(const call c) {
    judge(this_block(), c, blockIdx.x, blockIdx.y, blockIdx.z, shared_room);
}

static __global__ void __launch_bounds__(MERGERS) merge_kernel(const call c) {
    merge(this_block(), c, blockIdx.x, blockIdx.y, shared_room);
}

static __global__ void __launch_bounds__(OTHERS, 4) attend_kernel(const call c) {
    attend(this_block(), c, blockIdx.x, blockIdx.y, blockIdx.z, shared_room);
}

static __global__ void __launch_bounds__(OTHERS) join_kernel(const call c) {
    join(this_block(), c, blockIdx.x, blockIdx.y);
}

// without an allocation, and without a word to the host: launches of a call are the same as long as its sizes are, so that a CUDA graph
// can hold them
void launch(const call & c, cudaStream_t stream) {
    void (* const kernels[N_PASSES])(const call) = { judge_kernel, merge_kernel, attend_kernel, join_kernel };

    for (int p = 0; p < N_PASSES; ++p) {
        const launch_size size = size_of((pass) p, c.s);

        kernels[p]<<<dim3(size.teams[0], size.teams[1], size.teams[2]), size.threads, size.bytes, stream>>>(c);
    }
}

}} // namespace refreekv::tiles

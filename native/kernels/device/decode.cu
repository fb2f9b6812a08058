// The tiles of this folder as CUDA kernels. Part of ggml's CUDA backend (CMakeLists.txt). Never run on a GPU yet.

#include "kernels/device/attend.h"
#include "kernels/device/decode-cuda.h"

namespace refreekv { namespace device {

// threads of a team
constexpr int JUDGES  = CELLS;
constexpr int MERGERS = MERGED;
constexpr int OTHERS  = 128;

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
    judge_kernel <<<dim3(c.n_blocks(), c.n_head_kv, c.n_tokens), JUDGES,  judge_room(c)*sizeof(float),         stream>>>(c);
    merge_kernel <<<dim3(c.n_head(), c.n_tokens),                MERGERS, 2*MERGED*sizeof(float),              stream>>>(c);
    attend_kernel<<<dim3(c.n_spans(), c.n_head_kv, c.n_tokens),  OTHERS,  attend_room::size(c)*sizeof(float),  stream>>>(c);
    join_kernel  <<<dim3(c.n_head(), c.n_tokens),                OTHERS,  0,                                   stream>>>(c);
}

}} // namespace refreekv::device

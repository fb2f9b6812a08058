#pragma once

// What the patched CUDA backend calls. Its sources are those of the backends for AMD and Moore Threads, too, which have no kernels of ours.

struct ggml_tensor;

namespace refreekv { namespace device {

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)
inline bool supports(const ggml_tensor *)       { return false; }
inline bool compute (ggml_tensor *, void *)     { return false; }
inline bool offers  (const char *)              { return false; }
#else
// whether a node is one of ours that the kernels can compute
bool supports(const ggml_tensor * node);

// false: it is not. stream: a cudaStream_t
bool compute(ggml_tensor * node, void * stream);

// whether a name is that by which libllama asks for these kernels (graph/device-node.h)
bool offers(const char * name);
#endif

}} // namespace refreekv::device

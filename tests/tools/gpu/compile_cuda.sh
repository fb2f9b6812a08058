#!/usr/bin/env bash
# Compiles llama.cpp's CUDA kernels that the cache adds to a graph, for sm_86, sm_89 and sm_90, and what is ours of CUDA:
# object files, no GPU needed.
#
#     tests/tools/gpu/compile_cuda.sh [FOLDER]
#
# Needs nvcc and a host compiler it takes, and cublas_v2.h: the CUDA toolkit's, or CUBLAS_INCLUDE=DIR (the PyPI package
# nvidia-cublas has it under nvidia/cu13/include). llama.cpp is the pinned one (REFREEKV_UPSTREAM_DIR: an unpacked sdist).
set -euo pipefail
cd "$(dirname "$0")/../../.."
out=$(mkdir -p "${1:-build/cuda-objects}" && cd "${1:-build/cuda-objects}" && pwd)

python cmake/prepare_upstream.py "$out" --downloads "$out/downloads" \
    ${REFREEKV_UPSTREAM_DIR:+--source "$REFREEKV_UPSTREAM_DIR"}
ggml=$out/llama.cpp/ggml

# gather: getrows concat cpy; eviction graph: and softmax pool2d scale unary clamp binbcast; query ring: set-rows; the dispatch,
# buffers and supports_op: ggml-cuda. The matrix products are any model's.
for name in getrows concat cpy set-rows softmax pool2d scale unary clamp binbcast ggml-cuda; do
    nvcc -std=c++17 -O3 -use_fast_math -extended-lambda \
        -gencode arch=compute_86,code=sm_86 -gencode arch=compute_89,code=sm_89 -gencode arch=compute_90,code=sm_90 \
        -Inative -I"$ggml/include" -I"$ggml/src" ${CUBLAS_INCLUDE:+-I"$CUBLAS_INCLUDE"} \
        -c "$ggml/src/ggml-cuda/$name.cu" -o "$out/$name.o"
    echo "$name.o: $(stat -c %s "$out/$name.o") bytes"
done

# compile_kernels.sh has our kernels, for all architectures
for source in native/cache/region-cuda.cpp native/kernels/device/hooks-cuda.cpp; do
    name=$(basename "$source" .cpp)
    nvcc -std=c++17 -O3 -DREFREEKV_CUDA_VMM -Inative -I"$ggml/include" -c "$source" -o "$out/$name.o"
    echo "$name.o: $(stat -c %s "$out/$name.o") bytes"
done

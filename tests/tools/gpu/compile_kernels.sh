#!/usr/bin/env bash
# Compiles our CUDA kernels (native/kernels/device) for each architecture that the installed nvcc knows, of those that
# llama.cpp is built for, and prints a table of what each kernel takes. No GPU needed.
#
#     tests/tools/gpu/compile_kernels.sh [FOLDER]
#
# Needs nvcc and a host compiler that it takes.
set -euo pipefail
cd "$(dirname "$0")/../../.."
out=$(mkdir -p "${1:-build/cuda-kernels}" && cd "${1:-build/cuda-kernels}" && pwd)

known=$(nvcc --list-gpu-arch)
nvcc --version | tail -2 | head -1
printf '\n| architecture | kernel | registers | spilled bytes |\n|---|---|---|---|\n'
for arch in 75 80 86 89 90 100 120; do
    grep -q "^compute_$arch\$" <<<"$known" || { echo "| sm_$arch | not known to this nvcc | | |"; continue; }
    nvcc -std=c++17 -O3 -use_fast_math -Werror all-warnings -arch="sm_$arch" -Xptxas -v \
        -Inative -c native/kernels/device/decode.cu -o "$out/decode.sm_$arch.o" 2>"$out/sm_$arch.log" ||
        { cat "$out/sm_$arch.log" >&2; exit 1; }
    awk -v arch="sm_$arch" '
        /Compiling entry/ { match($0, /[a-z]+_kernel/); kernel = substr($0, RSTART, RLENGTH) }
        /spill stores/    { spilled = $5 }
        /Used .* registers/  { match($0, /Used [0-9]+/); print "| " arch " | " kernel " | " substr($0, RSTART + 5, RLENGTH - 5) " | " spilled " |" }
    ' "$out/sm_$arch.log"
done

#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds for it, compares every policy on it with the CPU, measures, writes a report.
#
#     tests/tools/gpu/run.sh [REPORT.md] [CMAKE_ARGS]      CMAKE_ARGS default to -DGGML_CUDA=ON; "-DGGML_VULKAN=ON" works as well
#
# Needs what the README's "Install" needs, and the CUDA toolkit. A virtual environment and the report go to build/gpu.
set -euo pipefail
cd "$(dirname "$0")/../../.."
mkdir -p build/gpu
report=$(realpath -m "${1:-build/gpu/report.md}")

python3 -m venv build/gpu/venv
. build/gpu/venv/bin/activate
CMAKE_ARGS="${2:--DGGML_CUDA=ON}" pip install --quiet ".[test]"
model=$(python -c "from refreekv_cpp.default_model import default_model; print(default_model())")

status=0
section() { # title, command: its output, whatever becomes of it
    printf '\n## %s\n\n`%s`\n\n' "$1" "${*:2}"
    "${@:2}" || { status=$?; printf '\n**exit code %s**\n' "$status"; }
}

{
    echo "# refreekv-cpp $(git rev-parse --short HEAD) on a GPU"
    echo
    echo '```'
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv 2>/dev/null || echo "no nvidia-smi"
    nvcc --version 2>/dev/null | tail -2 || true
    echo '```'
    section "Policies on the GPU beside the CPU" python tests/tools/backends.py
    section "The same, in caches that grow in place" python tests/tools/backends.py --n-ctx 262144
    section "A device whose memory the host cannot see" pytest -q -m device
    section "Speed and memory" refreekv bench "$model" --kv-policy full,refreekv --tokens 2048,7168 --gpu-layers all
    section "A model of llama-3-8B's shape" python tests/tools/gpu/large.py
} 2> >(tee build/gpu/log >&2) | tee "$report"

exit "$status"

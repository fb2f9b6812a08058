#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds for it, compares every policy on it with the CPU, measures, writes a report.
#
#     tests/tools/gpu/run.sh [REPORT.md] [CMAKE_ARGS]      CMAKE_ARGS default to -DGGML_CUDA=ON; "-DGGML_VULKAN=ON" works as well
#     tests/tools/gpu/run.sh --dry-run                     every step on the CPU, small, with what is installed: a trial of this script
#
# Needs what the README's "Install" needs, and the CUDA toolkit. A virtual environment and the report go to build/gpu; what
# was built of the same commit is used again. Each step has a limit of time, 11.5 minutes together, without the build.
# STOCK_LIB=DIR names the folder of a stock libllama to measure beside ours; else `full` stands for it.
set -euo pipefail
cd "$(dirname "$0")/../../.."
mkdir -p build/gpu
out=build/gpu

dry=
[ "${1:-}" != --dry-run ] || { dry=1; shift; }
report=$(realpath -m "${1:-$out/report.md}")

if [ -z "$dry" ]; then
    commit=$(git rev-parse HEAD)
    if [ "$(cat $out/built 2>/dev/null)" != "$commit ${2:-}" ]; then
        python3 -m venv $out/venv
        CMAKE_ARGS="${2:--DGGML_CUDA=ON}" $out/venv/bin/pip install --quiet ".[test]"
        echo "$commit ${2:-}" >$out/built
    fi
    . $out/venv/bin/activate
fi

stock=(${STOCK_LIB:+--against "$STOCK_LIB"})
status=0
section() { # title, seconds, command: its output, whatever becomes of it
    printf '\n## %s\n\n`%s`\n\n' "$1" "${*:3}"
    local code=0
    timeout -k 5 "$2" "${@:3}" || code=$?
    case $code in
        0) ;;
        77) echo "Not run: this machine lacks what it needs." ;;
        124) printf '\n**Ended after %s seconds.**\n' "$2"; status=$code ;;
        *) printf '\n**exit code %s**\n' "$code"; status=$code ;;
    esac
}

memory() { # by the driver's own figure
    printf '\n%s: ' "$1"
    nvidia-smi --query-gpu=memory.used,memory.total --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
}

tiles() { # our kernels by themselves, beside the host
    command -v nvcc >/dev/null || return 77
    nvcc -std=c++17 -O3 -use_fast_math -arch="${1:-native}" -Inative \
        tests/tools/gpu/tiles.cu native/kernels/device/decode.cu -o $out/tiles
    $out/tiles
}
export -f tiles
export out

kernels=REFREEKV_DEVICE_KERNELS=1

{
    echo "# refreekv-cpp $(git rev-parse --short HEAD) on a GPU"
    echo
    echo '```'
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv 2>/dev/null || echo "no nvidia-smi"
    nvcc --version 2>/dev/null | tail -2 || true
    echo '```'
    memory "Memory in use before"
    if [ -n "$dry" ]; then
        section "Our kernels by themselves" 120 bash -c "tiles sm_86"
        section "Policies beside the CPU" 400 python tests/tools/backends.py --policy full --policy "refreekv, codes"
        section "Our kernels in the cache" 400 python tests/tools/backends.py --env $kernels --policy "refreekv, kernels"
        section "Large" 400 python tests/tools/gpu/large.py --tiny --tokens 1024 --only refreekv,kernels "${stock[@]}"
    else
        section "Our kernels by themselves" 60 bash -c tiles
        section "Policies on the GPU beside the CPU" 120 python tests/tools/backends.py
        section "Our kernels in the cache" 60 \
            python tests/tools/backends.py --env $kernels --policy full --policy "refreekv, kernels"
        section "In caches that grow in place" 60 python tests/tools/backends.py --n-ctx 262144 --policy full --policy refreekv
        model=$(timeout 60 python -c "from refreekv_cpp.default_model import default_model; print(default_model())") ||
            echo "**SmolLM2 could not be had.**"
        section "Speed and memory" 60 \
            refreekv bench "$model" --kv-policy full,refreekv --tokens 2048,7168 --gpu-layers all --flash-attn "${stock[@]}"
        section "The same with our kernels" 60 \
            env $kernels refreekv bench "$model" --kv-policy refreekv --tokens 2048,7168 --gpu-layers all --flash-attn
        section "A model of llama-3-8B's shape" 210 python tests/tools/gpu/large.py --only refreekv,kernels,snapkv "${stock[@]}"
    fi
    memory "Memory in use after"
    exit "$status"
} 2> >(tee $out/log >&2) | tee "$report"

#!/usr/bin/env bash
# The cuda kernels on a GPU: equivalence, compute-sanitizer, timings against plain PyTorch and triton.
#
#   benchmarks/gpu/run_cuda.sh --plan     what it would do; needs no GPU
#   benchmarks/gpu/run_cuda.sh            builds the extensions in place, measures; under eight minutes
#
# Builds for the GPU at hand alone, unless CAPSOPS_CUDA_ARCHS says otherwise. Results go to $OUT, by default
# build/gpu: kernels-cuda-DEVICE.json after every case, cuda.log, and a log of each tool of compute-sanitizer.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=${PYTHON:-python3}
out=${OUT:-build/gpu}
export PYTHONUNBUFFERED=1
. benchmarks/gpu/build.sh

if [[ " $* " == *" --plan "* ]]; then
    echo "build: $python setup.py build_ext --inplace"
    exec "$python" -m benchmarks.gpu.kernels --impl cuda --beside triton --out "$out" --seconds 400 "$@"
fi

mkdir -p "$out"
build "$out/cuda-build.log"
{
    "$python" -m capsops
    # The last case may still compile its peers when the seconds are over.
    timeout --kill-after=10 $((465 - SECONDS)) "$python" -m benchmarks.gpu.kernels --impl cuda --beside triton \
        --out "$out" --seconds $((400 - SECONDS)) "$@"
} 2>&1 | tee "$out/cuda.log"

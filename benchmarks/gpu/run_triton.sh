#!/usr/bin/env bash
# The triton kernels on a GPU: equivalence, compute-sanitizer, timings against plain PyTorch.
#
#   benchmarks/gpu/run_triton.sh --plan     what it would do; needs no GPU
#   benchmarks/gpu/run_triton.sh            builds the CPU extension in place, measures; under eight minutes
#
# Results go to $OUT, by default build/gpu: kernels-triton-DEVICE.json after every case, and triton.log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=${PYTHON:-python3}
out=${OUT:-build/gpu}
export PYTHONUNBUFFERED=1
. benchmarks/gpu/build.sh

if [[ " $* " == *" --plan "* ]]; then
    echo "build: $python setup.py build_ext --inplace, without the CUDA kernels"
    exec "$python" -m benchmarks.gpu.kernels --impl triton --out "$out" --seconds 400 "$@"
fi

mkdir -p "$out"
build "$out/triton-build.log" 0
{
    "$python" -m capsops
    # The last case may still compile its peers when the seconds are over.
    timeout --kill-after=10 $((465 - SECONDS)) "$python" -m benchmarks.gpu.kernels --impl triton --out "$out" \
        --seconds $((400 - SECONDS)) "$@"
} 2>&1 | tee "$out/triton.log"

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

if [[ " $* " == *" --plan "* ]]; then
    echo "build: $python setup.py build_ext --inplace, without the CUDA kernels"
    exec "$python" -m benchmarks.gpu.kernels --impl triton --out "$out" "$@"
fi

mkdir -p "$out"
CAPSOPS_BUILD_CUDA=0 "$python" setup.py build_ext --inplace >"$out/triton-build.log" 2>&1 || { tail -30 "$out/triton-build.log" && exit 1; }
{
    "$python" -m capsops
    "$python" -m benchmarks.gpu.kernels --impl triton --out "$out" "$@"
} 2>&1 | tee "$out/triton.log"

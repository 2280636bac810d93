#!/usr/bin/env bash
# The cuda kernels on a GPU: equivalence, compute-sanitizer, timings against plain PyTorch.
#
#   benchmarks/gpu/run_cuda.sh --plan     what it would do; needs no GPU
#   benchmarks/gpu/run_cuda.sh            builds the extensions in place, measures; under eight minutes
#
# Results go to $OUT, by default build/gpu: kernels-cuda-DEVICE.json after every case, and cuda.log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=${PYTHON:-python3}
out=${OUT:-build/gpu}
export PYTHONUNBUFFERED=1

if [[ " $* " == *" --plan "* ]]; then
    echo "build: $python setup.py build_ext --inplace"
    exec "$python" -m benchmarks.gpu.kernels --impl cuda --beside triton --out "$out" "$@"
fi

mkdir -p "$out"
"$python" setup.py build_ext --inplace >"$out/cuda-build.log" 2>&1 || { tail -30 "$out/cuda-build.log" && exit 1; }
{
    "$python" -m capsops
    "$python" -m benchmarks.gpu.kernels --impl cuda --beside triton --out "$out" "$@"
} 2>&1 | tee "$out/cuda.log"

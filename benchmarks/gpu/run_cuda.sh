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
export PYTHONUNBUFFERED=1 CAPSOPS_BUILD_CUDA=1

if [[ " $* " == *" --plan "* ]]; then
    echo "build: $python setup.py build_ext --inplace"
    exec "$python" -m benchmarks.gpu.kernels --impl cuda --beside triton --out "$out" --seconds 400 "$@"
fi

command -v nvcc >/dev/null || export PATH=$PATH:/usr/local/cuda/bin
if [[ -z ${CAPSOPS_CUDA_ARCHS:-} ]]; then
    CAPSOPS_CUDA_ARCHS=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
    export CAPSOPS_CUDA_ARCHS
fi
mkdir -p "$out"
"$python" setup.py build_ext --inplace >"$out/cuda-build.log" 2>&1 || { tail -30 "$out/cuda-build.log" && exit 1; }
{
    echo "built for $CAPSOPS_CUDA_ARCHS in $SECONDS s"
    "$python" -m capsops
    # The last case may still compile its peers when the seconds are over.
    timeout --kill-after=10 $((465 - SECONDS)) "$python" -m benchmarks.gpu.kernels --impl cuda --beside triton \
        --out "$out" --seconds $((400 - SECONDS)) "$@"
} 2>&1 | tee "$out/cuda.log"

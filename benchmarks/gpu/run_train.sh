#!/usr/bin/env bash
# Seconds per MNIST epoch of CapsNet on a GPU, beside the einsum model, and a profile of what is left.
#
#   benchmarks/gpu/run_train.sh --plan     what it would do; needs no GPU
#   benchmarks/gpu/run_train.sh            builds the extensions in place, measures; under eight minutes
#
# No network is needed. MNIST's four gz files lie in $INFOCAPSGAN_DATA/mnist (default: .data/mnist, which git
# ignores). Results go to $OUT, by default build/gpu: train-DEVICE.json, train-profile.txt, train.log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=${PYTHON:-python3}
out=${OUT:-build/gpu}
export INFOCAPSGAN_DATA=${INFOCAPSGAN_DATA:-$PWD/.data} PYTHONUNBUFFERED=1
. benchmarks/gpu/build.sh

if [[ " $* " == *" --plan "* ]]; then
    echo "build: $python setup.py build_ext --inplace"
    exec "$python" -m benchmarks.gpu.train --out "$out" "$@"
fi

for name in train-images-idx3 train-labels-idx1 t10k-images-idx3 t10k-labels-idx1; do
    file=$INFOCAPSGAN_DATA/mnist/$name-ubyte.gz
    [ -f "$file" ] || { echo "$file is missing" >&2 && exit 1; }
done
mkdir -p "$out"
rm -f "$out/train-profile.txt"
build "$out/train-build.log"
{
    "$python" -m capsops
    timeout --kill-after=10 $((465 - SECONDS)) "$python" -m benchmarks.gpu.train --out "$out" "$@"
} 2>&1 | tee "$out/train.log"

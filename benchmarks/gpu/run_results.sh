#!/usr/bin/env bash
# Full-size results on MNIST on a GPU, seed by seed; see results/ for those at small width on a CPU.
#
#   benchmarks/gpu/run_results.sh --plan                    every command of every part; needs no GPU
#   benchmarks/gpu/run_results.sh infocapsgan               one part: it ends within eight minutes
#   SEEDS="3 4" benchmarks/gpu/run_results.sh infocapsgan   other seeds than 0 1 2 3 4
#   IMPL=triton benchmarks/gpu/run_results.sh infocapsgan   capsules routed by these kernels
#
# Parts: infocapsgan, information (mutual information on real images only), encoder (with labels), infogan,
# capsnet, stacked (its tuned encoder), deformed (ten epochs with deformed images), fc, fc-bn, deconv and deconv-bn
# (its decoders), multi (MultiMNIST). Without IMPL capsops chooses the kernels. After each seed $OUT/PART.json has the
# mean over the seeds so far; $OUT is by default build/gpu. A seed that the time cuts short has no result; on the same
# disk the same command goes on with it. No network is needed: MNIST's four gz files are in $INFOCAPSGAN_DATA/mnist
# (default: .data/mnist, which git ignores). The packages that pyproject.toml requires must be importable.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=${PYTHON:-python3}
out=${OUT:-build/gpu}
limit=450
impl=${IMPL:-auto}
read -ra seeds <<<"${SEEDS:-0 1 2 3 4}"
export INFOCAPSGAN_DATA=${INFOCAPSGAN_DATA:-$PWD/.data} PYTHONUNBUFFERED=1
. benchmarks/gpu/build.sh

parts="infocapsgan information encoder infogan capsnet stacked deformed fc fc-bn deconv deconv-bn multi"

# The encoder of the paper at its full size, trained as its rows of small width in results/ are.
single="capsnet --stem single --width 256 --turn 0 --resize 0 --shear 0"

command_of() {
    local options dataset=mnist
    case $1 in
        infocapsgan) options="infocapsgan --epochs 10" ;;
        information) options="infocapsgan --epochs 10 --adversarial-weight 0" ;;
        encoder) options="encoder --epochs 10" ;;
        infogan) options="infogan --epochs 20 --evaluate" ;;
        capsnet) options="$single --learning-rate 2e-3 --epochs 50 --rate-decay 0.92" ;;
        stacked) options="capsnet --width 256 --epochs 50 --rate-decay 0.92" ;;
        deformed) options="$single --learning-rate 2e-3 --epochs 10 --rate-decay 0.8 --deform 1" ;;
        fc | fc-bn | deconv | deconv-bn)
            options="$single --learning-rate 2e-3 --epochs 25 --rate-decay 0.88 --decoder ${1%-bn}"
            [[ $1 != *-bn ]] || options+=" --decoder-batch-norm"
            ;;
        multi)
            options="$single --learning-rate 1e-3 --batch-size 128 --epochs 20 --rate-decay 0.85"
            dataset=multi-mnist
            ;;
        *) echo "PART: got $1, takes ${parts// /, }" >&2 && exit 2 ;;
    esac
    [[ $impl == auto ]] || options+=" --impl $impl"
    echo "$python -m infocapsgan.sweep $options --dataset $dataset --device cuda --out build/results/$1"
}

# first N: the first N seeds, as the sweep takes them.
first() { (IFS=, && echo "${seeds[*]:0:$1}"); }

if [[ ${1:-} == --plan ]]; then
    echo "build: $python setup.py build_ext --inplace"
    for part in $parts; do
        echo "$part, $limit s at most, kept in $out/$part.json after each seed:"
        for ((n = 1; n <= ${#seeds[@]}; n++)); do echo "    $(command_of "$part") --seeds $(first $n)"; done
    done
    exit
fi
[ $# -eq 1 ] || { echo "usage: $0 --plan | PART" >&2 && exit 2; }
part=$1
command=$(command_of "$part")

mkdir -p "$out" build/results
build "$out/results-build.log" "$([[ $impl == cuda ]] && echo 1 || echo 0)"
{
    "$python" -m capsops
    for ((n = 1; n <= ${#seeds[@]}; n++)); do
        left=$((limit - SECONDS))
        [ "$left" -gt 30 ] || { echo "no time is left for seed ${seeds[n - 1]}" && break; }
        # shellcheck disable=SC2086 # the command is words
        timeout --kill-after=20 "$left" $command --seeds "$(first $n)"
        cp "build/results/$part/result.json" "$out/$part.json"
    done
} 2>&1 | tee "$out/results-$part.log"

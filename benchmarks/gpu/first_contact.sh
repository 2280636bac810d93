#!/usr/bin/env bash
# The first minutes on a GPU: is it right, is it clean, how fast is it. At most $LIMIT seconds (default 505).
#
#   bash benchmarks/gpu/first_contact.sh               on the device
#   DEVICE=cpu bash benchmarks/gpu/first_contact.sh    the parts that need no GPU, to see that the script runs
#   PARTS="times table" bash benchmarks/gpu/first_contact.sh    some parts, after the build
#
# Results go to $OUT (default build/gpu), at most eight files: results.jsonl (a line as soon as something is
# known), log.txt, build.log, sanitizer.txt, train-profile.txt, counters.txt, sketches.jsonl, table.txt. A part that
# fails stops no other. MNIST's four gz files lie in $INFOCAPSGAN_DATA/mnist (default: .data/mnist, which git ignores).
# Needed: torch for CUDA, nvcc, ninja and pybind11 (or a capsops._cuda that is built); no network.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
export OUT=${OUT:-$PWD/build/gpu} PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-16}
export INFOCAPSGAN_DATA=${INFOCAPSGAN_DATA:-$PWD/.data} PATH=$PATH:/usr/local/cuda/bin
device=${DEVICE:-cuda} python=${PYTHON:-python3} limit=${LIMIT:-505}
parts=" ${PARTS:-env correct sanitizer edge tests systems times sketches train counters table} "
read -ra impls <<<"${IMPLS:-cuda triton}"
work=$(mktemp -d)
mkdir -p "$OUT"
exec > >(tee -a "$OUT/log.txt") 2>&1

wanted() { [[ $parts == *" $1 "* ]]; }
serves() { [[ " ${impls[*]} " == *" $1 "* ]]; }
least() { echo $(($1 < $2 ? $1 : $2)); }
left() { echo $((limit - 12 - SECONDS)); }
failed() { echo "{\"part\": \"failed\", \"name\": \"$1\", \"status\": $2, \"at\": $SECONDS}" | tee -a "$OUT/results.jsonl"; }

# part SECONDS NAME [options]: at most so long, and never beyond the limit.
part() {
    local most name=$2 status
    most=$(least "$(left)" "$1")
    shift 2
    [ "$most" -ge 8 ] || { failed "$name: no time is left" 124 && return 124; }
    echo "---- $SECONDS s: $name $* (at most $most s)"
    timeout --kill-after=5 "$most" "$python" -m benchmarks.gpu.first_contact "$name" --device "$device" \
        --seconds $((most - 5)) "$@"
    status=$?
    [ "$status" = 0 ] || failed "$name $*" "$status"
    return "$status"
}

declare -A jobs
# behind KEY COMMAND...: in the background, with its output in a file.
behind() {
    local key=$1
    shift
    "$@" >"$work/$key.log" 2>&1 &
    jobs[$key]=$!
}
# finish KEY...: waits for them, and shows the end of what they printed.
finish() {
    local key
    for key in "$@"; do
        [ -n "${jobs[$key]:-}" ] || continue
        wait "${jobs[$key]}"
        echo "---- $SECONDS s: $key ended with $?" && tail -n 4 "$work/$key.log" | cut -c1-300
        unset "jobs[$key]"
    done
}

# sanitize TOOL SHARE: its log. Racecheck takes minutes for all calls: eight processes share them.
sanitize() {
    local log=$work/cuda-$1-${2%/*}.log
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --kill-after=5 "$(least "$(left)" 130)" compute-sanitizer --tool "$1" \
        --print-limit 20 "$python" -m benchmarks.gpu.exercise --impl cuda --share "$2" >"$log" 2>&1
    echo "exit $?" >>"$log"
}

if [ "$device" = cuda ]; then
    nvidia-smi --query-gpu=name,driver_version,memory.used,clocks.sm,clocks.max.sm,power.limit --format=csv
    part 200 build >"$OUT/build.log" 2>&1 || tail -n 20 "$OUT/build.log"
fi
! wanted env || part 60 env

# Everything that compiles or compares, at once: what is timed comes later, with the GPU to itself.
if [ "$device" = cuda ]; then
    tools=()
    if wanted sketches; then
        for sketch in forward_pass backward_passes; do
            behind $sketch nvcc -O3 -std=c++17 -arch=sm_90 benchmarks/gpu/sketches/$sketch.cu -o "$work/$sketch"
        done
    fi
    ! wanted systems || behind systems part 90 systems
    if wanted sanitizer && serves cuda && command -v compute-sanitizer >/dev/null; then
        for tool in memcheck synccheck initcheck; do behind "$tool" sanitize "$tool" 0/1; done
        for n in 0 1 2 3 4 5 6 7; do behind "racecheck-$n" sanitize racecheck "$n/8"; done
        tools=(memcheck synccheck initcheck racecheck-{0..7})
    fi
    if wanted correct; then
        for impl in "${impls[@]}"; do
            behind "correct-$impl" part 130 correct --impl "$impl" --workers "$([ "$impl" = triton ] && echo 7 || echo 3)"
        done
    fi
    if wanted times; then
        for n in 0 1; do
            behind "compiled-$n" part 110 warm-up --compiled --share "$n/2"
            ! serves triton || behind "triton-$n" part 120 warm-up --impls triton --share "$n/2"
        done
    fi
    if wanted edge; then
        for impl in "${impls[@]}"; do
            part 30 edge --impl "$impl" --first
            part 60 edge --impl "$impl"
        done
    fi
    finish correct-cuda
    if wanted tests && serves cuda; then
        behind tests timeout --kill-after=5 "$(least "$(left)" 100)" "$python" -m pytest tests/capsops/test_on_gpu.py -q -n 6 \
            -p no:cacheprovider --no-header -rf --tb=line
    fi
    finish correct-triton compiled-0 compiled-1 triton-0 triton-1 forward_pass backward_passes systems
    if [ ${#tools[@]} != 0 ]; then
        finish "${tools[@]}"
        for log in "$work"/cuda-*.log; do
            { echo "==== ${log##*/}" && head -c 20000 "$log" && tail -c 2000 "$log"; } >>"$OUT/sanitizer.txt"
        done
        part 10 sanitizer --logs "$work"
    fi
    finish tests
    [ ! -f "$work/tests.log" ] || tail -n 40 "$work/tests.log" | cut -c1-400
else
    ! wanted correct || part 100 correct --impl "${impls[0]}" --few
fi

# The GPU to itself. A fault of a kernel ends the process: the same command goes on behind it.
if wanted times; then
    for _ in 1 2 3; do
        part "${TIMES_SECONDS:-170}" times --impls "${impls[@]}" && break
        [ $? != 124 ] || break
    done
fi
for sketch in forward_pass backward_passes; do
    [ -x "$work/$sketch" ] || continue
    timeout --kill-after=5 "$(least "$(left)" 40)" "$work/$sketch" >>"$OUT/sketches.jsonl" || failed "$sketch" $?
done
! wanted train || part 90 train --impls "${impls[@]}"
if wanted counters && [ "$device" = cuda ] && serves cuda && command -v ncu >/dev/null && [ "$(left)" -gt 20 ]; then
    timeout --kill-after=5 "$(least "$(left)" 60)" ncu --clock-control none \
        --kernel-name "regex:passes_kernel|gradients_kernel|fused" \
        --section SpeedOfLight --section LaunchStats --section Occupancy --section SchedulerStats \
        --section WarpStateStats --section ComputeWorkloadAnalysis --section MemoryWorkloadAnalysis \
        "$python" -m benchmarks.gpu.first_contact counters --impl cuda >"$OUT/counters.txt" 2>&1
    echo "counters: exit $?, $(grep -c Registers "$OUT/counters.txt") kernels"
fi
limit=$((limit + 10))
part 10 table --impls "${impls[@]}" >"$OUT/table.txt" 2>&1
rm -rf "$OUT/train" "$work"
cat "$OUT/table.txt"
echo "---- $SECONDS s: done"

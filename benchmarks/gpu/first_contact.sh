#!/usr/bin/env bash
# The first minutes on a GPU: is it right, is it clean, how fast is it. At most $LIMIT seconds (default 505).
#
#   bash benchmarks/gpu/first_contact.sh               on the device
#   DEVICE=cpu bash benchmarks/gpu/first_contact.sh    the parts that need no GPU, to see that the script runs
#   PARTS="times train" bash benchmarks/gpu/first_contact.sh    some parts, after the build
#
# Results go to $OUT (default build/gpu), at most eight files: results.jsonl (a line as soon as something is
# known), log.txt, build.log, sanitizer.txt, train-profile.txt, counters.txt, sketches.jsonl, table.txt. A part that
# fails stops no other; the status is 1 if one did. With RESUME=1 cases that results.jsonl holds are not timed again.
# MNIST's four gz files lie in $INFOCAPSGAN_DATA/mnist (default: .data/mnist, which git ignores). Needed: torch for
# CUDA, nvcc, ninja and pybind11 (or a capsops._cuda that is built); no network.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
export OUT=${OUT:-$PWD/build/gpu} PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-16}
export INFOCAPSGAN_DATA=${INFOCAPSGAN_DATA:-$PWD/.data} PATH=$PATH:/usr/local/cuda/bin
device=${DEVICE:-cuda} python=${PYTHON:-python3} limit=${LIMIT:-505}
every="env correct sanitizer edge tests systems times sketches train counters"
parts=" ${PARTS:-$every} "
for name in $parts; do
    [[ " $every " == *" $name "* ]] || { echo "PARTS: got $name, takes $every" >&2 && exit 2; }
done
read -ra impls <<<"${IMPLS:-cuda triton}"
if [ -s "$OUT/results.jsonl" ] && [ "${RESUME:-0}" != 1 ]; then
    echo "$OUT/results.jsonl is there already: name another OUT, or RESUME=1 to go on with it" >&2 && exit 2
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$OUT" && : >>"$OUT/results.jsonl"
exec > >(tee -a "$OUT/log.txt") 2>&1
failures=$work/failures
. benchmarks/gpu/build.sh

wanted() { [[ $parts == *" $1 "* ]]; }
serves() { [[ " ${impls[*]} " == *" $1 "* ]]; }
left() { echo $((limit - 12 - SECONDS)); }
failed() {
    echo "{\"part\": \"failed\", \"name\": \"$1\", \"status\": $2, \"at\": $SECONDS}" | tee -a "$OUT/results.jsonl" "$failures"
}
# for_at_most SECONDS COMMAND...: and never beyond the limit; 124 where there is no time for it, or too little.
for_at_most() {
    local most
    most=$(($(left) < $1 ? $(left) : $1))
    shift
    [ "$most" -ge 8 ] || { echo "no time is left" && return 124; }
    timeout --kill-after=5 "$most" "$@"
}
# part SECONDS NAME [options]: one of benchmarks.gpu.first_contact; begins nothing new in its last seconds.
part() {
    local name=$2 seconds=$1 status
    shift 2
    seconds=$(($(left) < seconds ? $(left) : seconds))
    echo "---- $SECONDS s: $name $* (at most $seconds s)"
    for_at_most "$seconds" "$python" -m benchmarks.gpu.first_contact "$name" --device "$device" \
        --seconds $((seconds - 5)) "$@"
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
# finish KEY...: waits for them, and shows the end of what they printed, more of it where they failed.
finish() {
    local key status
    for key in "$@"; do
        [ -n "${jobs[$key]:-}" ] || continue
        wait "${jobs[$key]}"
        status=$?
        echo "---- $SECONDS s: $key ended with $status"
        tail -n $((status ? 40 : 4)) "$work/$key.log" | cut -c1-400
        unset "jobs[$key]"
    done
}

# sanitize TOOL SHARE: its log. Racecheck takes minutes for all calls: eight processes share them.
sanitize() {
    local log=$work/cuda-$1-${2%/*}.log
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 for_at_most 130 compute-sanitizer --tool "$1" --print-limit 20 \
        "$python" -m benchmarks.gpu.exercise --impl cuda --share "$2" >"$log" 2>&1
    echo "exit $?" >>"$log"
}

if [ "$device" = cuda ]; then
    nvidia-smi --query-gpu=name,driver_version,memory.used,clocks.sm,clocks.max.sm,power.limit --format=csv
    # The CUDA kernels as they are, where they work and their build left a record.
    if "$python" -c 'from capsops import dispatch; dispatch.module("cuda"); assert dispatch.build_record()["cuda"]["built"]' \
        2>"$OUT/build.log"; then
        echo "capsops._cuda is built" >"$OUT/build.log"
    else
        (build "$OUT/build.log") || failed build $?
    fi
fi
! wanted env || part 60 env

# Everything that compiles or compares, at once: what is timed comes later, with the GPU to itself.
if [ "$device" = cuda ]; then
    if wanted sketches; then
        for sketch in forward_pass backward_passes; do
            behind $sketch for_at_most 120 nvcc -O3 -std=c++17 -arch=native \
                benchmarks/gpu/sketches/$sketch.cu -o "$work/$sketch"
        done
    fi
    ! wanted systems || behind systems part 90 systems
    tools=()
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
        behind tests for_at_most 100 "$python" -m pytest tests/capsops/test_on_gpu.py -q -n 6 \
            -p no:cacheprovider --no-header -rf --tb=line
    fi
    finish "${!jobs[@]}"
    if [ ${#tools[@]} != 0 ]; then
        for log in "$work"/cuda-*.log; do
            { echo "==== ${log##*/}" && tail -c 20000 "$log"; } >>"$OUT/sanitizer.txt"
        done
        part 10 sanitizer --logs "$work"
    fi
else
    ! wanted correct || part 100 correct --impl "${impls[0]}" --few
fi

# The GPU to itself. A fault of a kernel can end the process: the same command continues after it.
if wanted times; then
    for _ in 1 2 3; do
        part "${TIMES_SECONDS:-170}" times --impls "${impls[@]}"
        status=$?
        [[ " 0 124 137 143 " != *" $status "* ]] || break
    done
fi
for sketch in forward_pass backward_passes; do
    [ -x "$work/$sketch" ] || continue
    for_at_most 40 "$work/$sketch" >>"$OUT/sketches.jsonl" || failed "$sketch" $?
done
! wanted train || part 90 train --impls "${impls[@]}"
if wanted counters && [ "$device" = cuda ] && serves cuda && command -v ncu >/dev/null; then
    for_at_most 60 ncu --clock-control none --kernel-name "regex:passes_kernel|gradients_kernel|fused" \
        --section SpeedOfLight --section LaunchStats --section Occupancy --section SchedulerStats \
        --section WarpStateStats --section ComputeWorkloadAnalysis --section MemoryWorkloadAnalysis \
        "$python" -m benchmarks.gpu.first_contact counters --impl cuda >"$OUT/counters.txt" 2>&1 || failed counters $?
    echo "counters: $(grep -c Registers "$OUT/counters.txt") kernels"
fi
limit=$((SECONDS + 22)) # the table, whatever the time
part 10 table --impls "${impls[@]}" >"$OUT/table.txt" 2>&1
rm -rf "$OUT/train"
cat "$OUT/table.txt"
echo "---- $SECONDS s: done"
[ ! -s "$failures" ]

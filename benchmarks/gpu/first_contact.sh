#!/usr/bin/env bash
# The first minutes on a GPU: is it right, is it clean, how fast is it. At most $LIMIT seconds (default 505).
#
#   bash benchmarks/gpu/first_contact.sh               on the device
#   DEVICE=cpu bash benchmarks/gpu/first_contact.sh    the parts that need no GPU, to see that the script runs
#   PARTS="times train" bash benchmarks/gpu/first_contact.sh    some parts, after the build
#
# Results go to $OUT (default build/gpu), at most eight files: results.jsonl (a line as soon as something is
# known), log.txt, build.log, sanitizer.txt, train-profile.txt, counters.txt, sketches.jsonl, table.txt. A part that
# fails stops no other; the status is 1 if one did. With RESUME=1 cases that are in results.jsonl are not timed again.
# MNIST's four gz files are in $INFOCAPSGAN_DATA/mnist (default: .data/mnist, which git ignores). Needed: torch for
# CUDA, pytest with pytest-xdist and pytest-timeout, nvcc, ninja and pybind11 (or a built capsops._cuda); no network.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
export OUT=${OUT:-$PWD/build/gpu} PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-16}
export INFOCAPSGAN_DATA=${INFOCAPSGAN_DATA:-$PWD/.data} PATH=$PATH:/usr/local/cuda/bin
device=${DEVICE:-cuda} python=${PYTHON:-python3} limit=${LIMIT:-505}
every="env check sanitizer edge tests systems bench times sketches train counters"
every_second="$every automatic classes" # these two are for second_contact.sh
parts=" ${PARTS:-$every} "
for name in $parts; do
    [[ " $every_second " == *" $name "* ]] || { echo "PARTS: got $name, takes $every_second" >&2 && exit 2; }
done
read -ra impls <<<"${IMPLS:-cuda triton}"
if [ -n "${BEFORE:-}" ]; then # the results of an earlier call, which this one goes on with
    mkdir -p "$OUT" && cp "$BEFORE" "$OUT/results.jsonl" && RESUME=1 || exit 2
fi
if [ -s "$OUT/results.jsonl" ] && [ "${RESUME:-0}" != 1 ]; then
    echo "$OUT/results.jsonl exists: name another OUT, or RESUME=1 to go on with it" >&2 && exit 2
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$OUT" && : >>"$OUT/results.jsonl"
exec > >(tee -a "$OUT/log.txt") 2>&1
. benchmarks/gpu/build.sh
export CAPSOPS_CHECK=0 # the part `check` does it

on_gpu() { [ "$device" = cuda ]; }
wanted() { [[ $parts == *" $1 "* ]]; }
uses() { [[ " ${impls[*]} " == *" $1 "* ]]; }
failed() {
    echo "{\"part\": \"failed\", \"name\": \"$1\", \"status\": $2, \"at\": $SECONDS}" |
        tee -a "$OUT/results.jsonl" "$work/failures" >&2
}
# at_most SECONDS: as many of them as are left.
at_most() {
    local left=$((limit - 12 - SECONDS))
    echo $((left < $1 ? left : $1))
}
# step SECONDS NAME COMMAND...: for at most so long, and never beyond the limit. A failure is recorded; 124: no time.
step() {
    local seconds name=$2 status=124
    seconds=$(at_most "$1")
    shift 2
    echo "---- $SECONDS s: $name (at most $seconds s)" >&2
    [ "$seconds" -lt 8 ] || { timeout --kill-after=5 "$seconds" "$@" && status=0 || status=$?; }
    [ "$status" = 0 ] || failed "$name" "$status"
    return "$status"
}
# part SECONDS NAME [options]: one of benchmarks.gpu.first_contact; begins nothing new in its last seconds.
part() {
    local most=$1 name=$2
    shift 2
    step "$most" "$name $*" "$python" -m benchmarks.gpu.first_contact "$name" --device "$device" \
        --seconds $(($(at_most "$most") - 5)) "$@"
}
# checks SECONDS NAME PROCESSES FILE [options]: of pytest; the table says how many passed.
checks() {
    local most=$1 name=$2 processes=$3
    shift 3
    step "$most" "$name" "$python" -m pytest "$@" -n "$processes" -q -p no:cacheprovider --no-header -rf --tb=short \
        --junitxml "$work/$name.xml"
}
edges=tests/capsops/test_edges_on_gpu.py
# The check leaves a record in the cache folder, and with it `auto` serves, which the tests expect.
check_and_tests() {
    ! wanted check || part 150 check --impls cuda
    ! wanted tests || checks 100 tests 6 tests/capsops/test_on_gpu.py
    ! wanted systems || part 90 systems
}
# sanitize TOOL SHARE. Without torch's cache every tensor is an allocation of its own, whose ends the tools know.
sanitize() {
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step 130 "sanitizer $1 $2" compute-sanitizer --tool "$1" --print-limit 20 \
        --error-exitcode 9 "$python" -m benchmarks.gpu.first_contact exercise --impls cuda --share "$2"
}
# behind NAME COMMAND...: in the background, with its output in a file.
background=()
behind() {
    local log=$work/$1.log
    shift
    "$@" >"$log" 2>&1 &
    background+=($!)
}

if on_gpu; then
    nvidia-smi --query-gpu=name,driver_version,memory.used,clocks.sm,clocks.max.sm,power.limit --format=csv
    # The CUDA kernels as they are, where they work and their build left a record.
    if "$python" -c 'from capsops.backends import cuda, extension; assert not cuda.BACKEND.unavailable and extension.build_record()["cuda"]["built"]' \
        2>"$OUT/build.log"; then
        echo "capsops._cuda is built" >"$OUT/build.log"
    else
        (build "$OUT/build.log") || failed build $?
    fi
fi
! wanted env || part 60 env

# Everything that compiles or compares, at once: what is timed comes later, with nothing beside it on the GPU.
if on_gpu; then
    if wanted sketches; then
        for sketch in forward_pass backward_passes; do
            behind $sketch step 120 "compile $sketch" nvcc -O3 -std=c++17 -arch=native \
                benchmarks/gpu/sketches/$sketch.cu -o "$work/$sketch"
        done
    fi
    if wanted sanitizer && uses cuda && command -v compute-sanitizer >/dev/null; then
        for tool in memcheck synccheck initcheck; do behind "sanitizer-$tool" sanitize "$tool" 0/1; done
        # Racecheck takes minutes for all.
        for n in 0 1 2 3; do behind "sanitizer-racecheck-$n" sanitize racecheck "$n/16"; done
    fi
    ! uses cuda || behind check-cuda check_and_tests
    if wanted check && uses triton; then # its kernels compile for seconds
        behind check-triton part 150 check --impls triton
    fi
    ! wanted bench || behind compiled part 120 bench --discard
    if wanted times; then
        for n in 0 1; do
            ! uses triton || behind "triton-$n" part 120 warm-up --impls triton --share "$n/2"
        done
    fi
    if wanted edge; then
        for impl in "${impls[@]}"; do
            checks 30 "edge-first-$impl" 0 $edges::test_first_call_in_a_capture -k "$impl"
            checks 60 "edge-$impl" 0 $edges -k "$impl and not first_call"
        done
    fi
    [ ${#background[@]} = 0 ] || wait "${background[@]}"
    for log in "$work"/*.log; do
        [ -e "$log" ] || continue
        echo "---- ${log##*/}"
        tail -n 40 "$log" | cut -c1-400
        [[ $log != */sanitizer-* ]] || { echo "==== ${log##*/}" && tail -c 20000 "$log"; } >>"$OUT/sanitizer.txt"
    done
else
    ! wanted check || part 150 check --impls "${impls[0]}" --quick
fi

# The GPU for one process at a time. A fault of a kernel can end it: the same command continues after it.
if wanted bench; then
    if on_gpu; then part 110 bench; else part 110 bench --quick; fi
fi
! wanted automatic || part 135 automatic --impls "${impls[@]}"
! wanted classes || part 110 classes --impls "${impls[@]}"
if wanted times; then
    for _ in 1 2 3; do
        part "${TIMES_SECONDS:-170}" times --impls "${impls[@]}"
        status=$?
        [[ " 0 124 137 143 " != *" $status "* ]] || break
    done
fi
for sketch in forward_pass backward_passes; do
    [ ! -x "$work/$sketch" ] || step 40 "$sketch" "$work/$sketch" >>"$OUT/sketches.jsonl"
done
! wanted train || part 90 train --impls "${impls[@]}"
if wanted counters && on_gpu && uses cuda && command -v ncu >/dev/null; then
    step 60 counters ncu --clock-control none --kernel-name "regex:passes_kernel|gradients_kernel|fused" \
        --section SpeedOfLight --section LaunchStats --section Occupancy --section SchedulerStats \
        --section WarpStateStats --section ComputeWorkloadAnalysis --section MemoryWorkloadAnalysis \
        "$python" -m benchmarks.gpu.first_contact counters --impls cuda >"$OUT/counters.txt" 2>&1
    echo "counters: $(grep -c Registers "$OUT/counters.txt") kernels"
fi
limit=$((SECONDS + 32)) # the table, whatever the time
part 20 table --checks "$work" >"$OUT/table.txt" 2>&1
cat "$OUT/table.txt"
echo "---- $SECONDS s: done"
[ ! -s "$work/failures" ]

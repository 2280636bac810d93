"""The parts of first_contact.sh, which says what each is for. Each adds lines to $OUT/results.jsonl.

    python -m benchmarks.gpu.first_contact PART [options]

env         versions, the device, its ceilings (a copy, matrix products)
correct     an implementation against the reference in float64, every op, value and gradients, twice
edge        graphs, streams, odd addresses, TF32, second gradients (--first: capture at the first call)
warm-up     compiles what the timed cases need, into the caches on disk
times       every op by graph replay and by calls, beside the reference and plain PyTorch
train       an MNIST epoch of CapsNet as published: step by step, and with the whole step in a graph
systems     a few training steps of each system, as a user's first run takes them
counters    three headline calls, to be run under Nsight Compute
sanitizer   reads the logs of compute-sanitizer
table       prints what results.jsonl holds
"""

import argparse
import importlib
import json
import os
import platform
import signal
import sys
import time
import traceback
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.gpu.record import failures, folder, record, recorded
from capsops.backends import extension

MNIST_FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def env(args: argparse.Namespace) -> None:
    from benchmarks.gpu import fingerprint
    from benchmarks.gpu.floor import measured_ceilings

    versions = {}
    for name in ("triton", "numpy", "pybind11", "ninja"):
        try:
            versions[name] = getattr(importlib.import_module(name), "__version__", "unknown")
        except ImportError as error:
            versions[name] = f"missing: {error}"
    facts = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    if args.device == "cuda":
        p = torch.cuda.get_device_properties(0)
        facts |= {
            "model": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "l2": p.L2_cache_size,
            "memory": p.total_memory,
        }
    facts["build"] = extension.build_record().get("cuda")
    facts["fingerprints"] = {impl: fingerprint.fingerprint(impl) for impl in ("cuda", "triton")}
    commit = machine.provenance(["first_contact"])
    record("env", **facts, **versions, cores=os.cpu_count(), load=os.getloadavg()[0], **commit)
    record("ceilings", **asdict(measured_ceilings(torch.device(args.device))))


def correct(args: argparse.Namespace) -> None:
    from benchmarks.gpu import equivalence

    few = args.few or args.impl == "triton"  # a Triton kernel compiles for seconds
    shapes = equivalence.FEW_SHAPES if few else equivalence.FULL
    options = equivalence.FEW_OPTIONS if few else equivalence.OPTIONS

    def each(task: equivalence.Task, outcome: equivalence.Outcome) -> None:
        record("correct", impl=args.impl, shape=task.shape, dtype=task.kind, compared=outcome.compared,
               worst=outcome.worst.get(task.kind), failures=outcome.failures, late=outcome.late)  # fmt: skip

    device = torch.device(args.device)
    outcome = equivalence.compare_all(args.impl, device, shapes, args.seconds, args.workers, options, each)
    if outcome.failures:
        sys.exit(f"{len(outcome.failures)} of {outcome.compared} comparisons failed")


def edge(args: argparse.Namespace) -> None:
    from benchmarks.gpu import edge

    edge.run(args.impl, args.first)


def warm_up(args: argparse.Namespace) -> None:
    from benchmarks.gpu import op_times

    share, shares = map(int, args.share.split("/"))
    begin = time.monotonic()
    op_times.warm_up(args.impls, args.compiled, share, shares, args.seconds)
    record("warm up", compiled=args.compiled, share=args.share, seconds=round(time.monotonic() - begin, 1))


def times(args: argparse.Namespace) -> None:
    from benchmarks.gpu import op_times

    device = torch.device(args.device)
    if args.device == "cpu":
        small = [
            op_times.Case(op, 2, 9, 3, 4, 8, "float32", False, passes)
            for op, passes in product(op_times.OPS, op_times.BOTH)
            if (op, passes) != ("couplings", op_times.FORWARD_BACKWARD)
        ]
        op_times.time_all(args.impls, device, args.seconds, small)
        return
    if not recorded("kernels"):
        op_times.time_kernels(args.impls, device)
    op_times.time_all(args.impls, device, args.seconds)


def train(args: argparse.Namespace) -> None:
    """The captured steps first; then benchmarks.gpu.train, whose rows come into results.jsonl."""
    from benchmarks.gpu import captured_step
    from benchmarks.gpu import train as by_step
    from infocapsgan import data

    begin = time.monotonic()
    home = Path(os.environ.get("INFOCAPSGAN_DATA", ".data"), "mnist")
    missing = [name for name in MNIST_FILES if not (home / f"{name}-ubyte.gz").exists()]
    if missing:
        raise FileNotFoundError(f"{home}: {', '.join(missing)} missing; set INFOCAPSGAN_DATA")
    torch.backends.cudnn.benchmark = True
    dataset = data.load("mnist").to(args.device)
    for precision, impl in product(args.precisions, (*args.impls, "einsum") if args.device == "cuda" else ()):
        if time.monotonic() - begin > args.seconds / 2:
            record("not trained", impl=impl, precision=precision, captured=True)
            continue
        try:
            record("train", impl=impl, precision=precision, captured=True,
                   **captured_step.epoch(dataset, impl, precision))  # fmt: skip
        except Exception as error:
            traceback.print_exc()
            record("train", impl=impl, precision=precision, captured=True,
                   failed=f"{type(error).__name__}: {str(error)[:500]}")  # fmt: skip
    left = args.seconds - (time.monotonic() - begin)
    small = (
        ["--images", "32", "--width", "8", "--batch-sizes", "16"]
        if args.device == "cpu"
        else ["--batch-sizes", "128"]
    )
    out = folder() / "train"
    sys.argv = ["benchmarks.gpu.train", "--device", args.device, "--impl", *args.impls, "--precisions",
                *args.precisions, "--no-compile", "--epochs", "1", "--warm-up", "10",
                "--seconds", str(left * 0.6), "--out", str(out), *small]  # fmt: skip
    try:
        by_step.main()
    finally:
        for path in out.glob("*.json"):
            results = json.loads(path.read_text())
            for row in results["rows"]:
                record("train", impl=row["impl"], case=row["case"], captured=False, seconds=row["seconds"],
                       peers=row["peers"], details=row["details"])  # fmt: skip
            record("train failures", failures=results.get("failures"))
        profile = out / "train-profile.txt"
        if profile.exists():
            profile.replace(folder() / "train-profile.txt")


def systems(args: argparse.Namespace) -> None:
    from benchmarks.system_step import SystemStep
    from infocapsgan.systems import SYSTEMS

    for (name, system_class), precision in product(SYSTEMS.items(), args.precisions):
        try:
            torch.manual_seed(0)
            system = system_class(dataset="digits", precision=precision)
            dataset = system.load_data().to(args.device)
            step = SystemStep(system.to(args.device), dataset)
            begin = time.monotonic()
            for _ in range(args.steps):
                losses = step()
            step.training.check()
            seconds = time.monotonic() - begin
            losses = {key: value.item() for key, value in losses.items()}
            record("systems", system=name, precision=precision, seconds=round(seconds, 2), losses=losses)
        except Exception as error:
            traceback.print_exc()
            failed = f"{type(error).__name__}: {str(error)[:400]}"
            record("systems", system=name, precision=precision, failed=failed)


def counters(args: argparse.Namespace) -> None:
    from benchmarks.gpu import op_times
    from benchmarks.gpu.floor import matrix_precision
    from benchmarks.passes import run

    device = torch.device("cuda")
    for mode in (op_times.TF32, op_times.BF16, op_times.FP32):
        case = op_times.Case("capsule_routing", 128, 1152, 10, 16, 8, *mode, op_times.FORWARD_BACKWARD)
        with matrix_precision(case.tf32):
            form = op_times.forms(case, [args.impl], False)[args.impl]
            run(form, case.passes, *case.inputs(device, 0))
    torch.cuda.synchronize()


def sanitizer(args: argparse.Namespace) -> None:
    from benchmarks.gpu import sanitizer

    for path in sorted(args.logs.glob(f"{args.impl}-*.log")):
        text = path.read_text(errors="replace")
        lines = text.splitlines()
        summary = [line for line in lines if "SUMMARY" in line]
        ended = [line for line in lines if line.startswith("exit ")]
        code = int(ended[-1].split()[1]) if ended else None
        failed = "; ".join(sanitizer.judge(args.impl, path.stem, code, text))
        record("sanitizer", tool=path.stem, exit=code, summary=summary, failed=failed, end=lines[-4:])


def seconds_in_words(row: dict, name: str) -> str:
    replay = row["replay"].get(name, row["calls"][name])[0] * 1e6
    return f"{name} {replay:.1f} ({row['calls'][name][0] * 1e6:.1f})"


def table(args: argparse.Namespace) -> None:
    for row in recorded("env", "ceilings"):
        print({name: value for name, value in row.items() if name != "time"})
    for impl in args.impls:
        done = [row for row in recorded("correct") if row["impl"] == impl]
        failures = [failure for row in done for failure in row["failures"]]
        late = [one for row in done for one in row["late"]]
        print(f"\ncorrect, {impl}: {sum(row['compared'] for row in done)} compared, {len(failures)} failed")
        print(*(f"  {text[:240]}" for text in (*failures[:15], *late[:5])), sep="\n")
        for row in recorded("edge"):
            if row["impl"] == impl:
                print("  edge:", {k: v for k, v in row.items() if k not in ("part", "time", "impl")})
    print("\nµs by graph replay (by calls), the fastest first")
    for row in recorded("times"):
        if "failed" in row:
            print(f"{row['case']}: {row['failed'][:160]}")
            continue
        fastest = row["replay"] or row["calls"]
        names = sorted(row["calls"], key=lambda name: fastest.get(name, row["calls"][name])[0])
        floor = f", floor {row['floor'] * 1e6:.1f} ({row['unit']})" if "floor" in row else ""
        print(f"{row['case']}{floor}: {'; '.join(map(partial(seconds_in_words, row), names))}")
        for name, failure in row["failures"].items():
            print(f"    {name}: {failure[:160]}")
    for row in recorded("not timed"):
        print(f"not timed: {'; '.join(row['cases'])}")
    for row in recorded(
        "kernels", "systems", "train", "not trained", "train failures", "sanitizer", "failed"
    ):
        print(str({name: value for name, value in row.items() if name != "time"})[:900])


PARTS = {
    "env": env,
    "correct": correct,
    "edge": edge,
    "warm-up": warm_up,
    "times": times,
    "train": train,
    "systems": systems,
    "counters": counters,
    "sanitizer": sanitizer,
    "table": table,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--impl", default="cuda")
    parser.add_argument("--impls", nargs="+", default=["cuda", "triton"])
    parser.add_argument("--seconds", type=float, default=60, help="after which nothing new is begun")
    parser.add_argument("--steps", type=int, default=20, help="of each system")
    parser.add_argument("--workers", type=int, default=0, help="processes that compare; 0: this one")
    parser.add_argument("--few", action="store_true", help="compare a few shapes and options")
    parser.add_argument("--first", action="store_true", help="of edge: what needs a fresh process")
    parser.add_argument("--compiled", action="store_true", help="warm up what torch.compile makes")
    parser.add_argument("--share", default="0/1", help="of warm-up: which cases, such as 1/4")
    parser.add_argument("--logs", type=Path, default=Path("."), help="folder of the sanitizer's logs")
    parser.add_argument("--precisions", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    args = parser.parse_args()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that what timeout ends still writes what it has
    PARTS[args.part](args)
    if failures():
        sys.exit(f"{args.part}: {len(failures())} failed: {'; '.join(failures())[:400]}")


if __name__ == "__main__":
    main()

"""The parts of first_contact.sh that need Python. Each adds lines to $OUT/results.jsonl.

    python -m benchmarks.gpu.first_contact PART [options]

env         versions, the device, its ceilings (a copy, matrix products), what `python -m capsops` says
check       `python -m capsops check`, but for its times: every op and option against the reference in float64
automatic   the check that a first call makes, from a cold start
exercise    calls that do nothing else on the device, to be run under compute-sanitizer
warm-up     compiles what the timed cases need, into the caches on disk
bench       `python -m capsops bench`: the headline beside plain PyTorch, eager and compiled
times       every op by graph replay and by calls, beside the reference and plain PyTorch
classes     the times of `python -m capsops check`: every op by dtype and shape class
train       an MNIST epoch of CapsNet as published: with the whole step in a graph, and step by step
systems     a few training steps of each system, as a user's first run takes them
counters    three headline calls, to be run under Nsight Compute
table       prints what results.jsonl holds, and which goals are met
"""

import argparse
import io
import json
import os
import signal
import sys
import tempfile
import time
from contextlib import redirect_stdout
from importlib import metadata
from itertools import product
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import torch

from benchmarks import machine
from benchmarks.gpu import fingerprint, goals, op_times
from benchmarks.gpu.record import failure_recorded, failures, record, recorded
from benchmarks.gpu.train import EINSUM, epoch
from benchmarks.system_step import SystemStep
from capsops import bench as capsops_bench
from capsops import check as capsops_check
from capsops import dispatch, info
from capsops.backends import BACKENDS
from capsops.backends.device import cpu_model
from capsops.backends.extension import build_record
from capsops.measuring.bench_report import report as bench_report
from capsops.measuring.cases import Case
from capsops.measuring.class_times import class_times
from capsops.measuring.floor import measured_ceilings
from capsops.measuring.headline import Row
from capsops.measuring.passes import BOTH, FORWARD
from capsops.measuring.trials import trials
from capsops.proofs import shipped, standing
from infocapsgan import data
from infocapsgan.systems import SYSTEMS


def env(args: argparse.Namespace) -> None:
    needed = ("triton", "pybind11", "ninja", "pytest", "pytest-xdist")
    packages = {x.name: x.version for x in metadata.distributions() if x.name in needed}
    on_cpu = args.device.type == "cpu"
    record(
        "env",
        device=cpu_model() if on_cpu else str(torch.cuda.get_device_properties(args.device)),
        packages=packages,
        cuda=torch.version.cuda,
        build=build_record().get("cuda"),
        fingerprints={impl: fingerprint.fingerprint(impl) for impl in ("cuda", "triton")},
        cores=os.cpu_count(),
        load=machine.LOAD_BEFORE,
        **machine.provenance(["first_contact"]),
    )
    record("ceilings", rates=measured_ceilings(args.device))
    record("info", **info.report())


def check(args: argparse.Namespace) -> None:
    device = dispatch.device_facts(args.device)
    for impl in args.impls:
        with failure_recorded("check", impl=impl):
            result = capsops_check.checked(BACKENDS[impl], device, thorough=not args.quick)
            failed = "; ".join([*result["wrong"], *filter(None, [result["unfinished"]])])
            record("check", **result, **({"failed": failed[:2000]} if failed else {}))


def automatic(args: argparse.Namespace) -> None:
    """The check that a first call makes on a GPU without a proof, with nothing compiled before."""
    device = dispatch.device_facts(args.device)
    with tempfile.TemporaryDirectory() as cache, mock.patch.object(shipped, "PROOFS", ()):
        fresh = {"XDG_CACHE_HOME": cache, "TRITON_CACHE_DIR": f"{cache}/triton", "CAPSOPS_CHECK": "1"}
        with mock.patch.dict(os.environ, fresh):
            for impl in args.impls:
                begin = time.monotonic()
                settled = standing.settle(BACKENDS[impl], device)
                seconds = round(time.monotonic() - begin, 1)
                failed = {"failed": settled.why_not} if settled.why_not else {}
                record("automatic", impl=impl, seconds=seconds, calls=len(settled.scope.calls), **failed)


def exercise(args: argparse.Namespace) -> None:
    """Raises AssertionError where a result is not finite."""
    (impl, *_), (first, shares) = args.impls, map(int, args.share.split("/"))
    chosen = trials(BACKENDS[impl], thorough=False)[first::shares]
    for trial in chosen:
        for x in trial.call(impl, str(args.device)):
            assert x.cpu().isfinite().all(), trial
    print(f"{len(chosen)} calls, all finite")


def bench(args: argparse.Namespace) -> None:
    printed = io.StringIO()
    with redirect_stdout(printed):
        options = argparse.Namespace(json=True, device=args.device, backend="auto", quick=args.quick)
        status = capsops_bench.run(options)
    if status:
        raise SystemExit(f"bench: status {status}")
    if not args.discard:
        record("bench", **json.loads(printed.getvalue()))


def classes(args: argparse.Namespace) -> None:
    for row in class_times(dispatch.device_facts(args.device), args.impls, print):
        record("classes", **row)


def times(args: argparse.Namespace) -> None:
    chosen = op_times.cases()
    if args.device.type == "cpu":
        chosen = [
            (Case(2, 9, 3, 4, 8, op=op), passes)
            for op, passes in product(op_times.OPS, BOTH)
            if op != "couplings" or passes == FORWARD
        ]
    op_times.time_all(args.impls, args.device, args.seconds, chosen)


def train(args: argparse.Namespace) -> None:
    begin, on_cpu = time.monotonic(), args.device.type == "cpu"
    torch.backends.cudnn.benchmark = True  # as the training command does
    dataset = data.load("mnist").to(args.device)
    dataset, sizes = (dataset.head(32), {"batch": 16, "width": 8}) if on_cpu else (dataset, {})
    runs = product((False,) if on_cpu else (True, False), args.precisions, (*args.impls, EINSUM))
    done = [(row["captured"], row["precision"], row["impl"]) for row in recorded("train")]
    for captured, precision, impl in runs:
        if (captured, precision, impl) in done:  # before this command was continued
            continue
        labels = {"impl": impl, "precision": precision, "captured": captured}
        if time.monotonic() - begin > args.seconds:
            record("not trained", **labels)
            continue
        with failure_recorded("train", **labels):
            record("train", **labels, **epoch(dataset, impl, precision, captured, **sizes))


def systems(args: argparse.Namespace) -> None:
    for (name, system_class), precision in product(SYSTEMS.items(), args.precisions):
        with failure_recorded("systems", system=name, precision=precision):
            torch.manual_seed(0)
            system = system_class(dataset="digits", precision=precision)
            dataset = system.load_data().to(args.device)
            step = SystemStep(system.to(args.device), dataset)
            begin = time.monotonic()
            for _ in range(20):
                losses = step()
            step.state.check()
            seconds = round(time.monotonic() - begin, 2)
            losses = {key: value.item() for key, value in losses.items()}
            record("systems", system=name, precision=precision, seconds=seconds, losses=losses)


def checks(folder: Path) -> None:
    """Records the counts and errors in pytest's XML reports."""
    for path in sorted(folder.glob("*.xml")):
        suite = ElementTree.parse(path).getroot().find("testsuite")
        counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
        record("checks", name=path.stem, **counts)


def table(args: argparse.Namespace) -> None:
    checks(args.checks)
    for row in recorded("check"):
        print(capsops_check.summary(row))
    for row in recorded("bench"):
        print(bench_report(row, [Row.from_json(each) for each in row["rows"]], row["notes"]))
        print(*goals.verdicts(row["rows"], recorded("train")), sep="\n")
    print("µs by graph replay (by calls), the fastest first")
    for row in recorded("times"):
        if "failed" in row:
            continue
        calls, replay = ({x: s[0] * 1e6 for x, s in row[how].items()} for how in ("calls", "replay"))
        names = sorted(calls, key=lambda name: replay.get(name, calls[name]))
        floor = f", floor {row['floor'] * 1e6:.1f} ({row['unit']})" if "floor" in row else ""
        texts = [f"{name} {replay.get(name, calls[name]):.1f} ({calls[name]:.1f})" for name in names]
        print(f"{row['case']}{floor}: {'; '.join(texts)}")
        for name, failure in row["failures"].items():
            print(f"    {name}: {failure[:160]}")
    for row in recorded():
        if "failed" in row or row["part"] not in ("times", "times begun", "warm-up", "check", "bench"):
            print(str({name: value for name, value in row.items() if name != "time"})[:900])


PARTS = {
    "env": env,
    "check": check,
    "automatic": automatic,
    "exercise": exercise,
    "warm-up": lambda args: op_times.warm_up(args.impls, args.share, args.seconds),
    "bench": bench,
    "times": times,
    "classes": classes,
    "train": train,
    "systems": systems,
    "counters": lambda args: op_times.headline_calls(args.impls[0], args.device),
    "table": table,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--impls", nargs="+", default=["cuda", "triton"])
    parser.add_argument("--seconds", type=float, default=60, help="after which nothing new is begun")
    parser.add_argument("--quick", action="store_true", help="of check and bench, as in capsops")
    parser.add_argument("--discard", action="store_true", help="of bench: records nothing, only compiles")
    parser.add_argument("--share", default="0/1", help="of warm-up and exercise: which cases, such as 1/4")
    parser.add_argument("--checks", type=Path, default=".", help="of table: folder of pytest's reports")
    parser.add_argument("--precisions", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    args = parser.parse_args()
    # So that a process which `timeout` ends still writes what it has.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    PARTS[args.part](args)
    if failures:
        sys.exit(f"{args.part}: {len(failures)} failed: {'; '.join(failures)[:400]}")


if __name__ == "__main__":
    main()

"""Trains a system with several seeds: `python -m infocapsgan.sweep SYSTEM --seeds 0..9 [options of train]`.

Each seed is a process of its own and a run directory in the folder of the sweep. The same command goes on
where it was interrupted: finished seeds are kept, the others resumed. At the end result.json has, for each
metric, the mean, sample standard deviation, best and values over all runs that came to their end, and
result.md the row of a table.

A run has failed when it crashed, or when its headline metric is below --failed-below. For systems with a
class code that is by default what k-means reaches on the pixels of the same data, for the others nothing. A
crashed run has no values; one that failed otherwise counts in every mean.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from infocapsgan.engine import command_line
from infocapsgan.engine.atomic import atomic_file
from infocapsgan.engine.run_directory import RunError, write_json
from infocapsgan.engine.sweep import Sweep, claimed, digest, run_all, summarise, table
from infocapsgan.systems import SYSTEMS


def main() -> None:
    """The command line."""
    words = sys.argv[1:]
    sweep = parse(words)
    try:
        with claimed(sweep) as commits:
            result = summarise(sweep, run_all(sweep))
            result["command"] = shlex.join(["python", "-m", "infocapsgan.sweep", *words])
            result["commit"] = commits
            write_json(sweep.path / "result.json", result)
            with atomic_file(sweep.path / "result.md") as temporary:
                temporary.write_text(table(sweep, result))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except (RunError, OSError) as error:
        sys.exit(f"error: {error}")
    print(table(sweep, result), end="")
    print(f"written to {sweep.path / 'result.json'} and {sweep.path / 'result.md'}")


def parse(words: Sequence[str]) -> Sweep:
    """The words of a command → what it asks for; ends the program with a message where one is wrong."""
    program = command_line.program("sweep")
    parser = argparse.ArgumentParser(
        prog=program,
        usage=f"{program} SYSTEM --seeds SEEDS [options] [options of infocapsgan.train]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--seeds", type=_seeds, required=True, help="0..9, or 0,3,5")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    add("--out", type=Path, metavar="DIR", help="folder of the sweep (default: one under runs/)")
    add("--failed-below", type=float, metavar="SHARE", help="least headline metric of a run (default: above)")
    add("--evaluate", action="store_true", help="measure each run by infocapsgan.evaluate, too")
    named = bool(words) and not words[0].startswith("-")
    own, options = parser.parse_known_args(list(words[named:]))
    if not named or words[0] not in SYSTEMS:
        parser.error(f"SYSTEM: got {words[0] if named else 'none'}, takes one of {', '.join(SYSTEMS)}")
    if own.jobs < 1:
        parser.error(f"--jobs: got {own.jobs}, takes a whole number of at least 1")
    if not 0 <= (own.failed_below or 0) <= 1:
        parser.error(f"--failed-below: got {own.failed_below:g}, takes a number from 0 to 1")
    for option in {word.split("=")[0] for word in options} & {"--seed", "--resume"}:
        parser.error(f"{option}: cannot be given to a sweep, which sets it for each run")
    name = words[0]
    _, settings = command_line.parse([name, *options])
    path = own.out or Path("runs", f"sweep-{name}-{settings.dataset}-{digest(settings)}")
    return Sweep(name, settings, tuple(options), own.seeds, path, own.jobs, own.failed_below, own.evaluate)


def _seeds(word: str) -> tuple[int, ...]:
    seeds: tuple[int, ...] = ()
    if limits := re.fullmatch(r"(\d+)\.\.(\d+)", word):
        seeds = tuple(range(int(limits[1]), int(limits[2]) + 1))
    elif re.fullmatch(r"\d+(,\d+)*", word):
        seeds = tuple(map(int, word.split(",")))
    if not seeds or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"got {word}, takes first..last, or numbers with commas between")
    return seeds


if __name__ == "__main__":
    main()

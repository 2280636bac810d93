"""Collects the rows of a run, prints them at its end, and saves them with --save-results."""

import os
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch

from benchmarks import machine
from benchmarks.report import describe, table
from benchmarks.rows import RESULTS, Row, save
from capsops.backends.device import cpu_model
from capsops.measuring.timing import Race, clock

_rows = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("capsops benchmarks")
    group.addoption(
        "--save-results",
        action="store_true",
        help="write the rows to benchmarks/results/NAME-DEVICE.json",
    )
    group.addoption("--results-name", default="cpu", help="NAME of --save-results (default: cpu)")
    group.addoption(
        "--threads", type=int, default=min(2, os.cpu_count() or 1), help="threads of torch (default: 2)"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_rows] = []
    config.option.benchmark_quiet = True  # our table replaces the plugin's, which -v brings back
    # torch's own, from within torch.compile
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit:DeprecationWarning")
    torch.set_num_threads(config.getoption("--threads"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.timeout(0))  # a case takes as long as it takes


@pytest.fixture
def race(benchmark: object) -> Iterator[Callable[..., Race]]:
    """Runs a race whose candidate "ours" is what pytest-benchmark times; the others run in between."""

    def start(
        candidates: Mapping[str, Callable[[], object]],
        hopeless: float = 4,
        clock: Callable[[Callable[[], object], int], float] = clock,
    ) -> Race:
        """Others that take `hopeless` times as long as the fastest of them are timed in the warm-up only."""
        race = Race(candidates, clock)
        race.warm_up(hopeless)
        others = [name for name in race.candidates if name != "ours"]
        benchmark.extra_info["calls per round"] = race.calls["ours"]
        benchmark.pedantic(race.lap, args=(["ours"],), setup=lambda: race.lap(others), rounds=race.rounds)
        benchmark.extra_info["seconds"] = race.medians()
        return race

    yield start
    torch.compiler.reset()


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[Row], None]:
    """Adds a row to the run's table."""
    return request.config.stash[_rows].append


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    rows = config.stash[_rows]
    if not rows:
        return
    header = machine.header(["pytest", *map(str, config.invocation_params.args)])
    write = terminalreporter.write_line
    terminalreporter.section("capsops against plain PyTorch")
    for suite in dict.fromkeys(row.suite for row in rows):
        write("\n".join(["", suite, *table([row for row in rows if row.suite == suite])]))
    write(f"\n{describe(header)}")
    targets = [target for row in rows for target in row.targets]
    write(f"{sum(target.met for target in targets)} of {len(targets)} targets met")
    if config.getoption("--save-results") and exitstatus != pytest.ExitCode.OK:
        write("not saved: a benchmark failed")
    elif config.getoption("--save-results"):
        path = RESULTS / f"{config.getoption('--results-name')}-{machine.slug(cpu_model())}.json"
        save(path, header, rows)
        write(f"saved {path.relative_to(machine.ROOT)}")

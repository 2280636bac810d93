"""compute-sanitizer's tools on benchmarks.gpu.exercise, all at once."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

TOOLS = {"cuda": ("memcheck", "racecheck", "synccheck", "initcheck")}
KERNELS = {"cuda": "capsops::"}  # what our kernels are called; torch's own are not ours to judge
OTHERS = ("memcheck",)
SECONDS = 150  # for all tools together, from their start; much of it goes into starting torch under them


@dataclass
class Run:
    tool: str
    process: subprocess.Popen
    until: float
    log: Path


def tools(impl: str) -> tuple[str, ...]:
    return TOOLS.get(impl, OTHERS)


def find() -> str | None:
    """On the path, or beside nvcc, or where the toolkit lies by default."""
    places = [os.environ.get("PATH", "")]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        places.append(str(Path(nvcc).resolve().parent))
    if os.environ.get("CUDA_HOME"):
        places.append(str(Path(os.environ["CUDA_HOME"], "bin")))
    return shutil.which("compute-sanitizer", path=os.pathsep.join([*places, "/usr/local/cuda/bin"]))


def start(impl: str, folder: Path) -> list[Run]:
    """Starts the tools, each with a log in the folder.

    Without torch's cache every tensor is an allocation of its own, whose ends the tools know.
    """
    sanitizer = find()
    if sanitizer is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    runs = []
    for tool in tools(impl):
        command = [sanitizer, "--tool", tool, sys.executable, "-m", "benchmarks.gpu.exercise", "--impl", impl]
        log = folder / f"{impl}-{tool}.log"
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        runs.append(Run(tool, process, time.monotonic() + SECONDS, log))
    return runs


def judge(impl: str, tool: str, code: int | None, output: str) -> list[str]:
    """What is wrong with a run: reports that name our kernels, results that do, an end too early."""
    if code is None:
        return [f"{tool}: took more than {SECONDS} s"]
    lines = [line for line in output.splitlines() if line.startswith("=====")]
    if not any("SUMMARY" in line for line in lines):
        return [f"{tool}: no summary, exit {code}: {output[-400:]}"]
    ours = [line for line in lines if " at " in line and KERNELS.get(impl, "") in line]
    failures = [f"{tool}: {len(ours)} reports: {ours[0]}"] if ours else []
    return failures if code == 0 else [*failures, f"{tool}: exit {code}: {output[-400:]}"]


def collect(impl: str, runs: list[Run]) -> list[str]:
    """Waits for the tools; what they found."""
    if not runs:
        return ["compute-sanitizer: not found"]
    failures = []
    for run in runs:
        try:
            code = run.process.wait(max(run.until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            run.process.kill()
            run.process.wait()
            code = None
        output = run.log.read_text(errors="replace")
        print(f"{run.tool}: exit {code}\n{output[-600:]}", flush=True)
        failures += judge(impl, run.tool, code, output)
    return failures

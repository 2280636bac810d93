"""The automatic check in programs as users start them, each in processes of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.capsops.proofs.conftest import FOLDER, ROOT, stand_in

CALL = """
import torch, capsops
torch.manual_seed(0)
torch.set_num_threads(1)  # a forked process cannot use the threads of its program
u, weight = torch.randn(4, 5, 8), torch.randn(5, 3, 4, 8)
def call():
    return bool(torch.allclose(
        capsops.capsule_routing(u, weight), capsops.reference.capsule_routing(u, weight), atol=1e-5
    ))
def serves():
    from capsops import dispatch
    return dispatch.chosen("capsule_routing", "auto", u.device, u.dtype, (u.shape, weight.shape)).name
"""

Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts a program with the stand-in for a GPU's kernels, which may have a fault."""

    def start(code: str, fault: str = "", **variables: str) -> subprocess.Popen:
        program = tmp_path / "program.py"
        program.write_text(CALL + code)
        environment = {
            **os.environ,
            "PYTHONPATH": f"{FOLDER}{os.pathsep}{ROOT}",
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "TMPDIR": str(tmp_path),
            stand_in.FAULT: fault,
            **variables,
        }
        return subprocess.Popen(
            [sys.executable, str(program)],
            env=environment,
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return start


def ended(process: subprocess.Popen) -> tuple[str, str]:
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out.strip(), err


def test_a_module_without_a_main_guard(start: Start) -> None:
    """It is not imported again: what it prints, it prints once."""
    out, err = ended(start("print('begins', call(), serves())"))
    assert out == "begins True cpu"
    assert err.count("checking the cpu kernels") == 1


@pytest.mark.slow
def test_a_folder_with_other_modules(start: Start, tmp_path: Path) -> None:
    """A file that bears the name of one of Python's modules is this program's own affair."""
    (tmp_path / "json.py").write_text("raise ImportError('not the one you want')")
    out, _ = ended(
        start("import sys; sys.path.remove(sys.path[0]); print(call(), serves())", PYTHONSAFEPATH="1")
    )
    assert out.startswith("True ")


@pytest.mark.parametrize("count", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_processes_that_start_at_once(count: int, start: Start) -> None:
    """One of them checks, and the others wait for it: as ranks of torchrun, which a check is none of."""
    programs = [
        start("print(call(), serves())", RANK=str(n), LOCAL_RANK=str(n), WORLD_SIZE=str(count))
        for n in range(count)
    ]
    results = [ended(program) for program in programs]
    assert [out for out, _ in results] == ["True cpu"] * count
    assert sum("capsops: checking" in err for _, err in results) == 1


def running(word: str, folder: Path) -> list[int]:
    """Processes whose command line has both: that of a check has the program's sys.path."""
    processes = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (process / "cmdline").read_bytes()
            if word.encode() in line and str(folder).encode() in line:
                processes.append(int(process.name))
    return processes


def within(seconds: float, condition: Callable[[], object]) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("fault", ["hang", pytest.param("", marks=pytest.mark.slow)])
def test_a_program_that_is_killed_takes_its_check_with_it(fault: str, start: Start, tmp_path: Path) -> None:
    program = start("call()", fault)
    assert within(60, lambda: running("capsops.check", tmp_path))
    if fault:  # until its kernels run
        assert within(60, lambda: any("running" in x.read_text() for x in tmp_path.rglob("lines.jsonl-*")))
    program.send_signal(signal.SIGKILL)
    program.communicate()
    assert within(20, lambda: not running("capsops.check", tmp_path))


@pytest.mark.parametrize("before", ["False", pytest.param("True", marks=pytest.mark.slow)])
def test_a_forked_worker(before: str, start: Start) -> None:
    """Of a program that has asked before, or has not."""
    code = """
import os
before = BEFORE and call()
worker = os.fork()
right = call()
if not worker:
    print("worker", right, serves(), flush=True)
    os._exit(0)
os.waitpid(worker, 0)
print("program", right, serves())
"""
    out, _ = ended(start(code.replace("BEFORE", before)))
    assert out.splitlines() == ["worker True cpu", "program True cpu"]


@pytest.mark.slow
def test_a_worker_of_a_data_loader(start: Start) -> None:
    """It may not check; what its program knows, it knows too."""
    code = """
class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 2
    def __getitem__(self, n):
        return call() and serves()
loader = torch.utils.data.DataLoader(Images(), num_workers=1, batch_size=None)
print(list(loader))
print(call(), serves(), list(loader))
"""
    out, err = ended(start(code))
    assert out.splitlines() == ["['reference', 'reference']", "True cpu ['cpu', 'cpu']"]
    assert "worker of a DataLoader" in err


@pytest.mark.slow
def test_a_notebook_kernel(start: Start) -> None:
    """Code that comes over a pipe, in a process whose main module is another program's."""
    code = """
import code, io, sys
console = code.InteractiveConsole({"call": call, "serves": serves, "__name__": "__main__"})
sys.modules["__main__"].__dict__.pop("__file__")
sys.stderr = io.StringIO()
console.push("print(call(), serves())")
sys.stdout.write(str("checking" in sys.stderr.getvalue()))
"""
    out, _ = ended(start(code))
    assert out.split() == ["True", "cpu", "True"]


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["None", "open(os.devnull)"])
def test_a_program_without_stderr(stream: str, start: Start) -> None:
    out, _ = ended(start(f"import os, sys; sys.stderr = {stream}; print(call(), serves())"))
    assert out == "True cpu"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["segmentation fault", "abort"])
def test_a_crash_leaves_no_core_dump(fault: str, start: Start, tmp_path: Path) -> None:
    code = """
import resource
_, hard = resource.getrlimit(resource.RLIMIT_CORE)
resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
print(call(), serves())
"""
    out, err = ended(start(code, fault))
    assert out == "True reference"
    assert "ended the process by SIG" in err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("core")]


@pytest.mark.slow
def test_a_compiled_layer(start: Start) -> None:
    """It asks where it runs, after it is compiled."""
    code = """
layer = torch.compile(lambda u, w: 2 * capsops.capsule_routing(u, w), fullgraph=True, backend="aot_eager")
v = layer(u, weight)
print(torch.allclose(v, 2 * capsops.reference.capsule_routing(u, weight), atol=1e-5), serves())
"""
    out, err = ended(start(code))
    assert out == "True cpu"
    assert err.count("checking the cpu kernels") == 1


@pytest.mark.slow
def test_an_exported_layer_runs_elsewhere(start: Start, tmp_path: Path) -> None:
    """Where the reference serves it was exported with kernels, and the other way round."""
    code = """
import sys, warnings
class Layer(torch.nn.Module):
    def forward(self, u):
        return capsops.capsule_routing(u, weight)
torch.export.save(torch.export.export(Layer(), (u,)), "layer-NAME.pt2")
print(call(), serves())
"""
    run = """
for name in ("one", "two"):
    v = torch.export.load(f"layer-{name}.pt2").module()(u)
    print(torch.allclose(v, capsops.reference.capsule_routing(u, weight), atol=1e-5), serves())
"""
    assert ended(start(code.replace("NAME", "one"), CAPSOPS_CHECK="0"))[0] == "True reference"
    assert ended(start(code.replace("NAME", "two")))[0] == "True cpu"
    assert ended(start(run))[0].splitlines() == ["True cpu"] * 2
    for path in (tmp_path / "cache").rglob("*.json"):
        values = json.loads(path.read_text())
        path.write_text(json.dumps({**values, "format": 0}))
    assert ended(start(run, CAPSOPS_CHECK="0"))[0].splitlines() == ["True reference"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("words", [["-W", "error"], ["-OO"], ["-I"]], ids=" ".join)
def test_options_of_the_interpreter(words: list[str], tmp_path: Path) -> None:
    """-I: without PYTHONPATH, which the check is started with nevertheless."""
    program = tmp_path / "program.py"
    paths = f"import sys; sys.path[:0] = {[str(FOLDER), str(ROOT)]!r}\nimport stand_in; stand_in.install()\n"
    program.write_text(paths + CALL + "print(call(), serves())")
    folders = {"XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PYTHONPATH": str(FOLDER)}
    done = subprocess.run(
        [sys.executable, *words, program], env=os.environ | folders, capture_output=True, text=True
    )
    assert done.stdout.strip() == "True cpu", done.stderr


@pytest.mark.slow
def test_a_full_disk_is_no_fault_of_the_kernels(start: Start) -> None:
    """Where temporary files may have 200 bytes: not even the first results."""
    code = """
import resource, signal
from capsops.proofs import child
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
begin = child._Child.__init__
def limited(self, *args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
    begin(self, *args)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
child._Child.__init__ = limited
print(call(), serves())
"""
    out, err = ended(start(code))
    assert out == "True reference"
    assert "the check did not end" in err
    assert "failed the check" not in err


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "serves"), [("", "cpu"), ("killed", "reference")])
def test_a_program_that_ignores_how_its_children_end(fault: str, serves: str, start: Start) -> None:
    """And has an entry in sys.path that is no string, which Python ignores."""
    code = """
import pathlib, signal, sys
sys.path.append(pathlib.Path("/x"))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print(call(), serves())
"""
    out, err = ended(start(code, fault))
    assert out == f"True {serves}"
    assert "failed the check" not in err


@pytest.mark.slow
def test_threads_that_call_first_together(start: Start) -> None:
    code = """
import threading
results = []
threads = [threading.Thread(target=lambda: results.append((call(), serves()))) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(set(results))
"""
    out, err = ended(start(code))
    assert out == "{(True, 'cpu')}"
    assert err.count("capsops: checking") == 1

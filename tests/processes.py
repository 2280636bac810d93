"""Runs Python in separate processes that share the slow imports.

The first call starts a server: a process that imports torch and the project's other dependencies, then forks
for each request. A forked process has its own environment, output and signals, and imports the project
itself. Environment variables that a library reads while it is loaded (those of malloc and OpenMP,
TRITON_INTERPRET) have no effect in it. Where these matter, or the imports themselves, `fresh` starts a new
interpreter instead.
"""

import array
import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import types
from functools import cache
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]

IMPORTS = [
    "torch._dynamo",  # imported by the first optimizer, together with Triton
    "torch.distributed",
    "torch.utils.tensorboard",
    "torchmetrics.image.fid",
    "matplotlib.pyplot",
    "scipy.stats",
    "sklearn.datasets",
    "sklearn.metrics",
    "sklearn.model_selection",
    "safetensors.torch",
    "PIL.Image",
    "tyro",
    "tqdm",
    "docstring_parser",
    "filelock",
    "pooch",
]


class Process:
    """A process forked by the server, with the methods of subprocess.Popen that tests use."""

    def __init__(self, args: list[str], environment: dict[str, str], log: IO[bytes] | None = None) -> None:
        """With `log` both outputs go there, and communicate() has nothing to return."""
        self.args, self.returncode = args, None
        self._output = [log or tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        self._connection, remote = socket.socketpair()
        request = {"args": args, "environment": environment}
        with remote:
            fds = [remote.fileno(), *(file.fileno() for file in self._output)]
            socket.send_fds(server(), [json.dumps(request).encode()], fds)
        self.pid = self._read()

    def _read(self) -> int:
        number = self._connection.recv(4, socket.MSG_WAITALL)
        if len(number) < 4:
            raise RuntimeError(f"the server of processes ended before {self.args} did")
        return array.array("i", number)[0]

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                status = self._read()
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout) from None
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        for file in self._output:
            file.seek(0)
        out, err = (file.read().decode() for file in self._output)
        return out, err


def start_python(*args: object, fresh: bool = False, **environment: str) -> Process | subprocess.Popen[str]:
    """Starts `python *args` in the project's root."""
    words, variables = list(map(str, args)), {**os.environ, **environment}
    if fresh or words[0] not in ("-c", "-m") or sys.platform != "linux":
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        return subprocess.Popen([sys.executable, *words], env=variables, cwd=ROOT, text=True, **pipes)
    return Process(words, variables)


def run_python(
    *args: object, timeout: float = 280, fresh: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs `python *args` in the project's root; the outputs are text."""
    process = start_python(*args, fresh=fresh, **environment)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@cache
def server() -> socket.socket:
    """The connection to the server; closing it ends the server."""
    connection, remote = socket.socketpair(type=socket.SOCK_SEQPACKET)
    with remote:
        process = subprocess.Popen(
            [sys.executable, __file__, str(remote.fileno())],
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # OpenBLAS starts its threads while it is loaded
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            pass_fds=[remote.fileno()],
        )

    @atexit.register
    def stop() -> None:
        connection.close()
        process.wait()

    return connection


def serve(connection: socket.socket) -> dict | None:
    """Forks for each request and returns it in the new process; returns None in the server after the last."""
    for name in IMPORTS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # a collection would write to every page that the processes share
    assert not {"capsops", "infocapsgan"} & sys.modules.keys()
    watchers = []
    while True:
        message, fds, *_ = socket.recv_fds(connection, 1 << 20, 3)
        if not message:
            break
        status, *output = fds
        watchers = [pid for pid in watchers if not os.waitpid(pid, os.WNOHANG)[0]]
        watcher = os.fork()
        if not watcher:
            connection.close()
            worker = os.fork()
            if not worker:
                os.close(status)
                for number, fd in enumerate(output, 1):
                    os.dup2(fd, number)
                    os.close(fd)
                return json.loads(message)
            with contextlib.suppress(BrokenPipeError):  # the test may not wait for the process
                os.write(status, array.array("i", [worker]))
                os.write(status, array.array("i", [os.waitpid(worker, 0)[1]]))
            os._exit(0)
        watchers.append(watcher)
        for fd in fds:
            os.close(fd)
    for pid in watchers:
        os.waitpid(pid, 0)
    return None


def work(args: list[str], environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    kind, what, *rest = args
    sys.argv, sys.path[0] = [kind, *rest], str(ROOT)
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(what, "<string>", "exec"), main.__dict__)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C ends the tests, and they end the server
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    if request is not None:
        try:
            work(**request)
            code = 0
        except SystemExit as end:
            code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
        # The rest of an exit would free thousands of modules, which takes as long as importing some of them.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

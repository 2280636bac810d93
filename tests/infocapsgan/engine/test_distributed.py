"""Two processes with the global batch of one."""

import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from infocapsgan.engine.checkpoint import checkpoints
from infocapsgan.engine.distributed import Processes, synchronise_batch_norm
from infocapsgan.engine.run_directory import read_metrics
from infocapsgan.systems import CapsNet
from tests.processes import ROOT, start_python
from tests.tiers import slow

OPTIONS = ["--width", "8", "--batch-size", "8", "--max-steps", "4", "--evaluate-every", "4", "--seed", "5"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
TORCHRUN = Path(sys.executable).with_name("torchrun")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def train_with_torchrun(*words):
    command = [
        TORCHRUN,
        "--nproc-per-node",
        2,
        "--master-port",
        free_port(),
        "-m",
        "infocapsgan.train",
        *words,
    ]
    done = subprocess.run(
        list(map(str, command)), env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def train(world, *words):
    """As torchrun starts them, without the seconds it takes."""
    environment = ENVIRONMENT | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)} if world > 1 else {}
        for rank in range(world)
    ]
    processes = [
        start_python("-m", "infocapsgan.train", *words, **environment, **variables) for variables in ranks
    ]
    printed = ""
    try:
        for process in processes:
            out, err = process.communicate(timeout=240)
            assert process.returncode == 0, err
            printed += out
    finally:
        for process in processes:
            process.kill()
    return printed


# All are trained without batch norm, which on CPUs takes each process's part by itself.
@pytest.mark.parametrize(
    ("system", "options", "train_two"),
    [
        ("capsnet", [], partial(train, 2)),
        slow("capsnet", [], train_with_torchrun),
        slow("capsulegan", [], partial(train, 2)),
        ("infocapsgan", ["--adversarial-weight", "0"], partial(train, 2)),
        slow("infogan", ["--warm-up", "4"], partial(train, 2)),
    ],
    ids=["capsnet", "capsnet by torchrun", "capsulegan", "infocapsgan", "infogan"],
)
def test_two_processes_equal_one(system, options, train_two, tmp_path):
    train(1, system, *OPTIONS, *options, "--out", tmp_path / "one")
    output = train_two(system, *OPTIONS, *options, "--out", tmp_path / "two")
    # One of the two writes. torch 2.10's Gloo prints whom it is connected to.
    assert len([line for line in output.splitlines() if not line.startswith("[Gloo]")]) == 1
    one, two = (
        load_file(checkpoints(tmp_path / name / "checkpoints")[-1] / "weights.safetensors")
        for name in ("one", "two")
    )
    for name, wanted in one.items():
        # Adam divides by the size of a gradient: where that is rounding alone, a step may go either way.
        off = (two[name].double() - wanted.double()).abs()
        assert off.mean() < 1e-5, name
        assert off.max() < 2 * 4 * 1e-3, name
    rows = [
        [row for row in read_metrics(tmp_path / name) if row["kind"] == "train"] for name in ("one", "two")
    ]
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        assert all(b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-3) for key in a if key != "kind")
    assert len(list((tmp_path / "two").glob("events.out.tfevents.*"))) == 1
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["steps"] == 4


@pytest.mark.slow
def test_two_processes_with_compiled_networks(tmp_path):
    train(1, "capsnet", *OPTIONS, "--out", tmp_path / "eager")
    train_with_torchrun("capsnet", *OPTIONS, "--compile", "--validation", "--out", tmp_path / "compiled")
    eager, compiled = (
        load_file(checkpoints(tmp_path / name / "checkpoints")[-1] / "weights.safetensors")
        for name in ("eager", "compiled")
    )
    assert eager.keys() == compiled.keys()
    assert (tmp_path / "compiled" / "checkpoints" / "best").is_dir()


def test_one_process_alone():
    alone = Processes()
    batch = torch.arange(6.0)
    assert alone.writes
    assert torch.equal(alone.part(batch), batch)
    assert alone.mean(batch) is batch
    assert alone.any(True, torch.device("cpu"))


@pytest.mark.parametrize(
    ("world", "device", "asked"),
    [
        (1, "cpu", range(1, 31)),
        (1, "cuda", range(1, 31)),
        (2, "cpu", range(1, 31)),
        (2, "cuda", (10, 20, 30)),
    ],
)
def test_how_often_processes_ask_whether_to_stop(world, device, asked, monkeypatch):
    monkeypatch.setattr(Processes, "any", lambda self, here, device: here)
    processes = Processes(0, world)
    found = [step for step in range(1, 31) if processes.stop(True, step, torch.device(device))]
    assert found == list(asked)
    assert not processes.stop(False, 10, torch.device(device))


def test_parts_of_a_batch():
    parts = [Processes(rank, 3).part(torch.arange(6)).tolist() for rank in range(3)]
    assert parts == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("world", "device", "wanted"), [(2, "cuda", True), (1, "cuda", False), (2, "cpu", False)]
)
def test_batch_norm_is_that_of_the_whole_batch_on_several_gpus(world, device, wanted):
    system = CapsNet(width=8, encoder_batch_norm=True, decoder="deconv", decoder_batch_norm=True)
    synchronise_batch_norm(system, Processes(0, world), torch.device(device))
    norms = [
        module for module in system.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    ]
    assert len(norms) == 4
    assert all(isinstance(norm, torch.nn.SyncBatchNorm) == wanted for norm in norms)

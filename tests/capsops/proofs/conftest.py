"""Kernels of the CPU in the place of a GPU's, which need a proof, here and in processes that are started."""

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import capsops
from capsops import dispatch
from capsops.backends.device import Device
from capsops.proofs import records, standing
from capsops.proofs.records import Record

FOLDER = Path(__file__).parent / "stand_in"
ROOT = FOLDER.parents[3]


def _load_stand_in() -> ModuleType:
    spec = importlib.util.spec_from_file_location("stand_in", FOLDER / "stand_in.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["stand_in"] = module
    spec.loader.exec_module(module)
    return module


stand_in = _load_stand_in()


@pytest.fixture
def user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change_backend: Callable[..., None]
) -> SimpleNamespace:
    """What a user does and sees, with a cache folder of its own.

    call() returns whether a layer and its gradients are right; said() what was printed since the last said().
    """
    if dispatch.BACKENDS["cpu"].unavailable:
        pytest.skip(dispatch.BACKENDS["cpu"].unavailable)
    cache, said = tmp_path / "cache", []
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("PYTHONPATH", str(FOLDER))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(standing, "_say", lambda text, end="\n": said.append(text + end))
    for name in ("CAPSOPS_CHECK", "CAPSOPS_RECORD", stand_in.FAULT, stand_in.KERNELS):
        monkeypatch.delenv(name, raising=False)
    record = stand_in.backend()
    fields = ("functions", "dtypes", "needs_proof", "kernels", "code")
    change_backend("cpu", **{name: getattr(record, name) for name in fields})

    def call() -> bool:
        u, weight = torch.randn(4, 5, 8), torch.randn(5, 3, 4, 8, requires_grad=True)
        gradients = []
        for op in (capsops.capsule_routing, capsops.reference.capsule_routing):
            v = op(u, weight)
            gradients += [v, torch.autograd.grad(v.square().sum(), weight)[0]]
        v, grad, exact, exact_grad = gradients
        return torch.allclose(v, exact, atol=1e-5) and torch.allclose(grad, exact_grad, atol=1e-5)

    def recorded() -> Record | None:
        return records.read(records.key(dispatch.BACKENDS["cpu"], device))

    def forget() -> None:
        """As in a new process."""
        dispatch._standings = dispatch._Standings()
        dispatch._automatic.cache_clear()

    def serves() -> str:
        shapes = (4, 5, 8), (5, 3, 4, 8)
        op = "capsule_routing"
        return dispatch.chosen(op, "auto", torch.device("cpu"), torch.float32, shapes).name

    def printed() -> str:
        text = "".join(said)
        said.clear()
        return text

    device: Device = dispatch.device_facts(torch.device("cpu"))
    return SimpleNamespace(
        call=call,
        recorded=recorded,
        forget=forget,
        serves=serves,
        said=printed,
        cache=cache / "capsops",
        device=device,
        fault=lambda name: monkeypatch.setenv(stand_in.FAULT, name),
        kernels=lambda name: monkeypatch.setenv(stand_in.KERNELS, name),
    )

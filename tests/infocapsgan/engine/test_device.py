import dataclasses

import pytest
import torch

from capsops import dispatch, use_impl
from capsops.backends.device import Device
from infocapsgan.engine.device import common_kernels, serving_impl
from infocapsgan.engine.distributed import Processes

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def no_kernels(monkeypatch):
    """No backend but plain PyTorch."""
    broken = {
        name: dataclasses.replace(backend, unavailable=f"{name} is not built\nfor this machine")
        for name, backend in dispatch.BACKENDS.items()
        if name != "reference"
    }
    for name, backend in broken.items():
        monkeypatch.setitem(dispatch.BACKENDS, name, backend)
    dispatch._automatic.cache_clear()
    yield
    dispatch._automatic.cache_clear()


def test_the_kernels_that_serve(no_kernels):
    assert serving_impl("auto", CPU) == ("reference", "cpu: cpu is not built")


def test_plain_pytorch_that_was_asked_for_needs_no_reason(no_kernels):
    assert serving_impl("reference", CPU) == ("reference", "")
    with use_impl("reference"):
        assert serving_impl("auto", CPU) == ("reference", "")


def test_a_gpu_on_which_no_kernel_is_proved(monkeypatch):
    monkeypatch.setattr(dispatch, "automatic", lambda device: "reference")
    monkeypatch.setattr(dispatch, "device_facts", lambda device: Device("cuda", "Some GPU"))
    name, reason = serving_impl("auto", CUDA)
    assert name == "reference"
    assert "triton: " in reason
    assert "cuda: " in reason


def test_kernels_that_serve_need_no_reason(monkeypatch):
    monkeypatch.setattr(dispatch, "automatic", lambda device: "cpu")
    assert serving_impl("auto", CPU) == ("cpu", "")


def test_what_is_proved_in_all_processes_and_in_the_run_so_far(monkeypatch):
    restricted = []
    monkeypatch.setattr(dispatch, "settle", lambda device: {"cuda": "here"})
    monkeypatch.setattr(dispatch, "restrict", lambda device, proofs: restricted.append(proofs) or "common")
    monkeypatch.setattr(Processes, "gather", lambda self, here, device: [here, {"cuda": "there"}])
    assert common_kernels(CUDA, Processes(), None) == "common"
    assert common_kernels(CUDA, Processes(), {"cuda": "before"}) == "common"
    assert restricted == [
        [{"cuda": "here"}, {"cuda": "there"}],
        [{"cuda": "here"}, {"cuda": "there"}, {"cuda": "before"}],
    ]


def test_kernels_that_were_asked_for_are_not_settled(monkeypatch):
    monkeypatch.setattr(dispatch, "settle", None)
    with use_impl("reference"):
        assert common_kernels(CUDA, Processes(), {"cuda": "before"}) == {"cuda": "before"}

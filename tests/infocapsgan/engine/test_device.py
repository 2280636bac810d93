import dataclasses

import pytest
import torch

from capsops import dispatch, use_impl
from infocapsgan.engine.device import serving_impl

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
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 9))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    name, reason = serving_impl("auto", CUDA)
    assert name == "reference"
    assert "triton: " in reason
    assert "cuda: " in reason


def test_kernels_that_serve_need_no_reason(monkeypatch):
    monkeypatch.setattr(dispatch, "automatic", lambda device: "cpu")
    assert serving_impl("auto", CPU) == ("cpu", "")

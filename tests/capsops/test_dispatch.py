"""capsops.dispatch: who serves what, `use_impl`, the environment variable, and what is not available."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import capsops
from capsops import dispatch
from tests.processes import run_python


def served(device: str) -> list[str]:
    return [row.impl for row in dispatch.describe() if row.device == device and row.available]


def test_the_reference_serves_every_device() -> None:
    for device in ("cpu", "cuda", "meta", "xpu"):
        assert dispatch.resolve("reference", device) == "reference"
    assert "reference" in served("cpu")


def test_auto_prefers_the_kernels_on_the_cpu() -> None:
    assert dispatch.resolve("auto", "cpu") == ("cpu" if "cpu" in served("cpu") else "reference")


def test_auto_takes_a_kernel_on_cuda_only_where_the_ledger_has_a_row_for_it() -> None:
    ledger = (Path(__file__).parents[2] / "benchmarks/results/GPU_LEDGER.md").read_text()
    rows = ledger.split("\n## What ran\n")[1].lower().splitlines()
    chosen = dispatch.resolve("auto", "cuda")
    assert chosen == "reference" or any(chosen in row for row in rows)


def test_auto_falls_back_on_devices_nobody_knows() -> None:
    assert dispatch.resolve("auto", "meta") == "reference"


def test_table_gives_a_reason_for_all_that_is_not_available() -> None:
    rows = dispatch.describe()
    assert {(row.impl, row.device) for row in rows} >= {
        ("reference", "cpu"),
        ("cpu", "cpu"),
        ("reference", "cuda"),
        ("triton", "cuda"),
        ("cuda", "cuda"),
    }
    for row in rows:
        assert row.available == (row.reason == ""), row


def test_table_says_what_resolve_does() -> None:
    for row in dispatch.describe():
        if row.device == "cuda" and not torch.cuda.is_available():
            assert not row.available
        elif row.available:
            assert dispatch.resolve(row.impl, row.device) == row.impl
        else:
            with pytest.raises(RuntimeError) as error:
                dispatch.resolve(row.impl, row.device)
            assert str(error.value) == f"impl={row.impl!r} is not available: {row.reason}"


def test_unknown_name() -> None:
    message = r"^impl: got 'CPU', takes one of 'auto', 'reference', 'cpu', 'triton', 'cuda'$"
    with pytest.raises(ValueError, match=message):
        dispatch.resolve("CPU", "cpu")
    with pytest.raises(ValueError, match=message):
        capsops.use_impl("CPU")
    for wrong, name in ((None, "NoneType"), (["cpu"], "list"), (1, "int"), (np.zeros(3), "ndarray")):
        with pytest.raises(TypeError, match=rf"^impl: got {name}, takes one of 'auto', 'reference', "):
            dispatch.resolve(wrong, "cpu")
        with pytest.raises(TypeError, match=rf"^impl: got {name}, takes one of 'auto', 'reference', "):
            capsops.use_impl(wrong)


def test_a_device_that_is_not_served() -> None:
    if "cpu" not in served("cpu"):
        pytest.skip("impl='cpu' is not available")
    with pytest.raises(ValueError, match=r"^impl='cpu' serves tensors on cpu, got tensors on meta$"):
        capsops.squash(torch.zeros(3, device="meta"), impl="cpu")


def test_what_is_missing_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(dispatch._MODULES, "cpu", raising=False)
    monkeypatch.setitem(dispatch._MISSING, "cpu", "it was a test")
    with pytest.raises(RuntimeError, match=r"^impl='cpu' is not available: it was a test$"):
        capsops.squash(torch.zeros(3), impl="cpu")
    assert dispatch.resolve("auto", "cpu") == "reference"
    row = next(row for row in dispatch.describe() if row.impl == "cpu")
    assert row == ("cpu", "cpu", False, "it was a test")


def test_an_extension_that_is_not_there_is_called_missing() -> None:
    code = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'capsops._cpu':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from capsops import dispatch\n"
        "print(dispatch._MISSING['cpu'])"
    )
    done = run_python("-c", code)
    assert "capsops._cpu cannot be imported (No module named 'capsops._cpu')" in done.stdout, done.stderr


def test_what_the_build_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "__file__", str(tmp_path / "dispatch.py"))
    assert dispatch._build_failure("cpu").startswith("the extension was not built (no build record)")
    record = {"cpu": {"built": True}, "cuda": {"built": False, "reason": "there is no nvcc"}}
    (tmp_path / "_build.json").write_text(json.dumps(record))
    assert dispatch._build_failure("cpu") == "its build succeeded; run: pip install -e ."
    assert dispatch._build_failure("cuda") == "there is no nvcc"


def test_a_triton_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.5.1"))
    assert dispatch._load_triton() == (None, "Triton 3.5.1 is too old: the kernels take 3.6 or newer")


def test_use_impl_rules_auto_and_only_auto(impl: str) -> None:
    before = dispatch.resolve("auto", "cpu")
    with capsops.use_impl(impl):
        assert dispatch.resolve("auto", "cpu") == impl
        assert dispatch.resolve("reference", "cpu") == "reference"
    assert dispatch.resolve("auto", "cpu") == before


def test_use_impl_reaches_the_op(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    module = dispatch.module(impl)
    original = module.squash
    monkeypatch.setattr(module, "squash", lambda s, dim: calls.append(impl) or original(s, dim))
    with capsops.use_impl(impl):
        capsops.squash(torch.ones(3))
    assert calls == [impl]


def test_use_impl_nests_and_restores() -> None:
    outside = dispatch.resolve("auto", "cpu")
    with capsops.use_impl("reference"):
        with capsops.use_impl("auto"):
            assert dispatch.resolve("auto", "cpu") == ("cpu" if "cpu" in served("cpu") else "reference")
        assert dispatch.resolve("auto", "cpu") == "reference"
    assert dispatch.resolve("auto", "cpu") == outside


def test_use_impl_restores_after_an_error() -> None:
    before = dispatch.asked("auto")
    with pytest.raises(KeyError), capsops.use_impl("triton" if before != "triton" else "reference"):
        raise KeyError
    assert dispatch.asked("auto") == before


def test_one_use_impl_can_be_entered_twice() -> None:
    before, other = dispatch.asked("auto"), capsops.use_impl("reference")
    with capsops.use_impl("auto"):
        with other, other:
            pass
        assert dispatch.asked("auto") == "auto"
    assert dispatch.asked("auto") == before


def test_use_impl_of_two_threads_that_overlap() -> None:
    """The first to enter leaves first: what holds then is the other's, and in the end what held before."""
    before, first, second = dispatch.asked("auto"), capsops.use_impl("reference"), capsops.use_impl("cpu")
    first.__enter__()
    second.__enter__()
    assert dispatch.asked("auto") == "cpu"
    first.__exit__()
    assert dispatch.asked("auto") == "cpu"
    second.__exit__()
    assert dispatch.asked("auto") == before


def test_a_folder_called_triton_is_not_triton(tmp_path: Path) -> None:
    """Where Triton is not installed, such a folder beside a script is imported in its place."""
    (tmp_path / "triton").mkdir()
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import importlib.machinery as m, importlib.util as u\n"
        "spec = m.ModuleSpec('triton', None, is_package=True)\n"
        f"spec.submodule_search_locations = [{str(tmp_path / 'triton')!r}]\n"
        "sys.modules['triton'] = u.module_from_spec(spec)\n"
        "from capsops import dispatch; print(dispatch._load_triton())"
    )
    done = run_python("-c", code, fresh=True)
    assert "Triton is not installed: what is called triton is ['" in done.stdout, done.stderr


def test_use_impl_that_is_missing_raises_on_the_call() -> None:
    with capsops.use_impl("cuda"), pytest.raises((RuntimeError, ValueError), match="impl='cuda'"):
        capsops.squash(torch.zeros(3))


def test_empty_tensors_keep_the_promise_of_the_name() -> None:
    """A named implementation that is not there is an error even where there is nothing to compute."""
    with pytest.raises((RuntimeError, ValueError), match="impl='cuda'"):
        capsops.squash(torch.zeros(0, 3), impl="cuda")


def test_environment_variable() -> None:
    code = "from capsops import dispatch; print(dispatch.resolve('auto', 'cpu'))"
    done = run_python("-c", code, CAPSOPS_IMPL="reference")
    assert (done.returncode, done.stdout.strip()) == (0, "reference"), done.stderr
    done = run_python("-c", code, CAPSOPS_IMPL="auto")
    assert (done.returncode, done.stdout.strip()) == (0, dispatch.resolve("auto", "cpu")), done.stderr


def test_environment_variable_that_is_no_name() -> None:
    done = run_python("-c", "import capsops", CAPSOPS_IMPL="fast")
    assert done.returncode != 0
    assert (
        "ValueError: environment variable CAPSOPS_IMPL: got 'fast', takes one of"
        " 'auto', 'reference', 'cpu', 'triton', 'cuda'"
    ) in done.stderr


def test_environment_variable_that_names_what_is_missing() -> None:
    """It is no reason to fail on import: the call says what is wrong."""
    done = run_python(
        "-c", "import capsops, torch; print('imported'); capsops.squash(torch.ones(3))", CAPSOPS_IMPL="cuda"
    )
    assert done.stdout.strip() == "imported"
    assert done.returncode != 0
    assert "impl='cuda'" in done.stderr


@pytest.mark.parametrize(
    ("setting", "allowed"),
    [
        ({"fp32_precision": "tf32"}, True),
        ({"fp32_precision": "ieee"}, False),
        ({"allow_tf32": True}, True),
        ({"allow_tf32": False}, False),
    ],
)
def test_cuda_kernels_round_to_tf32_where_torch_may(
    setting: dict[str, str | bool], allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = pytest.importorskip("capsops.impl.cuda", exc_type=ImportError)
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(**setting))
    assert kernels._allows_tf32() == allowed

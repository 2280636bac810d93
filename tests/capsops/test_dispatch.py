"""capsops.dispatch: which backend computes a call, `use_impl`, CAPSOPS_IMPL, and unavailable backends."""

import json
import sys
import timeit
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import capsops
from capsops import dispatch
from capsops.backends import cuda, extension, reference, triton
from capsops.backends.backend import ALL_OPTIONS, LOGITS, MASK, NO_OPTIONS, SHARED, UNSQUASHED, Backend
from capsops.backends.device import Device
from capsops.measuring.precisions import matrix_precision
from capsops.proofs import order, records, shipped, standing
from capsops.proofs.scope import Scope, every_op
from capsops.proofs.shipped import Proof
from capsops.proofs.standing import Standing
from tests.processes import run_python


def available_backends(device: str) -> list[str]:
    return [row.impl for row in dispatch.describe() if row.device == device and row.available]


def automatic_backend(device: str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    return dispatch.chosen("squash", "auto", torch.device(device), dtype).name


def test_the_reference_supports_every_device() -> None:
    for device in ("cpu", "cuda", "meta", "xpu"):
        assert dispatch.requested("reference", device) == "reference"
    assert "reference" in available_backends("cpu")


def test_auto_prefers_the_kernels_on_the_cpu() -> None:
    assert automatic_backend() == ("cpu" if "cpu" in available_backends("cpu") else "reference")


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_auto_is_decided_where_the_op_runs(device: str) -> None:
    assert dispatch.requested("auto", device) == "auto"
    with capsops.use_impl("reference"):
        assert dispatch.requested("auto", device) == "reference"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, change_backend: Callable[..., None]) -> SimpleNamespace:
    """A GPU called "Card" of compute capability 9.0, on which both sets of kernels are proved."""
    card = SimpleNamespace(model="Card", capability=(9, 0), memory=80 << 30, devices=1, archs="80;90+PTX")
    card.triton = "3.6"

    def facts(type: str, index: int) -> Device:
        return Device(type, card.model, index, "580.1", card.capability, card.memory, "uuid")

    monkeypatch.setattr(dispatch, "facts", facts)
    monkeypatch.setenv("CAPSOPS_CHECK", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", "/nowhere")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cuda, "_cuda", SimpleNamespace(device_count=lambda: card.devices))
    build = {"cuda": {"built": True, "compiler": "nvcc 13.0", "fingerprint": "f"}}
    monkeypatch.setattr(extension, "build_record", lambda: {"cuda": {**build["cuda"], "archs": card.archs}})
    monkeypatch.setattr(triton, "_sources", lambda: "t")
    monkeypatch.setattr(triton, "_release", lambda version: tuple(map(int, card.triton.split("."))))
    # The installed Triton may be too old, or missing.
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="patched above"))
    launch = SimpleNamespace(INTERPRETED=False)
    monkeypatch.setitem(sys.modules, "capsops.backends.triton.launch", launch)
    monkeypatch.setenv("CC", "a compiler")
    change_backend("cuda", unavailable="", code=lambda: "c")
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    change_backend(
        "triton",
        functions=dispatch.BACKENDS["cuda"].functions,
        unavailable="",
        devices=("cuda",),
        dtypes=dtypes,
        needs_proof=True,
        why_not_on=triton.why_not_on,
        kernels=triton.kernels,
        code=lambda: "c",
    )
    proofs = (
        Proof("Card", "cuda", "f sm_90", "c", Scope(every_op(), longest=(32, 64))),
        Proof("Card", "triton", "t Triton 3.6", "c", Scope(every_op(), longest=(16, 16), multiple=4)),
    )
    monkeypatch.setattr(shipped, "PROOFS", proofs)
    return card


CUDA = torch.device("cuda", 0)


def shapes(D: int, K: int = 0, B: int = 4, I: int = 5, J: int = 3) -> order.Shapes:  # noqa: E741
    """Of u and W, or of û where there is no K."""
    return ((B, I, K), (I, J, D, K)) if K else ((B, I, J, D),)


def on_gpu(
    lengths: tuple[int, ...] = (), options: frozenset[str] = NO_OPTIONS, dtype: torch.dtype = torch.float32
) -> str:
    op = {0: "squash", 1: "dynamic_routing", 2: "capsule_routing"}[len(lengths)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dispatch.chosen(op, "auto", CUDA, dtype, shapes(*lengths) if lengths else (), options).name


def test_auto_prefers_cuda_where_both_sets_of_kernels_are_proved(gpu: SimpleNamespace) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert on_gpu((16, 8), dtype=dtype) == "cuda"


def test_auto_takes_the_reference_for_calls_that_the_kernels_decline(gpu: SimpleNamespace) -> None:
    assert on_gpu((16, 8), dtype=torch.float64) == "reference"
    assert on_gpu((16, 8), frozenset((UNSQUASHED,))) == "reference"


@pytest.mark.parametrize(
    ("lengths", "archs", "expected"),
    [
        ((32, 62), "90", "cuda"),
        ((33, 8), "90", "reference"),
        ((16, 65), "90", "reference"),
        ((33,), "90", "reference"),
        ((16,), "", "triton"),
        ((16, 8), "", "triton"),
        ((17, 8), "", "reference"),
        ((16, 24), "", "reference"),
        ((), "", "triton"),
    ],
)
def test_auto_takes_only_kernels_proved_for_the_lengths(
    gpu: SimpleNamespace, lengths: tuple[int, ...], archs: str, expected: str
) -> None:
    gpu.archs = archs
    assert on_gpu(lengths) == expected


def test_auto_takes_only_kernels_proved_with_the_options(
    gpu: SimpleNamespace, change_backend: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proof without options does not serve a call with options, even where the kernels support them."""
    for name in ("cuda", "triton"):
        change_backend(name, options=ALL_OPTIONS)
    assert on_gpu((16, 8)) == "cuda"
    for option in ALL_OPTIONS:
        assert on_gpu((16, 8), frozenset((option,))) == "reference"
    cuda_proof, triton_proof = shipped.PROOFS
    proofs = (cuda_proof, triton_proof._replace(scope=Scope(every_op((LOGITS, MASK)))))
    monkeypatch.setattr(shipped, "PROOFS", proofs)
    change_backend("cuda")
    assert on_gpu((16, 8)) == "cuda"
    assert on_gpu((16, 8), frozenset((LOGITS,))) == "triton"
    assert on_gpu((16, 8), frozenset((LOGITS, MASK))) == "triton"
    assert on_gpu((16, 8), frozenset((LOGITS, SHARED))) == "reference"


@pytest.mark.parametrize(
    ("changes", "expected", "why"),
    [
        ({"model": "Other card"}, "reference", None),
        ({"archs": "80+PTX"}, "triton", None),
        ({"archs": "100"}, "triton", "the extension is built for 100, not for 90"),
        ({"archs": ""}, "triton", "the extension is built for unknown architectures, not for 90"),
        ({"devices": 0}, "triton", "the NVIDIA driver, 580.1, is too old for the CUDA toolkit"),
        ({"capability": (7, 5)}, "reference", "its compute capability is 7.5; the kernels need 8.0 or newer"),
    ],
)
def test_auto_takes_no_kernels_that_are_not_proved_on_the_gpu(
    gpu: SimpleNamespace, changes: dict[str, object], expected: str, why: str | None
) -> None:
    """None: they could be proved by a check; as compiled for another architecture they are others."""
    vars(gpu).update(changes)
    assert on_gpu() == expected
    known = standing.known(dispatch.BACKENDS["cuda"], dispatch.facts("cuda", 0))
    assert (known is None) == (why is None)
    assert why is None or known.why_not.startswith(why)


def test_triton_must_run_as_it_was_proved(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def why() -> str | None:
        known = standing.known(dispatch.BACKENDS["triton"], dispatch.facts("cuda", 0))
        return known and known.why_not

    assert why() == ""
    gpu.triton = "3.7"
    assert why() is None, "another release compiles other kernels, which a check may prove"
    monkeypatch.delenv("CC")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert why().startswith("Triton needs a C compiler")
    sys.modules["capsops.backends.triton.launch"].INTERPRETED = True
    assert why() == "Triton runs its interpreter"
    gpu.archs = ""
    assert on_gpu() == "reference"


@pytest.mark.parametrize(
    ("archs", "capability", "code"),
    [
        ("80;90+PTX", (8, 0), "sm_80"),
        ("80;90+PTX", (8, 9), "sm_80"),
        ("80;86;89;90;100;120+PTX", (8, 9), "sm_89"),
        ("80;90+PTX", (9, 0), "sm_90"),
        ("80;90+PTX", (12, 0), "compute_90"),
        ("80;90", (10, 0), ""),
        ("90a", (9, 0), "sm_90a"),
        ("90a+PTX", (10, 0), ""),
        ("100f", (10, 3), ""),
        ("90, 100", (10, 3), "sm_100"),
        ("", (9, 0), ""),
    ],
)
def test_code_that_a_gpu_runs(
    archs: str, capability: tuple[int, int], code: str, gpu: SimpleNamespace
) -> None:
    gpu.archs = archs
    assert cuda._code_for(capability) == code


LARGE = {"B": 1000, "I": 10_000, "J": 100}  # û in float32: 64 GB for D = 16


@pytest.mark.parametrize(
    ("D", "sizes", "expected"),
    [(16, {}, "cuda"), (40, {}, "triton"), (40, LARGE, "triton"), (16, LARGE, "cuda")],
)
def test_the_order_of_kernels_that_are_proved(
    D: int, sizes: dict[str, int], expected: str, gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = tuple(proof._replace(scope=Scope(every_op())) for proof in shipped.PROOFS)
    monkeypatch.setattr(shipped, "PROOFS", both)
    where = "capsule_routing", "auto", CUDA, torch.float32
    assert dispatch.chosen(*where, shapes(D, 8, **sizes)).name == expected


def test_slow_kernels_serve_where_plain_pytorch_has_no_room(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's for D > 32 are slower than the reference, which stores û."""
    monkeypatch.setattr(shipped, "PROOFS", (shipped.PROOFS[0]._replace(scope=Scope(every_op())),))
    where = "capsule_routing", "auto", CUDA, torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Triton's kernels were not checked
        assert dispatch.chosen(*where, shapes(40, 8)).name == "reference"
        assert dispatch.chosen(*where, shapes(40, 8, **LARGE)).name == "cuda"


def test_a_record_of_times_changes_the_order(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    row = {"op": "capsule_routing", "dtype": "float32", "class": order.FEW, "order": ["triton", "cuda"]}
    record = tmp_path / "record.json"
    record.write_text(json.dumps({"device": {"model": "Card"}, "times": [row]}))
    monkeypatch.setenv("CAPSOPS_RECORD", str(record))
    assert on_gpu((16, 8)) == "triton"
    monkeypatch.delenv("CAPSOPS_RECORD")
    dispatch._automatic.cache_clear()
    assert on_gpu((16, 8)) == "triton", "a process keeps its choices"
    assert on_gpu((16,)) == "cuda"
    assert on_gpu((16, 8), dtype=torch.bfloat16) == "cuda"
    gpu.model = "Other card"
    dispatch._automatic.cache_clear()
    assert order.order("capsule_routing", "float32", order.Sizes(4), dispatch.facts("cuda", 0))[0] == "cuda"


ROW = '{"op": "squash", "dtype": "float32", "class": "usual", "order": "cpu"}'


@pytest.mark.parametrize(
    "content",
    [
        None,
        "[]",
        "{",
        '{"device": {"model": "Card"}}',
        f'{{"device": {{"model": "Card"}}, "times": [{ROW}]}}',
    ],
)
def test_a_record_of_times_that_cannot_be_read(
    content: str | None, gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record = tmp_path / "record.json"
    if content is not None:
        record.write_text(content)
    monkeypatch.setenv("CAPSOPS_RECORD", str(record))
    with pytest.raises(ValueError, match="environment variable CAPSOPS_RECORD: got '.*record.json', takes"):
        on_gpu((16, 8))


def test_the_table_of_a_gpu_does_not_change(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a forward pass and its gradient are computed by one backend, whatever comes between them."""
    assert on_gpu((16, 8)) == "cuda"
    monkeypatch.setattr(shipped, "PROOFS", ())
    dispatch._automatic.cache_clear()
    assert on_gpu((16, 8)) == "cuda"


def test_what_was_seen_here_counts_more_than_what_ships(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    key = records.key(dispatch.BACKENDS["cuda"], dispatch.facts("cuda", 0))
    records.write(records.Record(key, fault="squash in float32 ended the process by SIGSEGV"))
    assert on_gpu((16, 8)) == "triton"
    records.write(records.Record(key, dict.fromkeys(every_op(), ""), complete=True))
    dispatch._standings.settled.clear()
    dispatch._automatic.cache_clear()
    assert on_gpu((16, 100)) == "reference", "K > 64 is slower in CUDA's plain loops"
    assert on_gpu((30, 8)) == "cuda"


def test_gpus_of_different_kinds(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    models = ("Card", "Other card")

    def facts(type: str, index: int) -> Device:
        return Device(type, models[index], index, "580.1", (9, 0), 1 << 30, str(index))

    monkeypatch.setattr(dispatch, "facts", facts)
    assert on_gpu((16, 8)) == "cuda"
    with pytest.warns(UserWarning, match=r"cuda:1 \(Other card\)"):
        chosen = dispatch.chosen("squash", "auto", torch.device("cuda", 1), torch.float32)
    assert chosen.name == "reference"


def test_processes_agree_on_kernels(gpu: SimpleNamespace) -> None:
    """Each takes what is proved in all of them."""
    here = dispatch.settle(CUDA)
    assert here == json.loads(json.dumps(here)), "processes exchange it, runs keep it"
    assert here.keys() == {"cuda"}
    assert Scope.from_json(here["cuda"]).calls == every_op()
    there = {"cuda": Scope(frozenset({("squash", "float32", "")}), (16, 16), 2).to_json()}
    common = dispatch.restrict(CUDA, [here, there])
    assert Scope.from_json(common["cuda"]) == Scope(frozenset({("squash", "float32", "")}), (16, 16), 2)
    assert on_gpu() == "cuda"
    assert on_gpu((16, 8)) == "reference"
    assert "not proved in every process of this run" in dispatch.why_reference(CUDA)
    assert common["triton"]["calls"] == [], "where it was not asked for at the start, none takes it"
    assert dispatch.restrict(CUDA, [here, {}])["cuda"]["calls"] == []
    assert on_gpu() == "reference"


def test_one_process_may_settle_more_at_its_first_calls(
    gpu: SimpleNamespace, change_backend: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda_proof, triton_proof = shipped.PROOFS
    proofs = cuda_proof, triton_proof._replace(scope=Scope(every_op((MASK,))))
    monkeypatch.setattr(shipped, "PROOFS", proofs)
    change_backend("triton", options=ALL_OPTIONS)
    assert dispatch.restrict(CUDA, [dispatch.settle(CUDA)]).keys() == {"cuda"}
    assert on_gpu((16, 8)) == "cuda"
    assert on_gpu((16, 8), frozenset((MASK,))) == "triton"


def test_the_look_up_takes_two_microseconds() -> None:
    """Of a call like one before it; by the fastest of many, since other processes run too."""
    u, weight, cpu = torch.empty(4, 5, 8), torch.empty(5, 3, 16, 8), torch.device("cpu")

    def look_up() -> None:
        dispatch.chosen("capsule_routing", "auto", cpu, torch.float32, (u.shape, weight.shape), NO_OPTIONS)

    assert min(timeit.repeat(look_up, number=100, repeat=1000)) / 100 < 2e-6


def test_auto_passes_over_a_backend_without_the_op(change_backend: Callable[..., None]) -> None:
    functions = dict(dispatch.BACKENDS["cpu"].functions)
    del functions["squash"]
    change_backend("cpu", functions=functions, unavailable="")
    assert dispatch.chosen("squash", "auto", torch.device("cpu"), torch.float32).name == "reference"
    with pytest.raises(ValueError, match="^impl='cpu' does not compute squash$"):
        capsops.squash(torch.zeros(3), impl="cpu")


def test_every_backend_has_the_gradients_of_its_ops() -> None:
    ops = dispatch.BACKENDS["reference"].functions
    for backend in dispatch.BACKENDS.values():
        names = set(backend.functions)
        assert names <= set(ops)
        assert names == {op for op in ops if op.removesuffix("_backward") in names}


def test_an_unavailable_backend_is_not_proved(
    gpu: SimpleNamespace, change_backend: Callable[..., None]
) -> None:
    change_backend("cuda", unavailable="there is no nvcc")
    known = standing.known(dispatch.BACKENDS["cuda"], dispatch.facts("cuda", 0))
    assert known == Standing(why_not="there is no nvcc")
    assert on_gpu() == "triton"


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The arguments with which running ops call dispatch.chosen; the reference computes the ops."""
    calls = []

    def chosen(
        op: str,
        impl: str,
        device: torch.device,
        dtype: torch.dtype,
        shapes: order.Shapes,
        options: frozenset[str],
    ) -> Backend:
        calls.append((op, impl, dtype, tuple(map(tuple, shapes)), options))
        return reference.BACKEND

    monkeypatch.setattr(dispatch, "chosen", chosen)
    return calls


@pytest.mark.parametrize(
    ("op", "shapes", "count"),
    [
        ("squash", (), 2),
        ("predictions", ((2, 4, 3), (4, 2, 5, 3)), 2),
        ("dynamic_routing", ((2, 4, 2, 5),), 2),
        ("capsule_routing", ((2, 4, 3), (4, 2, 5, 3)), 2),
        ("couplings", ((2, 4, 3), (4, 2, 5, 3)), 1),
    ],
)
def test_an_op_and_its_gradient_request_the_same_backend(
    op: str, shapes: order.Shapes, count: int, requests: list[tuple]
) -> None:
    """Even if use_impl() names another one while the gradient is computed."""
    u, weight = torch.randn(2, 4, 3, requires_grad=True), torch.randn(4, 2, 5, 3, requires_grad=True)
    inputs = {"squash": (u,), "dynamic_routing": (torch.randn(2, 4, 2, 5, requires_grad=True),)}
    result = getattr(capsops, op)(*inputs.get(op, (u, weight)))
    if count == 2:
        with capsops.use_impl("cuda"):
            result.sum().backward()
    functions = [op, f"{op}_backward"][:count]
    assert requests == [(each, "auto", torch.float32, shapes, NO_OPTIONS) for each in functions]


@pytest.mark.parametrize("op", ["dynamic_routing", "capsule_routing", "couplings"])
@pytest.mark.parametrize("options", [(), (UNSQUASHED,), (LOGITS,), (MASK,), (SHARED,), tuple(ALL_OPTIONS)])
def test_an_op_and_its_gradient_name_the_options_they_use(
    op: str, options: tuple[str, ...], requests: list[tuple]
) -> None:
    if op == "couplings":
        options = tuple(option for option in options if option != UNSQUASHED)
    shared, bias = SHARED in options, torch.randn(2, 5)
    keywords: dict[str, object] = {
        "logits": torch.randn(2) if LOGITS in options else None,
        "mask": torch.ones(2, 4) > 0 if MASK in options else None,
    }
    if UNSQUASHED in options:
        keywords["squash_output"] = False
    u, weight = torch.randn(2, 4, 3), torch.randn(2, 5, 3) if shared else torch.randn(4, 2, 5, 3)
    inputs = (u, weight)
    if op == "dynamic_routing":
        inputs = (torch.randn(2, 4, 5) if shared else torch.randn(2, 4, 2, 5),)
    inputs[0].requires_grad_()
    result = getattr(capsops, op)(*inputs, bias, **keywords)
    if op != "couplings":
        result.sum().backward()
    assert [each for *_, each in requests] == [frozenset(options)] * (1 if op == "couplings" else 2)


def test_an_op_requests_the_backend_of_use_impl(requests: list[tuple]) -> None:
    with capsops.use_impl("reference"):
        capsops.squash(torch.randn(3, 4))
    assert [impl for _, impl, *_ in requests] == ["reference"]


def test_a_compiled_graph_requests_its_backend_when_it_runs(requests: list[tuple]) -> None:
    u, weight = torch.randn(2, 4, 3), torch.randn(4, 2, 5, 3)
    compiled = torch.compile(lambda u, w: 2 * capsops.capsule_routing(u, w), fullgraph=True, backend="eager")
    for calls in (1, 2):
        compiled(u, weight)
        assert [impl for _, impl, *_ in requests] == ["auto"] * calls


def test_auto_takes_the_reference_on_other_devices() -> None:
    assert automatic_backend("meta") == "reference"


def test_describe_gives_a_reason_for_every_unavailable_backend() -> None:
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


def test_describe_agrees_with_requested() -> None:
    for row in dispatch.describe():
        if row.device == "cuda" and not torch.cuda.is_available():
            assert not row.available
        elif row.available:
            assert dispatch.requested(row.impl, row.device) == row.impl
        else:
            with pytest.raises(RuntimeError) as error:
                dispatch.requested(row.impl, row.device)
            assert str(error.value) == f"impl={row.impl!r} is not available: {row.reason}"


def test_an_unknown_name_is_an_error() -> None:
    message = r"^impl: got 'CPU', takes one of 'auto', 'reference', 'cpu', 'triton', 'cuda'$"
    with pytest.raises(ValueError, match=message):
        dispatch.requested("CPU", "cpu")
    with pytest.raises(ValueError, match=message):
        capsops.use_impl("CPU")
    for wrong, name in ((None, "NoneType"), (["cpu"], "list"), (1, "int"), (np.zeros(3), "ndarray")):
        with pytest.raises(TypeError, match=rf"^impl: got {name}, takes one of 'auto', 'reference', "):
            dispatch.requested(wrong, "cpu")
        with pytest.raises(TypeError, match=rf"^impl: got {name}, takes one of 'auto', 'reference', "):
            capsops.use_impl(wrong)


def test_a_backend_rejects_tensors_on_other_devices() -> None:
    if "cpu" not in available_backends("cpu"):
        pytest.skip("impl='cpu' is not available")
    with pytest.raises(ValueError, match=r"^impl='cpu' takes tensors on cpu, got tensors on meta$"):
        capsops.squash(torch.zeros(3, device="meta"), impl="cpu")


def test_the_error_for_an_unavailable_backend_gives_the_reason(change_backend: Callable[..., None]) -> None:
    change_backend("cpu", unavailable="it was a test")
    with pytest.raises(RuntimeError, match=r"^impl='cpu' is not available: it was a test$"):
        capsops.squash(torch.zeros(3), impl="cpu")
    assert automatic_backend() == "reference"
    row = next(row for row in dispatch.describe() if row.impl == "cpu")
    assert row == ("cpu", "cpu", False, "it was a test")


def test_a_missing_extension_is_reported() -> None:
    code = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'capsops._cpu':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from capsops import dispatch\n"
        "print(dispatch.BACKENDS['cpu'].unavailable)"
    )
    done = run_python("-c", code)
    assert "capsops._cpu cannot be imported (No module named 'capsops._cpu')" in done.stdout, done.stderr


def test_reasons_in_the_build_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "__file__", str(tmp_path / "backends" / "extension.py"))
    assert extension.why_not_built("cpu").startswith("the extension was not built (no build record)")
    record = {"cpu": {"built": True}, "cuda": {"built": False, "reason": "there is no nvcc"}}
    (tmp_path / "_build.json").write_text(json.dumps(record))
    assert extension.why_not_built("cpu") == "its build succeeded; install capsops again"
    assert extension.why_not_built("cuda") == "there is no nvcc (to fix it: install capsops again)"


def test_a_triton_that_is_too_old_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.5.1"))
    assert triton.why_unavailable() == "Triton 3.5.1 is too old: the kernels need 3.6 or newer"


def test_use_impl_changes_only_auto(impl: str) -> None:
    before = dispatch.requested("auto", "cpu")
    with capsops.use_impl(impl):
        assert dispatch.requested("auto", "cpu") == impl
        assert dispatch.requested("reference", "cpu") == "reference"
    assert dispatch.requested("auto", "cpu") == before


def test_use_impl_reaches_the_op(impl: str, change_backend: Callable[..., None]) -> None:
    calls = []
    original = dispatch.BACKENDS[impl].functions["squash"]
    change_backend(impl, squash=lambda s, dim: calls.append(impl) or original(s, dim))
    with capsops.use_impl(impl):
        capsops.squash(torch.ones(3))
    assert calls == [impl]


def test_use_impl_nests_and_restores() -> None:
    outside = dispatch.requested("auto", "cpu")
    with capsops.use_impl("reference"):
        with capsops.use_impl("auto"):
            assert dispatch.requested("auto", "cpu") == "auto"
        assert dispatch.requested("auto", "cpu") == "reference"
    assert dispatch.requested("auto", "cpu") == outside


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


def test_use_impl_in_two_overlapping_threads() -> None:
    """The first to enter leaves first: the other's choice stays in force until it leaves as well."""
    before, first, second = dispatch.asked("auto"), capsops.use_impl("reference"), capsops.use_impl("cpu")
    first.__enter__()
    second.__enter__()
    assert dispatch.asked("auto") == "cpu"
    first.__exit__()
    assert dispatch.asked("auto") == "cpu"
    second.__exit__()
    assert dispatch.asked("auto") == before


def test_a_folder_called_triton_is_not_triton(tmp_path: Path) -> None:
    """If Triton is not installed, Python imports a folder of that name that is next to the script."""
    (tmp_path / "triton").mkdir()
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import importlib.machinery as m, importlib.util as u\n"
        "spec = m.ModuleSpec('triton', None, is_package=True)\n"
        f"spec.submodule_search_locations = [{str(tmp_path / 'triton')!r}]\n"
        "sys.modules['triton'] = u.module_from_spec(spec)\n"
        "from capsops import dispatch; print(dispatch.BACKENDS['triton'].unavailable)"
    )
    done = run_python("-c", code, fresh=True)
    assert "Triton is not installed: the module called triton is ['" in done.stdout, done.stderr


def test_use_impl_of_an_unavailable_backend_raises_at_the_call() -> None:
    with capsops.use_impl("cuda"), pytest.raises((RuntimeError, ValueError), match="impl='cuda'"):
        capsops.squash(torch.zeros(3))


def test_an_unavailable_backend_is_an_error_for_empty_tensors_too() -> None:
    """Even though there is nothing to compute."""
    with pytest.raises((RuntimeError, ValueError), match="impl='cuda'"):
        capsops.squash(torch.zeros(0, 3), impl="cuda")


def test_environment_variable() -> None:
    code = "from capsops import dispatch; print(dispatch.requested('auto', 'cpu'))"
    done = run_python("-c", code, CAPSOPS_IMPL="reference")
    assert (done.returncode, done.stdout.strip()) == (0, "reference"), done.stderr
    done = run_python("-c", code, CAPSOPS_IMPL="auto")
    assert (done.returncode, done.stdout.strip()) == (0, dispatch.requested("auto", "cpu")), done.stderr


def test_environment_variable_with_an_unknown_name() -> None:
    done = run_python("-c", "import capsops", CAPSOPS_IMPL="fast")
    assert done.returncode != 0
    assert (
        "ValueError: environment variable CAPSOPS_IMPL: got 'fast', takes one of"
        " 'auto', 'reference', 'cpu', 'triton', 'cuda'"
    ) in done.stderr


def test_environment_variable_with_an_unavailable_backend() -> None:
    """The import succeeds; the error is raised by the call."""
    done = run_python(
        "-c", "import capsops, torch; print('imported'); capsops.squash(torch.ones(3))", CAPSOPS_IMPL="cuda"
    )
    assert done.stdout.strip() == "imported"
    assert done.returncode != 0
    assert "impl='cuda'" in done.stderr


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("older_torch", [True, False])
def test_cuda_kernels_round_to_tf32_only_where_torch_allows_it(
    allowed: bool, older_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if older_torch:
        monkeypatch.setattr(cuda, "_precision", None)
    with matrix_precision(allowed):
        assert cuda._allows_tf32() == allowed


def test_the_setting_for_all_operations_counts_where_that_of_matrix_products_is_not_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {("cuda", "matmul"): "none", ("generic", "all"): "tf32"}
    monkeypatch.setattr(cuda, "_precision", lambda *name: settings[name])
    assert cuda._allows_tf32()
    settings["cuda", "matmul"] = "ieee"
    assert not cuda._allows_tf32()

"""The examples run, and the plain routing in them computes what it is compared with."""

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import capsops
from tests.capsops.compare import assert_close

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ["side_by_side", "recommender", "conv_capsules"]


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The scripts, imported as they import one another: from their own folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield {name: import_module(name) for name in NAMES}
    for name in NAMES:
        del sys.modules[name]


def run_main(example: ModuleType, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str:
    monkeypatch.setattr(sys, "argv", [f"{example.__name__}.py", *arguments])
    example.main()
    return capsys.readouterr().out


def test_the_recommender_runs(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = run_main(modules["recommender"], ["--steps", "2"], monkeypatch, capsys).splitlines()
    assert [line.split(":")[0] for line in out] == [
        "mean pooling, hit rate@20",
        "interests by routing, hit rate@20",
        "routing, forward and backward",
    ]
    assert all(re.search(r": \d+\.\d%$", line) for line in out[:2])
    assert "× as fast" in out[2]


@pytest.mark.slow
def test_interests_beat_mean_pooling_at_equal_size(modules: dict[str, ModuleType]) -> None:
    example = modules["recommender"]
    models = example.Recommender, example.MeanPooling
    sizes = [sum(x.numel() for x in model().parameters()) for model in models]
    assert sizes[0] == sizes[1]
    by_routing, by_mean = (example.train(model, 400) for model in models)
    assert by_routing > 1.2 * by_mean


def test_the_number_of_interests_grows_with_the_sequence(modules: dict[str, ModuleType]) -> None:
    lengths = torch.tensor([0, 1, 2, 3, 4, 7, 8, 15, 16, 50])
    mask = torch.arange(50) < lengths[:, None]
    logits, has = modules["recommender"].Recommender().start_logits(mask)
    assert has.sum(1).tolist() == [1, 1, 1, 1, 2, 2, 3, 3, 4, 4]
    assert torch.equal(logits.isfinite(), has[:, None].expand_as(logits))


def test_the_recommenders_plain_routing_computes_the_same(modules: dict[str, ModuleType]) -> None:
    u_hat = torch.randn(3, 50, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(50) < torch.tensor([[50], [7], [1]])
    logits = torch.randn(50, 4, dtype=torch.float64)
    grad = torch.randn(3, 4, 16, dtype=torch.float64)
    want = capsops.dynamic_routing(u_hat, logits=logits, mask=mask, detach=True)
    got = modules["recommender"].plain_routing(u_hat, logits, mask)
    assert_close(got, want)
    assert_close(*(torch.autograd.grad(v, u_hat, grad)[0] for v in (got, want)))


def test_the_convolutional_network_runs(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = run_main(modules["conv_capsules"], ["--epochs", "0.1"], monkeypatch, capsys).splitlines()
    assert re.fullmatch(r"test accuracy: \d+\.\d%", out[0])
    assert "× as fast" in out[1]


@pytest.mark.slow
def test_the_convolutional_network_learns(modules: dict[str, ModuleType]) -> None:
    assert modules["conv_capsules"].train(25) > 0.975


def test_the_plain_convolutional_layer_computes_the_same(modules: dict[str, ModuleType]) -> None:
    network = modules["conv_capsules"].Network(types=3, dim=4).double()
    u = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    for layer, padding in ((network.hidden, 1), (network.digits, 0)):
        torch.nn.init.normal_(layer.bias)
        got = modules["conv_capsules"].plain_layer(u, layer.weight, layer.bias, layer.stride[0], padding)
        assert_close(got, layer(u), tolerance=1e-10)


def test_without_a_mark_of_memory_times_are_printed(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    side_by_side = modules["side_by_side"]
    text = side_by_side.side_by_side(lambda: None, lambda: None, rounds=2)
    assert "MiB" in text or side_by_side.peak_memory(lambda: None) is None
    monkeypatch.setattr(side_by_side, "peak_memory", lambda call: None)
    assert "MiB" not in side_by_side.side_by_side(lambda: None, lambda: None, rounds=2)


@pytest.mark.parametrize(
    ("ours", "plain", "text"),
    [
        (10, 70, "10.0 MiB beside 70.0 MiB: 1/7 of the memory"),
        (10, 9, "10.0 MiB beside 9.0 MiB: 1.1 times the memory"),
        (0, 0, "0.2 MiB beside 0.2 MiB: 1.0 times the memory"),
    ],
)
def test_how_memory_is_compared(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, ours: int, plain: int, text: str
) -> None:
    sizes = iter([ours << 20, plain << 20])
    monkeypatch.setattr(modules["side_by_side"], "peak_memory", lambda call: next(sizes))
    assert modules["side_by_side"].side_by_side(lambda: None, lambda: None, rounds=2).endswith(f"; {text}")


@pytest.mark.parametrize("error", [OSError, AttributeError, TypeError, StopIteration])
def test_errors_of_what_is_measured_are_raised(
    modules: dict[str, ModuleType], error: type[Exception]
) -> None:
    def call() -> None:
        raise error("of the routing")

    with pytest.raises(error, match="of the routing"):
        modules["side_by_side"].peak_memory(call)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 150

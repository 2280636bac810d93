"""torch.export with decompositions, and ONNX."""

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import capsops
from capsops import functional
from tests.capsops.compare import assert_close
from tests.onnx_exporter import needs_newer_exporter


class Network(nn.Module):
    """A network that calls every public function."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.primary = capsops.nn.PrimaryCapsules(1, 2, 4, 5)
        self.routing = capsops.nn.RoutingCapsules(32, 3, 4, 5, leaky=True)
        self.shared, self.logits = nn.Parameter(torch.randn(3, 5, 4)), nn.Parameter(torch.randn(32, 3))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        u = self.primary(images)
        u_hat = capsops.predictions(u, self.routing.weight)
        again = capsops.dynamic_routing(u_hat, self.routing.bias, iterations=2)
        mask, logits = u[..., 0] > 0, self.logits
        closed = torch.where(logits > 1, -torch.inf, logits)
        return (
            self.routing(u),
            again,
            self.routing.couplings(u),
            capsops.capsule_routing(u, self.shared, logits=closed, mask=mask),
            capsops.dynamic_routing(u, logits=closed, mask=mask, squash_output=False),
            capsops.couplings(u, self.shared, logits=logits, mask=mask),
        )


@pytest.fixture(scope="module")
def exported() -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=64)
    return torch.export.export(Network().eval(), (torch.randn(2, 1, 12, 12),), dynamic_shapes=({0: batch},))


def targets(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("batch", [1, 5])
def test_a_decomposed_program_is_plain_torch(exported: torch.export.ExportedProgram, batch: int) -> None:
    assert any("capsops" in target for target in targets(exported))
    table = torch.export.default_decompositions() | capsops.decompositions()
    plain = exported.run_decompositions(table)
    assert not any("capsops" in target for target in targets(plain))
    images = torch.randn(batch, 1, 12, 12)
    for got, want in zip(plain.module()(images), Network()(images), strict=True):
        assert_close(got, want, tolerance=1e-6)


def test_every_op_has_a_decomposition() -> None:
    names = {str(op) for op in capsops.decompositions()}
    ops = ["squash", "predictions", "dynamic_routing", "capsule_routing"]
    backward = [f"{name}_backward" for name in ops]
    assert names == {f"capsops.{name}.default" for name in (*ops, *backward, "couplings")}


def export_to_onnx(path: Path) -> None:
    """Exports the network and runs the result with another batch size than that of the example."""
    network, batch = Network().eval(), torch.export.Dim("batch", min=1, max=64)
    example = (torch.randn(2, 1, 12, 12),)
    torch.onnx.export(network, example, str(path), dynamo=True, dynamic_shapes=({0: batch},))
    session = onnxruntime.InferenceSession(str(path))
    images = torch.randn(5, 1, 12, 12)
    results = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    for got, want in zip(results, network(images), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want, atol=1e-5, rtol=1e-4)


@needs_newer_exporter
def test_onnx(tmp_path: Path) -> None:
    export_to_onnx(tmp_path / "network.onnx")
    assert not functional._exports_to_onnx()


@needs_newer_exporter
@pytest.mark.slow
def test_onnx_with_every_backend(impl: str, tmp_path: Path) -> None:
    with capsops.use_impl(impl):
        export_to_onnx(tmp_path / "network.onnx")


def _squash_by_name(s: Tensor) -> Tensor:
    return torch.ops.capsops.squash(s, 1, "auto")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_function_calls_ops_by_name() -> None:
    s = torch.randn(2, 3, requires_grad=True)
    v = torch.jit.script(_squash_by_name)(s)
    assert torch.equal(v, capsops.squash(s))
    (grad,) = torch.autograd.grad(v.sum(), s)
    assert torch.equal(grad, torch.autograd.grad(capsops.squash(s).sum(), s)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_cannot_compile_the_functions() -> None:
    """As the README says; should PyTorch learn it, that sentence can go."""
    with pytest.raises(torch.jit.frontend.NotSupportedError, match="keyword-only arguments with defaults"):
        torch.jit.script(capsops.nn.Squash())
    with pytest.raises(torch.jit.frontend.NotSupportedError, match="keyword-only arguments with defaults"):
        torch.jit.script(capsops.nn.RoutingCapsules(3, 4, 5, 6))


def test_an_exported_program_chooses_its_backend_where_it_runs(
    exported: torch.export.ExportedProgram, change_backend: Callable[..., None]
) -> None:
    """Such as one from a machine with the C++ kernels on a machine without them."""
    nodes = [node for node in exported.graph.nodes if "capsops" in str(node.target)]
    assert nodes
    assert {node.args[-1] for node in nodes} == {"auto"}
    images = torch.randn(3, 1, 12, 12)
    want = exported.module()(images)
    change_backend("cpu", unavailable="it was a test")
    for value, other in zip(exported.module()(images), want, strict=True):
        assert_close(value.detach(), other.detach(), tolerance=1e-6)

"""capsops.reference, the specification: by hand, and against the procedure of the paper."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from capsops import reference
from tests.capsops.cases import ALL_OPTIONS, Options, Shape, layer_inputs, routing_inputs
from tests.capsops.compare import assert_close


def textbook_squash(s: np.ndarray) -> np.ndarray:
    """‖s‖² / (1 + ‖s‖²) · s / ‖s‖."""
    norm = np.sqrt((s * s).sum(-1, keepdims=True))
    return norm**2 / (1 + norm**2) * s / norm


def textbook_routing(
    u_hat: np.ndarray,
    bias: np.ndarray,
    iterations: int,
    leaky: bool,
    start: np.ndarray | None = None,
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """Procedure 1 with its logits stored: b ← b + û · v after every pass but the last.

    `start` are the logits of the first pass; an input capsule whose logits are all −inf, or whose mask is
    False, sends nothing.
    """
    batch, in_capsules, out_capsules, _ = u_hat.shape
    v = np.zeros((batch, *u_hat.shape[2:]))
    for b in range(batch):
        logits = np.zeros((in_capsules, out_capsules)) if start is None else start[b].copy()
        for _ in range(iterations):
            weights = np.exp(logits)
            total = weights.sum(1, keepdims=True) + (1 if leaky else 0)
            c = weights / np.where(total == 0, 1, total)
            if mask is not None:
                c = c * mask[b][:, None]
            for j in range(out_capsules):
                v[b, j] = textbook_squash(c[:, j] @ u_hat[b, :, j] + bias[j])
            for i in range(in_capsules):
                logits[i] += (u_hat[b, i] * v[b]).sum(-1)
    return v


def test_squash_by_hand() -> None:
    # ‖(3, 4)‖ = 5: the length becomes 25/26 and the direction stays (0.6, 0.8)
    v = reference.squash(torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -1.0]], dtype=torch.float64))
    want = torch.tensor([[25 / 26 * 0.6, 25 / 26 * 0.8], [0, 0], [0, -0.5]], dtype=torch.float64)
    assert_close(v, want, tolerance=1e-15)


def test_squash_jacobian_by_hand() -> None:
    # f(r) = r / (1 + r²): across s the derivative is f(5) = 5/26, along s f(5) + 5 f′(5) = 5/26 − 120/676
    s = torch.tensor([0.0, 5.0], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(reference.squash, s)
    want = torch.tensor([[5 / 26, 0], [0, 5 / 26 - 120 / 676]], dtype=torch.float64)
    assert_close(jacobian, want, tolerance=1e-14)


def test_squash_derivatives_vanish_at_zero() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert torch.equal(torch.autograd.functional.jacobian(reference.squash, zero), torch.zeros(3, 3).double())
    hessian = torch.autograd.functional.hessian(lambda s: reference.squash(s).sum(), zero)
    assert torch.equal(hessian, torch.zeros(3, 3).double())


def test_squash_takes_any_dim() -> None:
    s = torch.randn(3, 4, 5, dtype=torch.float64)
    for dim in range(3):
        assert_close(reference.squash(s, dim).movedim(dim, -1), reference.squash(s.movedim(dim, -1)))
        assert torch.equal(reference.squash(s, dim), reference.squash(s, dim - 3))


def test_squash_equals_the_paper() -> None:
    s = torch.randn(50, 7, dtype=torch.float64) * torch.logspace(-3, 3, 50, dtype=torch.float64)[:, None]
    assert_close(reference.squash(s), torch.from_numpy(textbook_squash(s.numpy())))


def test_predictions_by_hand() -> None:
    u = torch.tensor([[[1.0, 2.0]]])
    weight = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [[0.0, 3.0], [2.0, 0.0], [1.0, -1.0]]]])
    assert reference.predictions(u, weight).tolist() == [[[[1, 2, 3], [6, 2, -1]]]]


def test_routing_by_hand() -> None:
    """One input capsule, û = 1 and 2. Pass 1: c = 1/2, s = (1/2, 1), v = (1/5, 1/2). Logits 1/5 and 1."""
    u_hat = torch.tensor([1.0, 2.0], dtype=torch.float64).reshape(1, 1, 2, 1)
    first = reference.dynamic_routing(u_hat, iterations=1)
    assert_close(first.flatten(), torch.tensor([1 / 5, 1 / 2], dtype=torch.float64), tolerance=1e-15)
    c = [1 / (1 + math.exp(0.8)), 1 / (1 + math.exp(-0.8))]
    s = [c[0], 2 * c[1]]
    second = reference.dynamic_routing(u_hat, iterations=2)
    want = torch.tensor([x * x / (1 + x * x) for x in s], dtype=torch.float64)
    assert_close(second.flatten(), want, tolerance=1e-15)


def test_leaky_first_pass_by_hand() -> None:
    """With an orphan class and J = 2, every coupling of the first pass is 1/3, s = (1/3, 2/3)."""
    u_hat = torch.tensor([1.0, 2.0], dtype=torch.float64).reshape(1, 1, 2, 1)
    v = reference.dynamic_routing(u_hat, iterations=1, leaky=True)
    want = torch.tensor([(1 / 9) / (10 / 9), (4 / 9) / (13 / 9)], dtype=torch.float64)
    assert_close(v.flatten(), want, tolerance=1e-15)


def test_without_routing_the_result_is_the_squashed_sum() -> None:
    u_hat, bias = routing_inputs(Shape(3, 4, 2, 5, 1), bias=True)
    assert torch.equal(
        reference.dynamic_routing(u_hat, bias, iterations=0), reference.squash(u_hat.sum(1) + bias)
    )


@pytest.mark.parametrize("iterations", range(1, 5))
@pytest.mark.parametrize("leaky", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [Shape(2, 1, 3, 4, 2), Shape(2, 5, 1, 4, 2), Shape(3, 9, 5, 4, 3)], ids=str)
def test_routing_equals_the_paper(shape: Shape, with_bias: bool, leaky: bool, iterations: int) -> None:
    u, weight, bias = layer_inputs(shape, bias=with_bias)
    u_hat = np.zeros((shape.B, shape.I, shape.J, shape.D))
    for b, i, j in np.ndindex(shape.B, shape.I, shape.J):
        u_hat[b, i, j] = weight[i, j].numpy() @ u[b, i].numpy()
    beta = np.zeros((shape.J, shape.D)) if bias is None else bias.numpy()
    want = torch.from_numpy(textbook_routing(u_hat, beta, iterations, leaky))
    options = {"iterations": iterations, "leaky": leaky}
    assert_close(reference.predictions(u, weight), torch.from_numpy(u_hat), "û")
    assert_close(reference.dynamic_routing(torch.from_numpy(u_hat), bias, **options), want, "from û")
    assert_close(reference.capsule_routing(u, weight, bias, **options), want, "from u")


@pytest.mark.parametrize("iterations", range(1, 5))
@pytest.mark.parametrize("leaky", [False, True])
@pytest.mark.parametrize("shape", [Shape(2, 5, 1, 4, 2), Shape(3, 9, 5, 4, 3)], ids=str)
def test_routing_options_equal_the_paper(shape: Shape, leaky: bool, iterations: int) -> None:
    """Logits, some of them −inf, and a mask; a weight of all input capsules, and û of all output capsules."""
    u, weight, bias = layer_inputs(shape, bias=True)
    logits = torch.randn(shape[:3], dtype=torch.float64)
    logits[torch.rand(shape[:3]) < 0.3] = -torch.inf
    logits[0, 0] = -torch.inf
    mask = torch.rand(shape.B, shape.I) > 0.3
    options = {"iterations": iterations, "leaky": leaky, "logits": logits, "mask": mask}

    def paper(u_hat: Tensor) -> Tensor:
        arrays = u_hat.numpy(), bias.numpy(), iterations, leaky, logits.numpy(), mask.numpy()
        return torch.from_numpy(textbook_routing(*arrays))

    u_hat = reference.predictions(u, weight)
    assert_close(reference.capsule_routing(u, weight, bias, **options), paper(u_hat), "layer")
    assert_close(reference.dynamic_routing(u_hat, bias, **options), paper(u_hat), "from û")
    s = reference.dynamic_routing(u_hat, bias, squash_output=False, **options)
    assert_close(reference.squash(s), paper(u_hat), "squash of s")
    shared = reference.predictions(u, weight[:1].expand_as(weight))
    for one in (weight[0], weight[:1]):
        assert_close(reference.capsule_routing(u, one, bias, **options), paper(shared), "shared weight")
    alike = u_hat[:, :, 0]
    want = paper(alike[:, :, None].expand_as(u_hat))
    assert_close(reference.dynamic_routing(alike, bias, **options), want, "û of all outputs")


def test_couplings_by_hand() -> None:
    u, weight = (
        torch.ones(1, 1, 1, dtype=torch.float64),
        torch.tensor([1.0, 2.0]).double().reshape(1, 2, 1, 1),
    )
    assert reference.couplings(u, weight, iterations=0).tolist() == [[[1, 1]]]
    assert reference.couplings(u, weight, iterations=1).tolist() == [[[0.5, 0.5]]]
    want = torch.tensor([1 / (1 + math.exp(0.8)), 1 / (1 + math.exp(-0.8))], dtype=torch.float64)
    assert_close(reference.couplings(u, weight, iterations=2).flatten(), want, tolerance=1e-15)
    # leaky: v of the first pass is (1/10, 4/13), so the logits are 1/10, 8/13 and, for the orphan class, 0
    weights = torch.tensor([0.1, 8 / 13], dtype=torch.float64).exp()
    leaky = reference.couplings(u, weight, iterations=2, leaky=True)
    assert_close(leaky.flatten(), weights / (weights.sum() + 1), tolerance=1e-15)


@pytest.mark.parametrize("options", [o for o in ALL_OPTIONS if o.iterations and not o.detach], ids=str)
def test_couplings_are_those_of_the_last_pass(options: Options) -> None:
    u, weight, bias = layer_inputs(Shape(3, 6, 4, 3, 2), options.bias)
    c = reference.couplings(u, weight, bias, iterations=options.iterations, leaky=options.leaky)
    s = torch.einsum("bij,bijd->bjd", c, reference.predictions(u, weight))
    want = reference.capsule_routing(u, weight, bias, **options.keywords())
    assert_close(reference.squash(s if bias is None else s + bias), want)


@pytest.mark.parametrize("iterations", range(4))
def test_detach_equals_fixed_couplings(iterations: int) -> None:
    u, weight, bias = layer_inputs(Shape(2, 5, 3, 4, 3), bias=True)
    c = reference.couplings(u, weight, bias, iterations=iterations)

    def fixed(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.squash(torch.einsum("bij,bijd->bjd", c, reference.predictions(u, weight)) + bias)

    def detached(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.capsule_routing(u, weight, bias, iterations=iterations, detach=True)

    def gradients(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (u, weight, bias)]
        value = function(*leaves)
        return value, *torch.autograd.grad(
            value, leaves, torch.linspace(-1, 1, value.numel()).view_as(value).double()
        )

    for got, want in zip(gradients(detached), gradients(fixed), strict=True):
        assert_close(got, want)


def test_gradient_by_finite_differences() -> None:
    inputs = [x.requires_grad_() for x in layer_inputs(Shape(2, 3, 2, 2, 2), bias=True)]
    for iterations in range(4):
        assert torch.autograd.gradcheck(
            lambda *x, T=iterations: reference.capsule_routing(*x, iterations=T), inputs
        )

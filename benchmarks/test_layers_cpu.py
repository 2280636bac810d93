"""Layers that users build, on the CPU, against plain PyTorch that stores û: CPU time and memory.

ConvRoutingCapsules against the ways in which public code has it, and weights that all input capsules share.
Targets of the former: 4 times as fast as the fastest (2.5 with AVX2), in a tenth of the memory of any.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, unfold

import capsops
from benchmarks import memory
from benchmarks.measure import StartRace
from benchmarks.rows import Row, Target
from capsops import dispatch, reference
from capsops.measuring import peers
from capsops.measuring.ceiling import measured_ceiling
from capsops.measuring.comparison import relative_error
from capsops.measuring.passes import BOTH, run
from capsops.measuring.timing import cpu_clock

Form = Callable[..., Tensor]
B, C, J, D, K, SIZE, KERNEL = 8, 32, 32, 16, 16, 14, 3
INPUTS, BATCH = 512, 256  # of the shared weight


def measure(
    row: Row,
    forms: dict[str, Form],
    exact: Form,
    shapes: list[tuple[int, ...]],
    race: StartRace,
    more: dict[str, Form] | None = None,
) -> None:
    """Checks and times forms of u and weights, `forms` compiled too, and measures their memory."""
    torch.manual_seed(0)
    u, *weights = ((0.3 if i == 0 else 0.05) * torch.randn(shape) for i, shape in enumerate(shapes))
    inputs = [x.requires_grad_() for x in (u, *weights)]
    ours = forms.pop("ours")
    grad = torch.randn_like(ours(*inputs).detach())
    eager = {"ours": ours, **forms, **(more or {})}
    calls = {
        name: partial(run, form, row.passes, inputs, grad)
        for name, form in (eager | peers.with_compiled(forms)).items()
    }
    samples = zip(u.detach().double().split(1), grad.double().split(1), strict=True)  # û in float64 is large
    doubles = [x.detach().double().requires_grad_() for x in weights]
    parts = [run(exact, row.passes, (x.requires_grad_(), *doubles), g) for x, g in samples]
    want = [torch.cat(x) if i < 2 else torch.stack(x).sum(0) for i, x in enumerate(zip(*parts, strict=True))]
    for name, call in calls.items():
        errors = list(map(relative_error, call(), want))
        assert max(errors) < 1e-5, (name, errors)
        row.error = max(errors) if name == "ours" else row.error
    row.take_times(race(calls, clock=cpu_clock))
    if memory.available():
        row.memory = memory.peak_of(calls["ours"])
        row.peers_memory = {name: memory.peak_of(calls[name]) for name in eager if name != "ours"}


def columns(u: Tensor) -> Tensor:
    """u [B, C, K, H, W] → the capsules under the kernel at each position [B, C · k · k, K, H · W]."""
    x = unfold(u.flatten(1, 2), KERNEL, padding=KERNEL // 2).unflatten(1, (C, K, KERNEL**2))
    return x.transpose(2, 3).flatten(1, 2)


def grouped_convolution(u: Tensor, weight: Tensor) -> Tensor:
    """û [B, I, J, D, H · W] by a convolution with a group for each capsule under the kernel; then sums."""
    x, I = columns(u).flatten(1, 2), len(weight)  # noqa: E741
    u_hat = conv1d(x, weight.flatten(0, 2).unsqueeze(2), groups=I).unflatten(1, (I, J, D))
    total = v = peers.squash((u_hat.sum(1) / J).movedim(-1, 1))
    for _ in range(2):
        c = (u_hat * total.movedim(1, -1)[:, None]).sum(3).softmax(2)
        v = peers.squash((c.unsqueeze(3) * u_hat).sum(1).movedim(-1, 1))
        total = total + v
    return v


def positions_as_batch(u: Tensor, weight: Tensor, route: Form = peers.einsum) -> Tensor:
    """One layer, whose batch is all positions [B, H · W, J, D]."""
    x = columns(u).permute(0, 3, 1, 2)
    return route(x.flatten(0, 1), weight, bias=None, iterations=3).unflatten(0, x.shape[:2])


def loop_over_positions(u: Tensor, weight: Tensor) -> Tensor:
    return torch.stack([peers.einsum(x, weight, None, 3) for x in columns(u).permute(3, 0, 1, 2)], 1)


@pytest.mark.parametrize("passes", BOTH)
def test_convolutional_capsules(passes: str, race: StartRace, report: Callable[[Row], None]) -> None:
    layer = capsops.nn.ConvRoutingCapsules(C, J, K, D, KERNEL, padding=KERNEL // 2, bias=False)

    def ours(u: Tensor, weight: Tensor) -> Tensor:
        v = torch.func.functional_call(layer, {"weight": weight.view(layer.weight.shape)}, (u,))
        return v.permute(0, 3, 4, 1, 2).flatten(1, 2)

    case = f"B={B} {C}×{J} D={D} K={K} {SIZE}×{SIZE} kernel {KERNEL}"
    row = Row("layers", "ConvRoutingCapsules", case, passes, impl=dispatch.automatic("cpu"))
    forms = {"ours": ours, "grouped convolution": grouped_convolution, "einsum": positions_as_batch}
    exact = partial(positions_as_batch, route=reference.capsule_routing)
    shapes = [(B, C, K, SIZE, SIZE), (C * KERNEL**2, J, D, K)]
    measure(row, forms, exact, shapes, race, {"loop": loop_over_positions})  # a compiler would unroll it
    row.targets = [Target("ratio", 4 if measured_ceiling().isa == "avx512" else 2.5, row.ratio)]
    if row.memory is not None:
        row.targets.append(Target("memory ratio", 10, min(row.peers_memory.values()) / row.memory))
    report(row)


def options(u: Tensor, logits: list[Tensor]) -> dict[str, Tensor]:
    """With logits [I, J] a mask too: of each sample a quarter is padding."""
    present = torch.arange(INPUTS) < 3 * INPUTS // 4
    return {"logits": logits[0], "mask": present.expand(u.shape[:2])} if logits else {}


def stored(u: Tensor, weight: Tensor, *logits: Tensor) -> Tensor:
    """û [B, J, I, D] in memory, where each einsum is a batched product."""
    u_hat = torch.einsum("bik,jdk->bjid", u, weight).contiguous()
    b = logits[0].T.expand(u_hat.shape[:3]) if logits else u_hat.new_zeros(u_hat.shape[:3])
    for t in range(3):
        c = b.softmax(1)
        c = c * options(u, logits)["mask"][:, None] if logits else c
        v = peers.squash(torch.einsum("bji,bjid->bjd", c, u_hat))
        b = b + torch.einsum("bjid,bjd->bji", u_hat, v) if t < 2 else b
    return v


@pytest.mark.parametrize("passes", BOTH)
@pytest.mark.parametrize("with_options", [False, True], ids=["", "options"])
@pytest.mark.parametrize("length", [16, 64])
def test_shared_weight(
    length: int, with_options: bool, passes: str, race: StartRace, report: Callable[[Row], None]
) -> None:
    def ours(u: Tensor, weight: Tensor, *logits: Tensor, module: object = capsops) -> Tensor:
        return module.capsule_routing(u, weight, **options(u, logits))

    def expanded(u: Tensor, weight: Tensor, *logits: Tensor) -> Tensor:
        return ours(u, weight.expand(INPUTS, -1, -1, -1), *logits)

    case = f"B={BATCH} {INPUTS}×8 D={length} K={length} shared" + ", logits, mask" * with_options
    row = Row("layers", "capsule_routing", case, passes, impl=dispatch.automatic("cpu"))
    shapes = [(BATCH, INPUTS, length), (8, length, length), (INPUTS, 8)][: 2 + with_options]
    forms = {"ours": ours, "einsum": stored}
    measure(row, forms, partial(ours, module=reference), shapes, race, {"capsops, expanded": expanded})
    report(row)

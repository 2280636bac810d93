"""What a system's step needs beside its batch: random numbers, the precision, and the update of weights."""

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from infocapsgan.engine.distributed import Processes
from infocapsgan.engine.rng import ShardedGenerator

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLossError(ArithmeticError):
    """A loss or its gradient became NaN or infinite."""


def adam(weights: Iterable[nn.Parameter], rate: float, betas: tuple[float, float] = (0.9, 0.999)) -> Adam:
    """Adam that changes a weight in one pass over memory, or on a GPU all weights by one kernel."""
    return Adam(weights, rate, betas, fused=True)


@dataclass(eq=False)
class TrainState:
    """Takes losses to changed weights, in the precision asked for."""

    optimizers: dict[str, Optimizer]
    rng: ShardedGenerator  # where every random number of a step comes from
    _: KW_ONLY
    precision: str = "fp32"  # or bf16, fp16
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    steps_per_epoch: int = 1
    steps: int = 1  # how many there will be
    processes: Processes = field(default_factory=Processes)
    step: int = 0  # how many are done
    at_once: bool = True
    """Whether update() looks at each loss before weights change. Without it check() looks at all since its
    last call: a GPU need not be waited for in between."""

    def __post_init__(self) -> None:
        self._finite = torch.ones((), dtype=torch.bool, device=self.device)
        kind, on = self.device.type, self.precision == "fp16"
        self.scalers = {name: torch.amp.GradScaler(kind, enabled=on) for name in self.optimizers}

    @property
    def epoch(self) -> float:
        """Epochs done, with their fraction: what schedules go by."""
        return self.step / self.steps_per_epoch

    def autocast(self) -> torch.autocast:
        """The context in which forward passes run."""
        return torch.autocast(self.device.type, DTYPES.get(self.precision), enabled=self.precision in DTYPES)

    def update(self, name: str, loss: Tensor) -> None:
        """One step of the optimiser `name` down the gradient of `loss`, averaged over the processes.

        No other weight gets a gradient, and one that the loss does not depend on stays as it is. With
        `at_once`, a loss or gradient that is not finite is a NonFiniteLossError, and weights are as before.
        """
        optimizer, scaler = self.optimizers[name], self.scalers[name]
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        gradients = torch.autograd.grad(scaler.scale(loss), weights, allow_unused=True)
        loss = loss.detach().clone()
        present = [gradient for gradient in gradients if gradient is not None]
        self.processes.average_([loss, *present])
        # The scaler of fp16 looks at gradients itself: where one is not finite it skips the step.
        norm = torch.zeros_like(loss) if scaler.is_enabled() else nn.utils.get_total_norm(present)
        if not self.at_once:
            self._finite &= torch.isfinite(loss) & torch.isfinite(norm)
        elif not torch.isfinite(loss):
            raise NonFiniteLossError(f"the loss of {name} is {loss.item()}")
        elif not torch.isfinite(norm):
            raise NonFiniteLossError(f"the gradient of {name} is not finite")
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None and gradient.stride() != weight.stride():
                # Adam's fused kernel on a GPU requires equal strides.
                gradient = torch.empty_like(weight).copy_(gradient)
            weight.grad = gradient
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def check(self) -> None:
        """Raises NonFiniteLossError if a loss or gradient since the last call was not finite."""
        finite = self._finite.item()
        self._finite.fill_(True)
        if not finite:
            raise NonFiniteLossError("a loss or a gradient is not finite")

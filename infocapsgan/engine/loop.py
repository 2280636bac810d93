"""The training loop."""

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import capsops
from infocapsgan.data import Dataset
from infocapsgan.engine import checkpoint
from infocapsgan.engine.device import check_impl, local_device
from infocapsgan.engine.distributed import join, leave
from infocapsgan.engine.interruption import Interruption
from infocapsgan.engine.run_directory import NoRunDirectory, RunDirectory, device_name, versions, writing
from infocapsgan.engine.settings import Settings
from infocapsgan.engine.start import Training, prepare
from infocapsgan.engine.train_state import NonFiniteLossError
from infocapsgan.plotting.curves import training_curves
from infocapsgan.systems.system import System

PACE_FROM, PACE_TO = 5, 20  # steps between which the time of a step is measured, once


class Result(NamedTuple):
    """How a training ended."""

    path: Path  # the run directory; the working directory in a process that does not write
    finished: bool  # whether all steps are done; False after a signal
    line: str  # what to print; empty in a process that does not write


def train(system_class: type[System], settings: Settings) -> Result:
    """Trains one system from its settings; for the errors see infocapsgan.train."""
    device = local_device(settings.device)
    check_impl(settings.impl, device)
    torch.backends.cudnn.benchmark = True  # batches are all of one size
    processes = join(device)
    impl = capsops.use_impl(settings.impl) if settings.impl != "auto" else nullcontext()
    directory = RunDirectory.open(system_class.name, settings) if processes.writes else NoRunDirectory()
    with directory as run, impl:
        result = Trainer(**vars(prepare(system_class, settings, run, processes, device))).fit()
    leave()
    return result


@dataclass
class Trainer(Training):
    """Takes a training from where it stands to its last step.

    Whether losses are finite is looked at when something is logged, measured or saved: the device is not
    waited for at each step. Where one was not, the steps since then are done once more, each looked at before
    the next, to stop at the state before the first bad one. A signal ends the loop after its step; several
    processes on GPUs end it after the next step at which they ask one another (Processes.stop).
    """

    def __post_init__(self) -> None:
        self.settings, self.writes = self.system.settings, self.state.processes.writes
        self.evaluate_every = self.settings.evaluate_every or max(100, self.batches.per_epoch)
        self.checkpoint_every = self.settings.checkpoint_every or self.evaluate_every
        self.began, self.first_step = time.monotonic() - self.seconds, self.state.step
        self.centred = self.dataset.centred()
        self.baselines = self.system.baselines(self.centred)
        self.metrics: dict[str, float] = {}
        self.last_checked: checkpoint.Snapshot | None = None
        self.state.at_once = self.stop = False

    def fit(self) -> Result:
        """Trains to the last step, or to the one in which a signal comes."""
        state = self.state
        bar = tqdm(total=state.steps, initial=state.step, unit="step", disable=not self.writes)
        with Interruption() as self.interruption, bar as self.bar:
            while state.step < state.steps and not self.stop:
                if (losses := self.step()) is None:
                    continue
                self.bar.update(state.step - self.bar.n)
                self.report_pace()
                if self.due(self.settings.log_every):
                    self.log(losses)
                if self.due(self.evaluate_every):
                    self.evaluate()
                if self.due(self.checkpoint_every) or self.stop:
                    self.save()
        if state.step < state.steps:
            line = f"interrupted after step {state.step}. {self._how_to_resume()}"
            return Result(self.run.path, False, line if self.writes else "")
        return Result(self.run.path, True, self.finish() if self.writes else "")

    def due(self, every: int) -> bool:
        """Whether what happens every so many steps, and after the last, happens after this one."""
        return self.state.step % every == 0 or self.state.step == self.state.steps

    def step(self) -> dict[str, Tensor] | None:
        """One step, and its named losses; None where a loss was not finite and steps are to be done again."""
        state, processes = self.state, self.state.processes
        before = self.last_checked = self.last_checked or checkpoint.capture(self.system, state)
        try:
            chosen = processes.part(self.batches.indices(state.step))
            images, labels = self.dataset.train_batch(chosen, state.rng)
            losses = self.system.step(images, labels, state)
            state.step += 1
            self.stop = processes.stop(self.interruption.came > 0, state.step, state.device)
            every = (self.settings.log_every, self.evaluate_every, self.checkpoint_every)
            if self.stop or state.at_once or any(map(self.due, every)):
                state.check()
                self.last_checked = None
            return losses
        except NonFiniteLossError as error:
            self.step_back(before, error)
            return None

    def step_back(self, snapshot: checkpoint.Snapshot, error: NonFiniteLossError) -> None:
        """Goes back to the state at which all losses were finite; raises if that is the step before."""
        checkpoint.restore(snapshot, self.system, self.state)
        if self.state.at_once:
            self.save()
            message = f"step {self.state.step + 1}: {error}. {self._how_to_resume()}"
            raise NonFiniteLossError(message) from error
        self.state.at_once, self.stop = True, False

    def log(self, losses: dict[str, Tensor]) -> None:
        """Writes the losses of the step, averaged over the processes."""
        means = {name: value.clone() for name, value in losses.items()}
        self.state.processes.average_(list(means.values()))
        values = {name: value.item() for name, value in means.items()}
        self.run.log("train", self.state.step, self.state.epoch, values)
        headline = {name: value for name, value in self.metrics.items() if name == self.system.headline}
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in (values | headline).items()})

    def evaluate(self) -> None:
        """Logs metrics and pictures; the weights with the lowest loss on held-out images are kept."""
        state = self.state
        if self.held_out:
            loss = self._measured(self.system.validation_loss, self.held_out.centred())
            self.run.log("validation", state.step, state.epoch, {"validation_loss": loss})
            if self.writes:
                checkpoint.save_best(self.run.checkpoints, self.system, state.step, loss)
        last = state.step == state.steps
        self.metrics = self.measure(self.centred if last else self.centred.head(10_000))
        self.run.log("evaluation", state.step, state.epoch, self.metrics)
        if self.writes:
            subject = f"{self.system.name} on {self.settings.dataset}"
            sheets = self._measured(self.system.pictures, self.centred)
            title = f"{subject}: losses and metrics during training"
            with writing(self.run.path):
                self.run.draw(state.step, subject, sheets)
                self.run.draw_curves(training_curves(self.run.rows, self.system, self.baselines, title))

    def measure(self, images: Dataset) -> dict[str, float]:
        """The metrics of the system, and those of its generated images."""
        metrics = self._measured(self.system.evaluate, images)
        return metrics | (self._measured(self.system.sample_quality, self.centred) if self.writes else {})

    def save(self) -> None:
        """Writes a checkpoint."""
        if self.writes:
            snapshot = checkpoint.capture(self.system, self.state)
            checkpoint.save(self.run.checkpoints, snapshot, seconds=time.monotonic() - self.began)

    def finish(self) -> str:
        """Measures the weights that are kept, writes summary.json and returns the last line."""
        if self.held_out and checkpoint.read_best(self.run.checkpoints):
            checkpoint.load_best(self.run.checkpoints, self.system)
            self.metrics = {}
        self.metrics = self.metrics or self.measure(self.centred)
        seconds, headline = time.monotonic() - self.began, self.system.headline
        self.run.summarise(
            metrics=self.metrics,
            baselines={headline: self.baselines} if headline in self.metrics else {},
            steps=self.state.step,
            epochs=round(self.state.epoch, 4),
            seconds=round(seconds, 1),
            device=device_name(self.state.device),
            versions=versions(),
        )
        reached = f"finished after {self.state.step} steps"
        if headline in self.metrics:
            compared = "".join(f" ({name}: {value:.3f})" for name, value in self.baselines.items())
            reached = f"{headline.replace('_', ' ')} {self.metrics[headline]:.3f}{compared}"
        pictures, curves = self.run.path / "samples", self.run.path / "curves.png"
        return f"{reached} in {seconds:.0f} s; pictures are in {pictures}, curves in {curves}"

    def report_pace(self) -> None:
        """Says once, after the first steps, how long all of them will take."""
        done, left = self.state.step - self.first_step, self.state.steps - self.state.step
        if done == PACE_FROM:
            self.pace_from = time.monotonic()
        if done == PACE_TO and left >= 2 * PACE_TO and self.writes:
            seconds = (time.monotonic() - self.pace_from) / (PACE_TO - PACE_FROM) * (done + left)
            line = f"{done + left} steps will take about {tqdm.format_interval(seconds)}"
            self.bar.write(f"{line} at the pace of the first ones", file=sys.stderr)

    def _measured(self, method: Callable[[Dataset], Any], dataset: Dataset) -> Any:
        """What a method of the system says of a data set: evaluation mode, no gradients, not compiled."""
        self.system.eval()
        eager = torch.compiler.set_stance("force_eager") if self.settings.compile else nullcontext()
        with torch.no_grad(), eager:
            value = method(dataset)
        self.system.train()
        return value

    def _how_to_resume(self) -> str:
        return f"The state after step {self.state.step} is saved; continue with --resume {self.run.path}"

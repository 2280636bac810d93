"""Trains a system: `python -m infocapsgan.train [SYSTEM] [options]`."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import capsops
from infocapsgan.data import DataError, Dataset
from infocapsgan.data.batches import Batches
from infocapsgan.engine import checkpoint
from infocapsgan.engine.atomic import remove_unfinished
from infocapsgan.engine.command_line import parse
from infocapsgan.engine.device import check_impl, local_device
from infocapsgan.engine.distributed import join, leave, synchronise_batch_norm
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.engine.run_directory import (
    EVALUATION,
    SUMMARY,
    Run,
    RunError,
    SilentRun,
    alone,
    device_name,
    read_config,
    versions,
    write_json,
)
from infocapsgan.engine.settings import Settings
from infocapsgan.engine.train_state import NonFiniteLossError, TrainState
from infocapsgan.plotting.curves import training_curves
from infocapsgan.systems import SYSTEMS
from infocapsgan.systems.system import System


def main() -> None:
    """The command line."""
    system_class, settings = parse(sys.argv[1:])
    try:
        line = train(system_class, settings)
    except (DataError, RunError, ValueError) as error:
        sys.exit(f"error: {error}")
    except NonFiniteLossError as error:
        sys.exit(f"stopped: {error}")
    if line:
        print(line)


def train(system_class: type[System], settings: Settings) -> str:
    """Trains one system from its settings and returns the last line to print.

    Raises:
        DataError: the data are not to be had.
        RunError: what the settings ask for does not serve here, or the run directory does not fit them.
        ValueError: the settings do not fit the data or the processes.
        NonFiniteLossError: a loss became NaN or infinite.
    """
    device = local_device(settings.device)
    check_impl(settings.impl, device)
    torch.backends.cudnn.benchmark = True  # batches are all of one size
    processes = join(device)
    if settings.batch_size % processes.world:
        raise ValueError(
            f"--batch-size: got {settings.batch_size}, takes a multiple of the {processes.world} processes"
        )
    torch.manual_seed(settings.seed)
    system = system_class(settings).to(device)
    dataset = system.load_data().to(device)
    held_out = None
    if system.validation_share:
        dataset, held_out = dataset.hold_out(system.validation_share)
    synchronise_batch_norm(system, processes, device)
    if settings.compile:
        system.compile_networks()
    batches = Batches(len(dataset.train_images), settings.batch_size, settings.seed, device)
    state = TrainState(
        system.optimizers,
        ShardedGenerator(settings.seed, device, processes.rank, processes.world),
        precision=settings.precision,
        device=device,
        steps_per_epoch=batches.per_epoch,
        steps=min(settings.epochs * batches.per_epoch, settings.max_steps or sys.maxsize),
        processes=processes,
    )
    if processes.writes:
        for warning in filter(None, _warnings(system, dataset, batches, state)):
            print(f"warning: {warning}", file=sys.stderr)
    run, seconds = _start(system_class, settings, system, state)
    with run, capsops.use_impl(settings.impl) if settings.impl != "auto" else nullcontext():
        line = fit(system, dataset, batches, state, run, seconds=seconds, held_out=held_out)
    leave()
    return line if processes.writes else ""


def fit(
    system: System,
    dataset: Dataset,
    batches: Batches,
    state: TrainState,
    run: Run | SilentRun,
    *,
    seconds: float = 0.0,
    held_out: Dataset | None = None,
) -> str:
    """The training loop.

    Losses are looked at when something is logged, measured or saved: whether they are finite is known only
    when the device is done, which is not waited for at each step. Where one was not, the steps since then are
    done once more, each looked at before the next, to stop at the state before the first bad one.

    A signal ends the loop after its step. Several processes on GPUs end it after the next step at which they
    ask one another whether there was one (Processes.stop): the answer is waited for, too.

    Args:
        system: what is trained.
        dataset: on the system's device.
        batches: which images make up which step.
        state: where training stands, and what it changes weights with.
        run: where everything is written.
        seconds: how long the run took before it was taken up again.
        held_out: images, as test images, on which the weights that are kept have the lowest loss.
    """
    settings, began = system.settings, time.monotonic() - seconds
    processes, device = state.processes, state.device
    evaluate_every = settings.evaluate_every or max(100, batches.per_epoch)
    checkpoint_every = settings.checkpoint_every or evaluate_every
    centred = dataset.centred()
    baselines = system.baselines(centred)
    interrupted = _Interruption()
    bar = tqdm(
        total=state.steps,
        initial=state.step,
        unit="step",
        file=sys.stderr,
        disable=not processes.writes,
    )
    metrics, shown = {}, {}
    before, state.at_once, stop = None, False, False

    def validate() -> None:
        loss = _measured(system, system.validation_loss, held_out.centred())
        run.log("validation", state.step, state.epoch, {"validation_loss": loss})
        if processes.writes:
            checkpoint.save_best(run.checkpoints, system, state.step, loss)

    def measure(images: Dataset) -> dict[str, float]:
        metrics = _measured(system, system.evaluate, images)
        return metrics | (_measured(system, system.sample_quality, centred) if processes.writes else {})

    def save() -> None:
        if processes.writes:
            snapshot = checkpoint.capture(system, state)
            checkpoint.save(run.checkpoints, snapshot, seconds=time.monotonic() - began)

    while state.step < state.steps and not stop:
        before = before or checkpoint.capture(system, state)
        try:
            chosen = processes.part(batches.indices(state.step))
            images, labels = dataset.train_batch(chosen, state.rng)
            losses = system.step(images, labels, state)
            state.step += 1
            stop = processes.stop(interrupted.came, state.step, device)
            last = state.step == state.steps
            logs = state.step % settings.log_every == 0 or last
            evaluates = state.step % evaluate_every == 0 or last
            saves = state.step % checkpoint_every == 0 or last or stop
            if logs or evaluates or saves or state.at_once:
                state.check()
                before = None
        except NonFiniteLossError as error:
            checkpoint.restore(before, system, state)
            if not state.at_once:
                state.at_once, stop = True, False
                continue
            save()
            raise NonFiniteLossError(
                f"step {state.step + 1}: {error}. {_how_to_resume(run, state)}"
            ) from error
        bar.update(state.step - bar.n)
        if logs:
            losses = {name: value.clone() for name, value in losses.items()}
            processes.average_(list(losses.values()))
            losses = {name: value.item() for name, value in losses.items()}
            run.log("train", state.step, state.epoch, losses)
            bar.set_postfix({**{name: f"{value:.3g}" for name, value in losses.items()}, **shown})
        if evaluates:
            if held_out:
                validate()
            metrics = measure(centred if last else centred.head(10_000))
            run.log("evaluation", state.step, state.epoch, metrics)
            subject = f"{system.name} on {settings.dataset}"
            run.draw(state.step, subject, _measured(system, system.pictures, centred))
            if processes.writes:
                title = f"{subject}: losses and metrics during training"
                run.draw_curves(training_curves(run.rows, system, baselines, title))
            shown = {system.headline: f"{metrics[system.headline]:.3f}"} if system.headline in metrics else {}
        if saves:
            save()
    bar.close()
    interrupted.restore()
    if state.step < state.steps:
        return f"interrupted after step {state.step}. {_how_to_resume(run, state)}"
    if held_out and processes.writes and checkpoint.read_best(run.checkpoints):
        checkpoint.load_best(run.checkpoints, system)
        metrics = {}
    metrics = metrics or measure(centred)
    seconds = time.monotonic() - began
    if processes.writes:
        write_summary(run, system, state, metrics, baselines, seconds)
    compared = "".join(f" ({name}: {value:.3f})" for name, value in baselines.items())
    return (
        f"{system.headline.replace('_', ' ')} {metrics[system.headline]:.3f}{compared} in {seconds:.0f} s; "
        f"pictures are in {run.path / 'samples'}, curves in {run.path / 'curves.png'}"
    )


def write_summary(
    run: Run,
    system: System,
    state: TrainState,
    metrics: dict[str, float],
    baselines: dict[str, float],
    seconds: float,
) -> None:
    """summary.json: what came out, on which machine, in what time."""
    name, settings = read_config(run.path)
    summary = {
        "system": name,
        "dataset": settings["dataset"],
        "recipe": settings["recipe"],
        "seed": settings["seed"],
        "metrics": metrics,
        "baselines": {system.headline: baselines},
        "steps": state.step,
        "epochs": round(state.epoch, 4),
        "seconds": round(seconds, 1),
        "device": device_name(state.device),
        "versions": versions(),
        "settings": settings,
    }
    write_json(run.path / SUMMARY, summary)


def _warnings(system: System, dataset: Dataset, batches: Batches, state: TrainState) -> Iterator[str]:
    """What is not as the settings let one expect."""
    s, whole = system.settings, system.settings.epochs * batches.per_epoch
    yield system.untrained(state.steps)
    if (s.max_steps or 0) > whole:
        yield f"--max-steps {s.max_steps} is not reached: --epochs {s.epochs} ends after {whole} steps"
    if system.headline == "unsupervised_accuracy" and not dataset.labelled:
        yield "the images have no labels: accuracy, NMI, ARI and what k-means reaches mean nothing"


def _start(
    system_class: type[System], settings: Settings, system: System, state: TrainState
) -> tuple[Run, float]:
    """A new run, or the one to continue with its last state put back; and the seconds it has taken so far."""
    name = next(name for name, known in SYSTEMS.items() if known is system_class)
    writes = state.processes.writes
    if not settings.resume:
        return Run.create(name, settings) if writes else SilentRun(), 0.0
    lock, seconds = alone(settings.resume) if writes else None, 0.0
    if saved := checkpoint.checkpoints(settings.resume / "checkpoints"):
        seconds = _take_up(saved[-1], system, state)
    asked = f"--epochs {settings.epochs}"
    asked += f" and --max-steps {settings.max_steps}" if settings.max_steps else ""
    if state.step > state.steps:
        raise RunError(
            f"--resume: {settings.resume} has done {state.step} steps, and training of {asked} "
            f"ends after {state.steps}"
        )
    if not writes:
        return SilentRun(), seconds
    if state.step == state.steps:
        print(f"nothing is left to train: all {state.step} steps of {asked} are done", file=sys.stderr)
    else:  # what came out is of fewer steps
        for result in (SUMMARY, EVALUATION):
            (settings.resume / result).unlink(missing_ok=True)
    remove_unfinished(settings.resume / "checkpoints")
    write_json(settings.resume / "config.json", {"system": name, "settings": settings.to_json()})
    return Run(settings.resume, lock, state.step), seconds


def _take_up(path: Path, system: System, state: TrainState) -> float:
    """Puts the state of a checkpoint back, and returns the seconds that the run had taken."""
    snapshot = checkpoint.load(path)
    before, here = snapshot.numbers.get("device"), state.device.type
    if before not in (None, here):
        raise RunError(
            f"--resume: the run was trained on {before} and cannot go on on {here}: "
            "the state of the random numbers of the one does not fit the other"
        )
    try:
        checkpoint.restore(snapshot, system, state)
        return snapshot.numbers["seconds"]
    except (KeyError, RuntimeError, ValueError) as error:
        raise RunError(
            f"--resume: {path} was written by another version of infocapsgan, or on another device "
            f"than {here}: {error}"
        ) from error


def _measured(system: System, method: Callable[[Dataset], Any], dataset: Dataset) -> Any:
    """What a method of the system says of a data set: in evaluation mode, without gradients, not compiled."""
    system.eval()
    eager = torch.compiler.set_stance("force_eager") if system.settings.compile else nullcontext()
    with torch.no_grad(), eager:
        found = method(dataset)
    system.train()
    return found


def _how_to_resume(run: Run, state: TrainState) -> str:
    return f"The state after step {state.step} is saved; continue with --resume {run.path}"


class _Interruption:
    """Notes SIGINT and SIGTERM, so that the loop ends after its step; a second one is not held up."""

    def __init__(self) -> None:
        self.came = False
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }

    def _note(self, number: int, frame: object) -> None:
        self.came = True
        self.restore()

    def restore(self) -> None:
        """Puts back what the signals did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()

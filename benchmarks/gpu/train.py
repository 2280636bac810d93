"""Seconds of CapsNet's MNIST epoch: step by step as the training loop runs, or each step in a CUDA graph.

A captured step is that of the training loop too (augmentation, forward, backward, Adam, checks); the learning
rate stays as it is at the capture.
"""

import time

import torch
from torch import Tensor

import capsops
from benchmarks.gpu.record import folder
from benchmarks.system_step import EinsumCapsules, SystemStep, check_equal, parts, profiled
from capsops.measuring.timing import clock
from infocapsgan.data import Dataset
from infocapsgan.systems import CapsNet

EINSUM = "einsum"  # the same model, routed by plain PyTorch
BOUNDS = {"fp32": 5e-3, "bf16": 5e-2}  # of the class capsules' difference, with convolutions in TF32
WARM_UP_STEPS = 5


class CapturedStep:
    """Each call trains on one batch, and returns the named losses.

    Args:
        step: of a system on a CUDA device.
    """

    def __init__(self, step: SystemStep) -> None:
        self.batches, self.dataset, self.number = step.batches, step.dataset, 0
        system, state = step.system, step.state
        for optimizer in system.optimizers.values():
            for group in optimizer.param_groups:
                group["capturable"] = True
        chosen = self.batches.indices(0)
        self.images = self.dataset.train_images[chosen].clone()
        self.labels = self.dataset.train_labels[chosen].clone()
        side = torch.cuda.Stream(step.device)
        side.wait_stream(torch.cuda.current_stream(step.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                system.step(self.images, self.labels, state)
        torch.cuda.current_stream(step.device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(state.rng.generator)
        with torch.cuda.graph(self.graph):
            self.named = system.step(self.images, self.labels, state)

    def __call__(self) -> dict[str, Tensor]:
        chosen = self.batches.indices(self.number)
        torch.index_select(self.dataset.train_images, 0, chosen, out=self.images)
        torch.index_select(self.dataset.train_labels, 0, chosen, out=self.labels)
        self.graph.replay()
        self.number += 1
        return self.named


def capsnet(impl: str, device: torch.device, **settings: object) -> CapsNet:
    """As published, always with the same weights."""
    torch.manual_seed(0)
    system = CapsNet(recipe="published", dataset="mnist", **settings).to(device)
    if impl == EINSUM:
        system.model.encoder.classes = EinsumCapsules(system.model.encoder.classes)
    return system


def epoch(
    dataset: Dataset, impl: str, precision: str, captured: bool, batch: int = 128, width: int = 256
) -> dict[str, object]:
    """Compares a fresh CapsNet with the einsum model, trains it for an epoch, and profiles its steps."""
    device = dataset.train_images.device
    settings = {"precision": precision, "batch_size": batch, "width": width}
    with capsops.use_impl("reference" if impl == EINSUM else impl):
        begin, system = time.perf_counter(), capsnet(impl, device, **settings)
        step = call = SystemStep(system, dataset)
        with step.state.autocast():
            check_equal(system, capsnet(EINSUM, device, **settings), dataset, BOUNDS[precision])
        if captured:
            call = CapturedStep(step)
        else:
            clock(step, WARM_UP_STEPS, device)
        preparation, accuracies = time.perf_counter() - begin, []
        per_epoch = step.batches.per_epoch
        seconds = clock(lambda: accuracies.append(call()["batch_accuracy"].clone()), per_epoch, device)
        step.state.check()
        accuracy = torch.stack(accuracies[-20:]).mean().item()
        if len(dataset.train_labels) >= 60_000 and not accuracy > 0.9:
            raise AssertionError(f"at the end of the epoch {accuracy:.3f} of the images are right")
        results = {"seconds": seconds, "preparation": preparation, "accuracy of the last batches": accuracy}
        if not captured:
            calls = 20 if device.type == "cuda" else 2
            events, wall = profiled(step, calls, device)
            results["profiled parts of a step"] = parts(events, wall, calls, device)
            with (folder() / "train-profile.txt").open("a") as file:
                order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
                print(impl, precision, events.table(sort_by=order, row_limit=25), sep="\n", file=file)
    return results

"""CapsNet's whole training step in one CUDA graph: seconds per epoch, replayed for each batch.

The step is that of the training loop (augmentation, forward, backward, Adam, checks); the learning rate stays
as it is at the capture.
"""

import time

import torch

import capsops
from benchmarks.system_step import EinsumCapsules, SystemStep
from infocapsgan.data import Dataset
from infocapsgan.systems import CapsNet

WARM_UP_STEPS = 5


class CapturedStep:
    """Each call trains on one batch.

    Args:
        system: on a CUDA device.
        dataset: on the same device.
    """

    def __init__(self, system: CapsNet, dataset: Dataset) -> None:
        self.step = SystemStep(system, dataset)
        self.dataset, self.number = dataset, 0
        training, device = self.step.training, self.step.device
        for optimizer in system.optimizers.values():
            for group in optimizer.param_groups:
                group["capturable"] = True
        chosen = self.step.batches.indices(0)
        self.images, self.labels = dataset.train_images[chosen].clone(), dataset.train_labels[chosen].clone()
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                system.step(self.images, self.labels, training)
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(training.draw.generator)
        with torch.cuda.graph(self.graph):
            self.named = system.step(self.images, self.labels, training)

    def __call__(self) -> None:
        chosen = self.step.batches.indices(self.number)
        torch.index_select(self.dataset.train_images, 0, chosen, out=self.images)
        torch.index_select(self.dataset.train_labels, 0, chosen, out=self.labels)
        self.graph.replay()
        self.number += 1


def epoch(dataset: Dataset, impl: str, precision: str, batch: int = 128) -> dict[str, float]:
    """Trains for an epoch of a fresh CapsNet as published; seconds, and the accuracy of its last batches.

    `impl` may be "einsum", which is the same model routed by plain PyTorch.
    """
    torch.manual_seed(0)
    device = dataset.train_images.device
    system = CapsNet(recipe="published", dataset="mnist", precision=precision, batch_size=batch).to(device)
    if impl == "einsum":
        system.model.encoder.classes = EinsumCapsules(system.model.encoder.classes)
    with capsops.use_impl("reference" if impl == "einsum" else impl):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        step = CapturedStep(system, dataset)
        torch.cuda.synchronize(device)
        ready = time.perf_counter()
        right = []
        for number in range(step.step.batches.per_epoch):
            step()
            if number % 50 == 49:
                right.append(step.named["batch_accuracy"].clone())
        torch.cuda.synchronize(device)
        seconds = time.perf_counter() - ready
    step.step.training.check()
    return {
        "seconds": seconds,
        "step": seconds / step.step.batches.per_epoch,
        "preparation": ready - begin,
        "accuracy of the last batches": torch.stack(right[-2:]).mean().item(),
    }

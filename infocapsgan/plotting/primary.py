"""What single primary capsules hold, by a decoder that reconstructs an image from one primary capsule.

A CapsNet's decoder takes one class capsule and zeros for the others; this one takes one primary capsule,
scaled by its coupling coefficient with the predicted class, and zeros for the others. It is trained on the
training images, the capsules sampled in proportion to their scaled lengths, and kept in the run.
"""

import hashlib
import json
import math
import sys

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import capsops
from capsops.nn import PrimaryCapsules
from infocapsgan.data.batches import Batches
from infocapsgan.data.dataset import to_unit
from infocapsgan.engine.atomic import atomic_folder
from infocapsgan.engine.checkpoint import WEIGHTS
from infocapsgan.engine.loaded_run import LoadedRun
from infocapsgan.engine.settings import Count, Whole
from infocapsgan.models.capsule_encoder import lengths
from infocapsgan.models.decoders import FullyConnectedDecoder
from infocapsgan.plotting.figures import Sheet, sheet_figure
from infocapsgan.plotting.rotate import labelled_image
from infocapsgan.systems import System

FOLDER = "primary-decoder"
BATCH_SIZE, LEARNING_RATE = 128, 1e-3
CAPSULES, COUPLINGS = 10, 10  # rows and columns of the picture


def primary(run: LoadedRun, *, image: Whole = 0, steps: Count = 1000) -> Figure:
    """Reconstructions from single primary capsules, the coupling coefficient growing from left to right.

    Args:
        image: number of the test image, from 0 on.
        steps: of training of the decoder, 128 images each.
    """
    system = run.system
    pixels, label = labelled_image(run, "decode", "primary", image)
    decoder, largest = primary_decoder(run, steps)
    u = system.capsules(pixels).primary
    coupling, predicted = couplings_to_predicted(system, u)
    share = coupling * lengths(u)
    chosen = share[0].topk(min(CAPSULES, share.shape[1])).indices
    values = torch.linspace(0, largest, COUPLINGS, device=run.device)
    inputs = u.new_zeros(len(chosen), len(values), *u.shape[1:])
    inputs[torch.arange(len(chosen)), :, chosen] = values[:, None] * u[0, chosen, None]
    rebuilt = decoder(inputs.flatten(0, 1)).unflatten(0, (len(chosen), len(values)))
    types = next(layer.capsules for layer in system.modules() if isinstance(layer, PrimaryCapsules))
    side = math.isqrt(u.shape[1] // types)
    rows = [
        f"type {i // side**2}, row {i % side**2 // side}, column {i % side}: {coupling[0, i]:.2f}"
        for i in chosen.tolist()
    ]
    true, guess = system.class_name(label), system.class_name(predicted)
    images = torch.cat([pixels.expand(len(chosen), 1, *pixels.shape[1:]), rebuilt], dim=1).flatten(0, 1)
    heads = ["image", *(f"{value:.2f}" for value in values.tolist())]
    xlabel = "coupling coefficient that the capsule is scaled by"
    ylabel = f"primary capsule, and its coupling with class {guess}"
    sheet = Sheet(images, len(values) + 1, rows, heads, xlabel=xlabel, ylabel=ylabel)
    subject = f"test image {image} ({true}, predicted {guess}): reconstructed from single primary capsules"
    return sheet_figure(f"{run.title}\n{subject}", sheet)


def primary_decoder(run: LoadedRun, steps: int) -> tuple[FullyConnectedDecoder, float]:
    """The decoder, and the largest coupling coefficient that it was trained on.

    Trained with seed 0, unless the run has it, of as many steps and the same weights of the system.
    """
    system, folder = run.system, run.path / FOLDER
    weights = hashlib.sha256((run.weights.checkpoint / WEIGHTS).read_bytes()).hexdigest()
    wanted = {"steps": steps, "weights": weights}
    (in_capsules, _, _, K), (channels, size, _) = system.routing.weight.shape, system.image_shape
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = FullyConnectedDecoder(in_capsules * K, channels, size).to(run.device)
    kept = json.loads((folder / "decoder.json").read_text()) if folder.is_dir() else {}
    if not wanted.items() <= kept.items():
        kept = wanted | {"largest_coupling": _train(decoder, run, steps)}
        with atomic_folder(folder) as temporary:
            save_file(decoder.state_dict(), temporary / "weights.safetensors")
            (temporary / "decoder.json").write_text(json.dumps(kept))
    decoder.load_state_dict(load_file(folder / "weights.safetensors"))
    return decoder.eval().requires_grad_(False), kept["largest_coupling"]


def couplings_to_predicted(system: System, u: Tensor) -> tuple[Tensor, Tensor]:
    """Couplings of primary capsules u [B, I, K] with the longest class capsule [B, I], and its class [B]."""
    layer = system.routing
    predicted = lengths(layer(u)).argmax(dim=1)
    coupling = capsops.couplings(u, layer.weight, layer.bias, iterations=layer.iterations, leaky=layer.leaky)
    return coupling[torch.arange(len(u), device=u.device), :, predicted], predicted


def _train(decoder: FullyConnectedDecoder, run: LoadedRun, steps: int) -> float:
    images = run.dataset.train_images
    batches = Batches(len(images), min(BATCH_SIZE, len(images)), 0, run.device)
    optimizer = torch.optim.Adam(decoder.parameters(), LEARNING_RATE)
    generator, largest = torch.Generator(run.device).manual_seed(0), 0.0
    for step in tqdm(range(steps), "training the decoder of primary capsules", unit="step", file=sys.stderr):
        target = to_unit(images[batches.indices(step)])
        with torch.no_grad():
            u = run.system.capsules(target).primary
            coupling, _ = couplings_to_predicted(run.system, u)
            chosen = (coupling * lengths(u)).multinomial(1, generator=generator)[:, 0]
            scale = coupling * F.one_hot(chosen, u.shape[1])
            largest, scaled = max(largest, scale.max().item()), u * scale[:, :, None]
        with torch.enable_grad():
            loss = (decoder(scaled) - target).square().flatten(1).sum(dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return largest

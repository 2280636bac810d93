"""A decoder that rebuilds an image from one primary capsule alone.

As the decoder of a CapsNet is given one class capsule and zeros for the others, this one is given one primary
capsule, scaled by its coupling coefficient with the predicted class, and zeros for the others. It is trained
on the training images, the capsules being drawn in proportion to their scaled lengths, and kept in the run.
"""

import hashlib
import json

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import capsops
from infocapsgan.data.batches import Batches
from infocapsgan.data.dataset import to_unit
from infocapsgan.engine.atomic import atomic_folder
from infocapsgan.engine.checkpoint import WEIGHTS
from infocapsgan.engine.loaded_run import LoadedRun
from infocapsgan.models.capsule_encoder import lengths
from infocapsgan.models.decoders import FullyConnectedDecoder
from infocapsgan.systems import CapsNet

FOLDER = "primary-decoder"
BATCH_SIZE, LEARNING_RATE = 128, 1e-3


def primary_decoder(run: LoadedRun, system: CapsNet, steps: int) -> tuple[FullyConnectedDecoder, float]:
    """The decoder, and the largest coupling coefficient that it was trained on.

    Trained at the first call, with seed 0, and read from the run at later ones with the same number of steps
    and the same weights of the system.

    Args:
        found: the run.
        system: its CapsNet.
        steps: of training, of 128 images each.
    """
    folder = run.path / FOLDER
    weights = hashlib.sha256((run.weights.checkpoint / WEIGHTS).read_bytes()).hexdigest()
    wanted = {"steps": steps, "weights": weights}
    in_capsules, _, _, K = system.model.encoder.classes.weight.shape
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = system.image_shape
        decoder = FullyConnectedDecoder(in_capsules * K, shape.channels, shape.size).to(run.device)
    kept = json.loads((folder / "decoder.json").read_text()) if folder.is_dir() else {}
    if any(kept.get(name) != value for name, value in wanted.items()):
        largest = _train(decoder, run, system, steps)
        with atomic_folder(folder) as temporary:
            save_file(decoder.state_dict(), temporary / "weights.safetensors")
            (temporary / "decoder.json").write_text(json.dumps(wanted | {"largest_coupling": largest}))
    decoder.load_state_dict(load_file(folder / "weights.safetensors"))
    largest = json.loads((folder / "decoder.json").read_text())["largest_coupling"]
    return decoder.eval().requires_grad_(False), largest


def couplings_to(system: CapsNet, u: Tensor) -> tuple[Tensor, Tensor]:
    """Couplings of primary capsules u [B, I, K] with the longest class capsule [B, I], and its class [B]."""
    layer = system.model.encoder.classes
    options = {"iterations": layer.iterations, "leaky": layer.leaky}
    predicted = lengths(layer(u)).argmax(dim=1)
    coupling = capsops.couplings(u, layer.weight, layer.bias, **options)
    return coupling[torch.arange(len(u), device=u.device), :, predicted], predicted


def _train(decoder: FullyConnectedDecoder, run: LoadedRun, system: CapsNet, steps: int) -> float:
    images = run.dataset.train_images
    batches = Batches(len(images), min(BATCH_SIZE, len(images)), 0, run.device)
    optimizer = torch.optim.Adam(decoder.parameters(), LEARNING_RATE)
    generator = torch.Generator(run.device).manual_seed(0)
    largest = 0.0
    for step in range(steps):
        target = to_unit(images[batches.indices(step)])
        with torch.no_grad():
            u = system.model.encoder(target).primary
            coupling, _ = couplings_to(system, u)
            share = coupling * lengths(u)
            one = F.one_hot(share.multinomial(1, generator=generator)[:, 0], u.shape[1])
            largest = max(largest, (coupling * one).max().item())
            given = u * (coupling * one)[:, :, None]
        with torch.enable_grad():
            loss = (decoder(given) - target).square().flatten(1).sum(dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return largest

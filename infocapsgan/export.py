"""Writes a trained system as ONNX: `python -m infocapsgan.export RUN [--out FILE]`.

Systems that classify become a network from images [N, C, H, W], float in [0, 1], to probabilities [N, J] of
classes or class codes. Others become their generator, from latent vectors to images; mimic becomes a network
from images to its copies. The file is checked: onnxruntime must compute the same as torch.
Needs `pip install 'capsops[onnx]'`.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import capsops
from infocapsgan.engine.atomic import atomic_file
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.engine.run_command import loaded, run_parser
from infocapsgan.engine.run_directory import RunError, writing
from infocapsgan.systems import System

EXPORTED = {
    "classify": ("classify", "images", "probabilities"),
    "cluster": ("code_probabilities", "images", "probabilities"),
    "latents": ("generate", "latents", "images"),
    "reconstruct": ("reconstruct", "images", "reconstructions"),
}
"""By ability, in order of preference: the method that is exported, its input and its output."""
TOLERANCE = 1e-4  # largest difference from torch, of numbers from 0 to 1


class ExportError(RunError):
    """A system cannot be written as ONNX, or the file computes something else."""


class Inference(nn.Module):
    """The network that is exported: one method of a system in evaluation mode, from `input` to `output`."""

    def __init__(self, system: System) -> None:
        super().__init__()
        self.system = system
        ability = next(ability for ability in EXPORTED if not system.why_not(ability))
        self.method, self.input, self.output = EXPORTED[ability]

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.system, self.method)(x)

    def example(self, number: int, seed: int) -> Tensor:
        """Random inputs [number, …]."""
        rng, (channels, size, _) = ShardedGenerator(seed), self.system.image_shape
        if self.input == "images":
            return rng.uniform(number, channels, size, size)
        return self.system.random_latents(number, rng)


def main() -> None:
    parser = run_parser("export", __doc__)
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: RUN/model.onnx)")
    args = parser.parse_args()
    out = args.out or args.run / "model.onnx"
    with loaded(args.run, device="cpu") as run:
        network = Inference(run.system)
        difference = export(network, out)
    print(f"{network.input} → {network.output}; onnxruntime differs from torch by at most {difference:.1e}")
    print(f"written to {out}")


def export(network: Inference, path: Path) -> float:
    """Writes the network, and returns the largest difference of onnxruntime's result from torch's."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # of torch.onnx.export
    except ImportError as error:
        raise ExportError(f"{error}; install it by `pip install 'capsops[onnx]'`") from error
    with writing(path), atomic_file(path) as temporary:
        with warnings.catch_warnings(), capsops.use_impl("reference"):
            warnings.simplefilter("ignore")  # the exporter's, of its own insides
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # "torchvision is not installed"
            options: dict[str, Any] = {"input_names": [network.input], "output_names": [network.output]}
            options |= {"dynamic_shapes": ({0: torch.export.Dim("N")},), "external_data": False}
            example = (network.example(2, 0),)
            try:
                torch.onnx.export(network, example, temporary, dynamo=True, verbose=False, **options)
            except (TypeError, torch.onnx.OnnxExporterError) as error:
                raise ExportError(f"torch {torch.__version__} cannot export it: {error}") from error
        session = onnxruntime.InferenceSession(temporary.read_bytes(), providers=["CPUExecutionProvider"])
        inputs = network.example(3, 1)  # another number than it was traced with
        with torch.no_grad():
            wanted = network(inputs)
        (result,) = session.run(None, {network.input: inputs.numpy()})
        difference = (torch.from_numpy(result) - wanted).abs().max().item()
        if not difference <= TOLERANCE:
            raise ExportError(f"onnxruntime's result differs from torch's by {difference:g}: not written")
    return difference


if __name__ == "__main__":
    main()

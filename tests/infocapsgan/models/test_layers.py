"""Which layers follow one another: what neither shapes nor parameter counts tell."""

import pytest
import torch
from torch import nn

from infocapsgan.models.capsule_encoder import CapsuleEncoder, StackedCapsuleEncoder
from infocapsgan.models.dcgan import ConvolutionalDiscriminator, TransposedGenerator, UpsamplingGenerator
from infocapsgan.models.decoders import DeconvolutionalDecoder, FullyConnectedDecoder
from infocapsgan.models.infogan import InfoGANGenerator, InfoGANTrunk


def named(layers):
    """The layers without Flatten and Unflatten, as words; a leaky ReLU with its slope."""
    shapes = (nn.Flatten, nn.Unflatten)
    return " ".join(
        type(m).__name__ + (f"({m.negative_slope})" if isinstance(m, nn.LeakyReLU) else "")
        for m in layers
        if not isinstance(m, shapes)
    )


@pytest.mark.parametrize(
    ("network", "wanted"),
    [
        (FullyConnectedDecoder(8, 1, 28), "Linear ReLU Linear ReLU Linear Sigmoid"),
        (
            FullyConnectedDecoder(8, 1, 28, batch_norm=True),
            "Linear BatchNorm1d ReLU Linear BatchNorm1d ReLU Linear Sigmoid",
        ),
        (
            DeconvolutionalDecoder(8, 2, 1, 28),
            "Linear ReLU ConvTranspose2d ReLU ConvTranspose2d ReLU ConvTranspose2d Sigmoid",
        ),
        (
            DeconvolutionalDecoder(8, 2, 1, 28, batch_norm=True),
            "Linear BatchNorm1d ReLU ConvTranspose2d BatchNorm2d ReLU ConvTranspose2d BatchNorm2d ReLU "
            "ConvTranspose2d Sigmoid",
        ),
        (
            UpsamplingGenerator(4, 1, 28, width=8),
            "Linear ReLU Upsample Conv2d ReLU Upsample Conv2d ReLU Conv2d Tanh",
        ),
        (
            TransposedGenerator(4, 1, 28, width=8),
            "Linear ReLU ConvTranspose2d ReLU ConvTranspose2d ReLU ConvTranspose2d ReLU ConvTranspose2d Tanh",
        ),
        (
            ConvolutionalDiscriminator(1, 28, width=8),
            "Conv2d LeakyReLU(0.2) Conv2d BatchNorm2d LeakyReLU(0.2) Conv2d BatchNorm2d LeakyReLU(0.2) "
            "Linear",
        ),
        (
            InfoGANGenerator(4, 1, 28, width=8),
            "Linear BatchNorm1d ReLU Linear BatchNorm1d ReLU ConvTranspose2d BatchNorm2d ReLU "
            "ConvTranspose2d Tanh",
        ),
        (
            InfoGANTrunk(1, 28, width=8),
            "Conv2d LeakyReLU(0.1) Conv2d BatchNorm2d LeakyReLU(0.1) Linear BatchNorm1d LeakyReLU(0.1)",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layers_in_order(network, wanted):
    assert named(network.layers) == wanted


def test_the_encoder_normalises_before_its_relu():
    encoder, seen = CapsuleEncoder(1, 28, 5, width=8, batch_norm=True), []
    encoder.primary.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.rand(2, 1, 28, 28)
    encoder(images)
    torch.testing.assert_close(seen[0], encoder.norm(encoder.conv(images)).relu())


def test_the_stacked_encoder_has_five_small_convolutions():
    encoder = StackedCapsuleEncoder(1, 28, 5, width=16)
    assert named(encoder.stem) == " ".join(["Conv2d BatchNorm2d ReLU"] * 4)
    convolutions = [*encoder.stem[::3], encoder.primary.conv]
    assert [layer.out_channels for layer in convolutions] == [8, 16, 16, 32, 32]
    assert [layer.stride[0] for layer in convolutions] == [1, 2, 1, 1, 2]
    assert {layer.kernel_size for layer in convolutions} == {(3, 3)}


@pytest.mark.parametrize(("size", "grid"), [(27, 6), (28, 6), (32, 7), (36, 8)])
def test_the_stacked_encoder_takes_images_of_any_size(size, grid):
    images = torch.rand(2, 3, size, size)
    primary, classes = StackedCapsuleEncoder(3, size, 5, width=8, iterations=2, leaky=True)(images)
    assert primary.shape == (2, 2 * grid**2, 8)
    assert classes.shape == (2, 5, 16)


def test_what_a_primary_capsule_of_the_stacked_encoder_sees():
    encoder = StackedCapsuleEncoder(1, 28, 5, width=8).eval()
    images = torch.rand(1, 1, 28, 28, requires_grad=True)
    grid = encoder(images).primary.view(1, 2, 6, 6, 8)
    (gradient,) = torch.autograd.grad(grid[:, :, 2, 3].square().sum(), images)
    rows, columns = (gradient[0, 0].abs().sum(side).nonzero().flatten() for side in (1, 0))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 18, 6, 22)

"""Every network at every size of image: 28, 32 and 36 as published, and 48 to 128."""

import pytest
import torch

from infocapsgan.models.capsule_encoder import (
    CapsuleEncoder,
    StackedCapsuleEncoder,
    first_stride,
    primary_grid,
)
from infocapsgan.models.capsule_generator import CapsuleGenerator
from infocapsgan.models.dcgan import ConvolutionalDiscriminator, TransposedGenerator, UpsamplingGenerator
from infocapsgan.models.decoders import DeconvolutionalDecoder, FullyConnectedDecoder
from infocapsgan.models.infogan import InfoGANGenerator, InfoGANTrunk, infogan_levels
from tests.parameters import parameter_count

SIZES = (28, 32, 36, 48, 64, 100, 128)
ENCODERS = {
    "encoder": lambda size: CapsuleEncoder(3, size, 5, width=16),
    "encoder of kernels of 7": lambda size: CapsuleEncoder(3, size, 5, width=16, kernel_size=7),
    "stacked encoder": lambda size: StackedCapsuleEncoder(3, size, 5, width=16),
}
GENERATORS = {
    "capsule generator": lambda size: CapsuleGenerator(80, 3, size, 5, width=16),
    "upsampling generator": lambda size: UpsamplingGenerator(80, 3, size, width=16),
    "transposed generator": lambda size: TransposedGenerator(80, 3, size, width=16),
    "InfoGAN's generator": lambda size: InfoGANGenerator(80, 3, size, width=8),
    "fully connected decoder": lambda size: FullyConnectedDecoder(80, 1, size),
    "deconvolutional decoder": lambda size: DeconvolutionalDecoder(80, 5, 3, size),
}
DISCRIMINATORS = {
    "discriminator": lambda size: ConvolutionalDiscriminator(3, size, width=16),
    "InfoGAN's trunk": lambda size: InfoGANTrunk(3, size, width=8),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ENCODERS)
def test_capsules_of_images_of_any_size(name, size):
    images = torch.rand(2, 3, size, size, requires_grad=True)
    primary, classes = ENCODERS[name](size)(images)
    assert primary.shape[::2] == (2, 8)
    assert 2 * 25 <= primary.shape[1] <= 4 * 169
    assert classes.shape == (2, 5, 16)
    (gradient,) = torch.autograd.grad(classes.square().sum(), images)
    middle = gradient[..., size // 4 : -(size // 4), size // 4 : -(size // 4)]
    assert (middle != 0).all()  # no stride passes over pixels


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", GENERATORS)
def test_images_of_any_size(name, size):
    network = GENERATORS[name](size)
    images = network(10 * torch.randn(16, 80))  # large: the signal exceeds the biases before each ReLU
    images = images[0] if isinstance(images, tuple) else images
    assert images.shape == (16, images.shape[1], size, size)
    varied = (images.std(dim=0) > 0).any(dim=0)
    # No row or column comes from the bias only, as a border made by output padding would.
    assert varied.any(dim=0).all()
    assert varied.any(dim=1).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_discriminators_of_images_of_any_size(name, size):
    assert len(DISCRIMINATORS[name](size)(torch.rand(2, 3, size, size))) == 2


@pytest.mark.parametrize(
    ("name", "at_28", "at_32"),
    [
        ("encoder", 70_816, 106_656),
        ("encoder of kernels of 7", 96_928, 143_008),
        ("stacked encoder", 109_912, 143_192),
        ("capsule generator", 82_019, 117_859),
        ("upsampling generator", 67_203, 86_643),
        ("transposed generator", 13_311, 22_383),
        ("InfoGAN's generator", 115_787, 88_395),
        ("fully connected decoder", 1_370_384, 1_616_384),
        ("deconvolutional decoder", 194_295, 850_643),
        ("discriminator", 2_973, 3_085),
        ("InfoGAN's trunk", 103_224, 76_696),
    ],
)
def test_sizes_28_and_32_keep_their_parameters(name, at_28, at_32):
    network = (ENCODERS | GENERATORS | DISCRIMINATORS)[name]
    assert [parameter_count(network(size)) for size in (28, 32)] == [at_28, at_32]


def test_strides_and_levels_by_hand():
    assert [first_stride(size) for size in (28, 36, 44, 48, 76, 80, 108, 112, 128)] == [
        1,
        1,
        1,
        2,
        2,
        3,
        3,
        4,
        4,
    ]
    assert [primary_grid(size, 9) for size in (28, 44, 48, 64, 100, 128)] == [6, 14, 6, 10, 12, 11]
    assert [infogan_levels(size) for size in (28, 32, 36, 60, 64, 124, 128)] == [2, 3, 3, 3, 4, 4, 5]


@pytest.mark.parametrize("size", [40, 44, 52, 60, 76, 80, 92, 108, 112, 124])
def test_generators_at_sizes_that_no_power_of_two_divides(size):
    for name in ("capsule generator", "InfoGAN's generator", "deconvolutional decoder"):
        images = GENERATORS[name](size)(torch.randn(2, 80))
        assert (images[0] if isinstance(images, tuple) else images).shape[2:] == (size, size)

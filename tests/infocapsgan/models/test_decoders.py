import pytest
import torch

from infocapsgan.models.decoders import DeconvolutionalDecoder, FullyConnectedDecoder, masked
from tests.parameters import parameter_count


@pytest.mark.parametrize(
    ("batch_norm", "fully_connected", "deconvolutional"),
    [(False, 1_411_344, 250_121), (True, 1_414_416, 251_033)],
)
def test_published_parameter_counts(batch_norm, fully_connected, deconvolutional):
    assert parameter_count(FullyConnectedDecoder(160, 1, 28, batch_norm=batch_norm)) == fully_connected
    assert parameter_count(DeconvolutionalDecoder(160, 10, 1, 28, batch_norm=batch_norm)) == deconvolutional


def test_published_parameter_counts_of_larger_images():
    assert parameter_count(DeconvolutionalDecoder(160, 10, 3, 32)) == 882_883
    assert parameter_count(DeconvolutionalDecoder(80, 5, 1, 32)) == 849_617


@pytest.mark.parametrize("size", [28, 32, 36])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_images_come_out_in_0_to_1(size, batch_norm):
    for decoder in (
        FullyConnectedDecoder(32, 3, size, batch_norm=batch_norm),
        DeconvolutionalDecoder(32, 2, 3, size, batch_norm=batch_norm),
    ):
        images = decoder(torch.randn(2, 2, 16))
        assert images.shape == (2, 3, size, size)
        assert images.min() >= 0
        assert images.max() <= 1


@pytest.mark.parametrize("size", [16, 29])
def test_sizes_that_no_kernels_add_up_to(size):
    with pytest.raises(ValueError, match=f"size: got {size}, takes an even number"):
        DeconvolutionalDecoder(32, 2, 1, size)


def test_masked_by_hand():
    capsules = torch.arange(8.0).view(2, 2, 2)
    assert masked(capsules, torch.tensor([1, 0])).tolist() == [[[0, 0], [2, 3]], [[4, 5], [0, 0]]]

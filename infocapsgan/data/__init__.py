"""Image sets, each as a few uint8 tensors: `load("mnist")`."""

from infocapsgan.data.dataset import NAMES, Dataset, ImageShape, image_shape, load
from infocapsgan.data.files import DataError

__all__ = ["NAMES", "DataError", "Dataset", "ImageShape", "image_shape", "load"]

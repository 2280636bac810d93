"""Image sets, each as a few uint8 tensors: `load("mnist")`."""

from infocapsgan.data.dataset import Dataset
from infocapsgan.data.files import DataError
from infocapsgan.data.registry import NAMES, SINGLE_NAMES, ImageShape, image_shape, load

__all__ = ["NAMES", "SINGLE_NAMES", "DataError", "Dataset", "ImageShape", "image_shape", "load"]

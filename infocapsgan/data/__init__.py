"""Image sets, each as a few uint8 tensors: `load("mnist")`."""

from infocapsgan.data.catalogue import NAMES, SINGLE_NAMES, ImageShape, image_shape, load
from infocapsgan.data.dataset import Dataset
from infocapsgan.data.files import DataError

__all__ = ["NAMES", "SINGLE_NAMES", "DataError", "Dataset", "ImageShape", "image_shape", "load"]

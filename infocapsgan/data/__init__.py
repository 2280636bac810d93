"""Image sets, each as a few uint8 tensors: `load("mnist")`. To add one: a file here that registers it."""

import importlib
import pkgutil

from infocapsgan.data.dataset import Dataset
from infocapsgan.data.files import DataError
from infocapsgan.data.registry import ImageShape, image_shape, load, names

__all__ = ["NAMES", "SINGLE_NAMES", "DataError", "Dataset", "ImageShape", "image_shape", "load"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

NAMES = names()
SINGLE_NAMES = names(labels=1)  # of those whose images have one label each

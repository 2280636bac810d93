"""The published systems. Every module here is imported, and the systems in it register themselves."""

import importlib
import pkgutil

from infocapsgan.systems.capsnet import CapsNet
from infocapsgan.systems.capsulegan import CapsuleGAN
from infocapsgan.systems.dcgan import DCGAN
from infocapsgan.systems.encoder import Encoder
from infocapsgan.systems.infocapsgan import InfoCapsGAN
from infocapsgan.systems.infogan import InfoGAN
from infocapsgan.systems.mimic import Mimic
from infocapsgan.systems.system import ABILITIES, SYSTEMS, NotApplicableError, System

__all__ = [
    "ABILITIES",
    "DCGAN",
    "SYSTEMS",
    "CapsNet",
    "CapsuleGAN",
    "Encoder",
    "InfoCapsGAN",
    "InfoGAN",
    "Mimic",
    "NotApplicableError",
    "System",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

"""The published systems. Every module here is imported, and the systems in it register themselves."""

import importlib
import pkgutil

from infocapsgan.systems.capsnet import CapsNet as CapsNet
from infocapsgan.systems.capsulegan import CapsuleGAN as CapsuleGAN
from infocapsgan.systems.dcgan import DCGAN as DCGAN
from infocapsgan.systems.encoder import Encoder as Encoder
from infocapsgan.systems.infocapsgan import InfoCapsGAN as InfoCapsGAN
from infocapsgan.systems.infogan import InfoGAN as InfoGAN
from infocapsgan.systems.mimic import Mimic as Mimic
from infocapsgan.systems.system import ABILITIES as ABILITIES
from infocapsgan.systems.system import SYSTEMS as SYSTEMS
from infocapsgan.systems.system import NotApplicableError as NotApplicableError
from infocapsgan.systems.system import System as System

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

"""The published systems, by the names of the command line."""

from infocapsgan.systems.capsnet import CapsNet
from infocapsgan.systems.capsulegan import CapsuleGAN
from infocapsgan.systems.dcgan import DCGAN
from infocapsgan.systems.encoder import Encoder
from infocapsgan.systems.infocapsgan import InfoCapsGAN
from infocapsgan.systems.infogan import InfoGAN
from infocapsgan.systems.mimic import Mimic
from infocapsgan.systems.system import System

SYSTEMS: dict[str, type[System]] = {
    "infocapsgan": InfoCapsGAN,
    "mimic": Mimic,
    "capsulegan": CapsuleGAN,
    "infogan": InfoGAN,
    "dcgan": DCGAN,
    "capsnet": CapsNet,
    "encoder": Encoder,
}

__all__ = [
    "DCGAN",
    "SYSTEMS",
    "CapsNet",
    "CapsuleGAN",
    "Encoder",
    "InfoCapsGAN",
    "InfoGAN",
    "Mimic",
    "System",
]

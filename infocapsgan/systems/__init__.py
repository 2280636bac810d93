"""The published systems, by the names of the command line."""

from infocapsgan.systems.capsnet import CapsNet
from infocapsgan.systems.encoder import Encoder
from infocapsgan.systems.infocapsgan import InfoCapsGAN
from infocapsgan.systems.system import System

SYSTEMS: dict[str, type[System]] = {"infocapsgan": InfoCapsGAN, "capsnet": CapsNet, "encoder": Encoder}

__all__ = ["SYSTEMS", "CapsNet", "Encoder", "InfoCapsGAN", "System"]

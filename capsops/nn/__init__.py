"""Capsule layers as ordinary torch modules."""

from capsops.nn.primary_capsules import PrimaryCapsules
from capsops.nn.routing_capsules import RoutingCapsules
from capsops.nn.squash import Squash

__all__ = ["PrimaryCapsules", "RoutingCapsules", "Squash"]

"""Capsule layers as ordinary torch modules."""

from capsops.nn.conv_routing_capsules import ConvRoutingCapsules
from capsops.nn.primary_capsules import PrimaryCapsules
from capsops.nn.routing_capsules import RoutingCapsules
from capsops.nn.squash import Squash

__all__ = ["ConvRoutingCapsules", "PrimaryCapsules", "RoutingCapsules", "Squash"]

"""All peers."""

from tests.peers import (
    adambielski,
    capsule_layer,
    danielhavir,
    ethanleet,
    infocapsgan,
    minglin_chen,
    point_capsules,
    readable_capsnet,
    segcaps,
    xifeng_guo,
)

PEERS = [
    xifeng_guo.DENSE_CAPSULE,
    danielhavir.ROUTING_CAPSULES,
    readable_capsnet.CAPSULE_LAYER_WITH_ROUTING,
    ethanleet.CLASS_CAPSULES,
    adambielski.CAPS_LAYER,
    capsule_layer.CAPSULE_LINEAR,
    capsule_layer.CAPSULE_LINEAR_SHARED,
    infocapsgan.ROUTING_CAPSULES,
    infocapsgan.REAL_OR_FAKE,
    infocapsgan.GEN_CAPSULES,
    point_capsules.LATENT_CAPS_LAYER,
    segcaps.CONV_CAPSULE_LAYER,
    segcaps.ROUTING_ONLY,
    minglin_chen.CAPS_CONV_2D,
    minglin_chen.ONE_POSITION,
]

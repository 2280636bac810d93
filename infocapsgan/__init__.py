"""Capsule GANs, InfoGAN and capsule classifiers on capsops: each a published system, trained by one loop."""

"""Measurements that need a GPU: each a module, and a script that builds, runs and leaves its results."""

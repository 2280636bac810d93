"""Benchmarks of capsops against plain PyTorch: cases, peers, timing, memory, and the report."""

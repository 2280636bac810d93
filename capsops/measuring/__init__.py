"""What `python -m capsops check` and `bench` share: cases, comparison, timing, ceilings, plain PyTorch."""

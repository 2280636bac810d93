"""The parts that systems are put together from."""

import torch

from infocapsgan.engine.rng import ShardedGenerator


def test_processes_share_one_batch():
    whole, parts = ShardedGenerator(3), [ShardedGenerator(3, rank=rank, world=2) for rank in range(2)]
    for method, arguments in (("normal", (5,)), ("uniform", ()), ("integers", ())):
        before = (10,) if method == "integers" else ()
        together = torch.cat([getattr(part, method)(*before, 4, *arguments) for part in parts])
        assert torch.equal(together, getattr(whole, method)(*before, 8, *arguments))

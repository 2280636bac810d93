"""A recommender with several interests for each user, by routing by agreement.

Li et al. 2019, "Multi-Interest Network with Dynamic Routing for Recommendation at Tmall" (MIND). The items a
user has looked at are input capsules. A shared matrix S turns each item into one prediction, used for all
interests. Only the random starting logits tell the interests apart. Sequences have different lengths, so a
mask says which items are present, and a user with few items has fewer interests: K = max(1, min(4, log₂ n));
logits of −inf close the others. As in the authors' code, the couplings carry no gradient.

The data are made here: users with several tastes, each a cluster of items. The example trains MIND and, with
the same parameters, mean pooling, which has one vector for each user, and prints how often the user's next
item is among the 20 top-scoring items.

    python examples/recommender.py
"""

import argparse

import torch
import torch.nn.functional as F
from side_by_side import side_by_side
from torch import Tensor, nn

import capsops

ITEMS, CLUSTERS, TASTES, LONGEST, TOP = 1000, 100, 4, 50, 20
LENGTH, INTERESTS = 16, 4  # of an embedding; of a user at most


def users(n: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Items [n, LONGEST], a mask of those that are present, and the next item of each user [n]."""
    tastes = torch.randint(CLUSTERS, (n, TASTES), generator=rng)
    chosen = torch.randint(TASTES, (n, LONGEST + 1), generator=rng)
    size = ITEMS // CLUSTERS
    items = tastes.gather(1, chosen) * size + torch.randint(size, chosen.shape, generator=rng)
    noise = torch.rand(chosen.shape, generator=rng) < 0.1
    noise[:, -1] = False
    items = torch.where(noise, torch.randint(ITEMS, chosen.shape, generator=rng), items)
    lengths = torch.randint(4, LONGEST + 1, (n, 1), generator=rng)
    return items[:, :-1], torch.arange(LONGEST) < lengths, items[:, -1]


def plain_routing(u_hat: Tensor, logits: Tensor, mask: Tensor, iterations: int = 3) -> Tensor:
    """What capsops.dynamic_routing replaces: a prediction, a logit and a coupling for every pair."""
    u_hat = u_hat.unsqueeze(2).repeat(1, 1, logits.shape[-1], 1)  # [B, I, K, D]
    u_hat = u_hat * mask[:, :, None, None]
    logits = logits.expand(u_hat.shape[:3])
    for t in range(iterations):
        c, last = logits.softmax(-1).unsqueeze(-1), t == iterations - 1
        s = (c * (u_hat if last else u_hat.detach())).sum(1)
        square = s.square().sum(-1, keepdim=True)
        v = s * square.clamp_min(1e-30).sqrt() / (1 + square)
        if not last:
            logits = logits + (u_hat.detach() * v.unsqueeze(1)).sum(-1)
    return v


class Recommender(nn.Module):
    """Interests [B, K, D] of users; their product with an item's embedding is how well it fits."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, LENGTH)
        self.S = nn.Parameter(torch.randn(LENGTH, LENGTH) / LENGTH**0.5)
        self.output = nn.Linear(LENGTH, LENGTH)
        self.register_buffer("start", torch.randn(LONGEST, INTERESTS))

    def start_logits(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Starting logits [B, I, K], and which interests a user has [B, K]."""
        wanted = mask.sum(1).clamp(min=1).log2().long().clamp(1, INTERESTS)
        has = torch.arange(INTERESTS) < wanted[:, None]
        return torch.where(has[:, None], self.start, -torch.inf), has

    def forward(self, items: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        logits, has = self.start_logits(mask)
        u_hat = self.items(items) @ self.S
        v = capsops.dynamic_routing(u_hat, logits=logits, mask=mask, detach=True)
        return self.output(v), has


class MeanPooling(Recommender):
    """One vector for each user: the mean of the items."""

    def forward(self, items: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        u = (self.items(items) * mask[..., None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None]
        return self.output(capsops.squash(u @ self.S)), torch.ones(len(u), 1, dtype=torch.bool)


def loss(model: Recommender, items: Tensor, mask: Tensor, following: Tensor, rng: torch.Generator) -> Tensor:
    """Sampled softmax: the next item against others, for the interest that fits it best.

    That is label-aware attention whose power is infinite.
    """
    interests, has = model(items, mask)
    target = model.items(following)
    fit = (interests @ target[..., None]).squeeze(-1).masked_fill(~has, -torch.inf)
    user = interests[torch.arange(len(items)), fit.argmax(1)]
    others = torch.randint(ITEMS, (500,), generator=rng)
    wrong = (user @ model.items(others).T).masked_fill(others == following[:, None], -torch.inf)
    scores = torch.cat([(user * target).sum(1, keepdim=True), wrong], 1)
    return F.cross_entropy(scores, torch.zeros(len(items), dtype=torch.long))


@torch.no_grad()
def hit_rate(model: Recommender, items: Tensor, mask: Tensor, following: Tensor) -> float:
    """How often the next item is among the top-scoring ones; the best-fitting interest scores an item."""
    interests, has = model(items, mask)
    scores = (interests @ model.items.weight.T).masked_fill(~has[..., None], -torch.inf).amax(1)
    return (scores.topk(TOP, 1).indices == following[:, None]).any(1).float().mean().item()


def train(kind: type[Recommender], steps: int, batch: int = 256) -> float:
    """The hit rate on users that were not trained on."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(1)
    model = kind()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, *users(batch, rng), rng).backward()
        optimizer.step()
    return hit_rate(model, *users(2000, torch.Generator().manual_seed(2)))


def compare() -> str:
    """capsops beside the plain routing, forward and backward, on one batch."""
    torch.manual_seed(0)
    model = Recommender()
    items, mask, _ = users(256, torch.Generator().manual_seed(3))
    u_hat, (logits, _) = model.items(items).detach().requires_grad_(), model.start_logits(mask)
    open_logits = torch.where(logits.isinf(), -1e9, logits)
    forms = (
        lambda: capsops.dynamic_routing(u_hat, logits=logits, mask=mask, detach=True).sum().backward(),
        lambda: plain_routing(u_hat, open_logits, mask).sum().backward(),
    )
    return side_by_side(*forms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    for name, kind in (("mean pooling", MeanPooling), ("interests by routing", Recommender)):
        print(f"{name}, hit rate@{TOP}: {train(kind, steps):.1%}")
    print(f"routing, forward and backward: {compare()}")


if __name__ == "__main__":
    main()

"""Losses, each a function of what its formula names."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from infocapsgan.engine.rng import ShardedGenerator

Function = Callable[[Tensor], Tensor]


def margin_loss(
    lengths: Tensor, target: Tensor, *, upper: float = 0.9, lower: float = 0.1, absent: float = 0.5
) -> Tensor:
    """Margin loss of each sample, summed over the classes: [B].

    L_j = T_j · max(0, upper − ‖v_j‖)² + absent · (1 − T_j) · max(0, ‖v_j‖ − lower)²
    (Sabour, Frosst, Hinton 2017, equation 4).

    Args:
        lengths: ‖v_j‖ of the class capsules [B, J].
        target: T, one-hot or with several ones [B, J], or the index of each sample's class, integers [B].

    Raises:
        ValueError: the target has another shape or type, or an index is not one of the J classes.
    """
    B, J = lengths.shape
    if target.shape == (B,) and target.dtype != torch.bool and not target.is_floating_point():
        try:
            target = F.one_hot(target.long(), J)
        except RuntimeError as error:  # on a GPU the kernel itself stops at such an index
            raise ValueError(f"target: got {target.tolist()}, takes classes from 0 to {J - 1}") from error
    elif target.shape != (B, J):
        takes = f"takes classes as integers [{B}], or a number for each class [{B}, {J}]"
        raise ValueError(f"target: got {target.dtype} of shape {list(target.shape)}, {takes}")
    target = target.to(lengths.dtype)
    present = target * F.relu(upper - lengths).square()
    return (present + absent * (1 - target) * F.relu(lengths - lower).square()).sum(dim=1)


def discriminator_loss(real: Tensor, generated: Tensor, kind: str = "logistic") -> Tensor:
    """What a discriminator lowers, of its logits [B] on real and on generated images.

    "logistic": −mean[log D(x) + log(1 − D(G))], D = sigmoid(logit) (Goodfellow et al. 2014);
    "hinge": mean[max(0, 1 − x) + max(0, 1 + g)] (Miyato et al. 2018);
    "wasserstein": mean[g − x], to be used with a gradient penalty (Arjovsky et al. 2017).
    """
    if kind == "logistic":
        return F.softplus(-real).mean() + F.softplus(generated).mean()
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + generated).mean()
    if kind == "wasserstein":
        return generated.mean() - real.mean()
    raise ValueError(f"kind: got {kind!r}, takes logistic, hinge or wasserstein")


def generator_loss(generated: Tensor, kind: str = "logistic") -> Tensor:
    """What a generator lowers, of the discriminator's logits [B] on its images.

    "logistic": −mean log D(G), the non-saturating form; "hinge" and "wasserstein": −mean g.
    """
    if kind == "logistic":
        return F.softplus(-generated).mean()
    if kind in ("hinge", "wasserstein"):
        return -generated.mean()
    raise ValueError(f"kind: got {kind!r}, takes logistic, hinge or wasserstein")


def gradient_penalty(logits: Function, real: Tensor, generated: Tensor, rng: ShardedGenerator) -> Tensor:
    """mean (‖∂D/∂x‖ − 1)² at random points x between real and generated images (Gulrajani et al. 2017).

    Args:
        logits: D, images → logits [B]; differentiable twice.
        real, generated: images [B, C, H, W].
        rng: where the points come from.
    """
    place = rng.uniform(len(real), 1, 1, 1)
    between = (place * real + (1 - place) * generated).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(logits(between).sum(), between, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def entropy(p: Tensor) -> Tensor:
    """−Σ p log p over the last axis, in nats; 0 log 0 is 0."""
    return torch.special.entr(p).sum(dim=-1)


def divergence(p: Tensor, log_q: Tensor) -> Tensor:
    """Kullback–Leibler divergence KL(p ‖ q) over the last axis, averaged over the batch, in nats."""
    return (torch.special.xlogy(p, p) - p * log_q).sum(dim=-1).mean()


def mutual_information(p: Tensor, *, balance: float = 1.0, mean: Function = lambda p: p) -> Tensor:
    """balance · H(Y) − H(Y|X) of predictions p [B, J], in nats; with balance 1 it is I(X; Y).

    H(Y) is the entropy of the mean prediction: large where the classes are used evenly. H(Y|X) is the mean
    entropy of a prediction: small where each is certain (Hu et al. 2017, IMSAT, equation 7). Where several
    processes share a batch, `mean` averages over them.
    """
    return balance * entropy(mean(p.mean(dim=0))) - entropy(p).mean()


def adversarial_smoothness(
    log_prediction: Function, images: Tensor, p: Tensor, rng: ShardedGenerator, *, radius: float
) -> Tensor:
    """How far predictions change under the worst small change of the image: virtual adversarial training.

    KL(p ‖ q(x + r)) with r of length `radius` along the gradient of KL(p ‖ q(x + d)) at a random d of length
    1 (Miyato et al. 2018, one power iteration).

    Args:
        log_prediction: images → log-probabilities [B, J].
        images: [B, C, H, W].
        p: predictions for the images themselves [B, J], taken as constant.
        rng: where d comes from.
        radius: length of the change, in units of pixel values.
    """
    direction = _unit(rng.normal(*images.shape)).requires_grad_()
    change = divergence(p.detach(), log_prediction(images + direction))
    (gradient,) = torch.autograd.grad(change, direction)
    return divergence(p.detach(), log_prediction(images + radius * _unit(gradient)))


def mode_seeking(images: Tensor, latents: Tensor, *, mean: Function = lambda x: x) -> Tensor:
    """1 / (mean |x_a − x_b| / mean |z_a − z_b| + 10⁻⁵): large where other noise makes the same image.

    a and b are neighbours in the batch: images 0 and 1, 2 and 3 and so on (Mao et al. 2019, Mode seeking
    generative adversarial networks, equation 4; the reciprocal as in its section 3.2).

    Args:
        images: generated images [B, C, H, W], B > 1, neighbours of one class.
        latents: what they were generated from [B, N].
        mean: averages over the processes that share a batch.
    """
    x, z = (mean((both[1::2] - both[: len(both) - 1 : 2]).abs().mean()) for both in (images, latents))
    return 1 / (x / z + 1e-5)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.flatten(1), dim=1).view_as(x)

"""The Fréchet distance between real and generated images, in the features of both."""

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Fréchet distance between the normal distributions fitted to two sets of features.

    ‖m_r − m_g‖² + tr(S_r + S_g − 2 (S_r S_g)^½) with the means m and covariances S of the features of real
    images [N, F] and of generated ones [M, F] (Heusel et al. 2017).
    """
    computed = nn.Identity()  # in Inception's place: the features are computed already
    computed.num_features = real.shape[1]  # type: ignore[assignment]
    distance = FrechetInceptionDistance(computed).to(real.device).set_dtype(torch.float64)
    distance.update(real.double(), real=True)
    distance.update(generated.double(), real=False)
    return distance.compute().item()

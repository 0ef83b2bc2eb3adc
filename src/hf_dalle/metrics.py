"""Figures of merit as pure functions: PSNR, bits a dimension, use of codes, ranks of concepts, a probe, intervals.

Tensors in, numbers out. The network whose features are ranked lives in `training/judge.py`.
"""

import math
import statistics

import numpy as np
import torch


CONFIDENCE = 0.95  # of all intervals


def psnr(pixel_values: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB, one a picture, at most 100; both B x 3 x H x W in [0, 1]."""
    squared_error = (reconstructions - pixel_values).square().flatten(1).mean(1)
    return -10 * squared_error.clamp(min=1e-10).log10()


def perplexity(counts: torch.Tensor) -> float:
    """exp of the entropy of the codes' frequencies: how many of the codes are in use, in effect; 0 without counts."""
    if not counts.sum():
        return 0.0
    return torch.special.entr(counts / counts.sum()).sum().exp().item()


def codes_used(counts: torch.Tensor) -> float:
    """The share of the codes that occur at all, in [0, 1]."""
    return (counts > 0).float().mean().item()


def bits_per_dim(nats: float, num_dims: int) -> float:
    """Nats of a whole picture in bits a dimension; a picture of H x W has `num_dims` = 3 H W."""
    return nats / (num_dims * math.log(2))


def pixel_bits_per_dim(nll: float, num_dims: int, eps: float = 0.1) -> float:
    """
    The dVAE's -ln p(x | z) in bits a dimension, of pixels x in 0 ... 255.

    The paper's likelihood is a density f of mapped pixels, phi(x) = (1 - 2 eps) / 255 x + eps, so that of x itself is
    `ln f(phi(x)) + ln((1 - 2 eps) / 255)` a channel. As a density, and of pixels that are whole numbers, it is no
    length of a code: it falls below zero where the decoder is sure of flat colours.

    Args:
        nll (`float`): the sum of -ln f(phi(x)) over the picture, in nats, as [`dvae_loss`] gives it.
        num_dims (`int`): 3 H W.
        eps (`float`): of the pixel map.
    """
    return bits_per_dim(nll, num_dims) - math.log2((1 - 2 * eps) / 255)


def group_means(values: torch.Tensor, groups: torch.Tensor, num_groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The mean of each group's rows.

    Args:
        values (`torch.Tensor`): N x D.
        groups (`torch.LongTensor`): N, each in [0, num_groups).
        num_groups (`int`): G.

    Returns:
        `tuple`: means, G x D (zeros where a group is empty), and sizes, G.
    """
    sums = values.new_zeros(num_groups, values.shape[1]).index_add_(0, groups, values)
    sizes = torch.bincount(groups, minlength=num_groups)
    return sums / sizes.clamp(min=1)[:, None], sizes


def rank_concepts(
    features: torch.Tensor,
    concepts: torch.Tensor,
    references: torch.Tensor,
    reference_concepts: torch.Tensor,
    num_concepts: int,
    own: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Ranks each picture's concept among all by the cosine to each concept's prototype, the mean of its references.

    Args:
        features (`torch.Tensor`): B x D, of the pictures that are judged.
        concepts (`torch.LongTensor`): B, the concepts that they should show.
        references (`torch.Tensor`): R x D.
        reference_concepts (`torch.LongTensor`): R.
        num_concepts (`int`): C; a concept without references takes no part.
        own (`torch.LongTensor`, *optional*):
            B, the reference that shows what the judged picture should show, or -1 for none. It is left out of the
            prototype that the picture is compared with.

    Returns:
        `torch.LongTensor`: B ranks from 1; an equally near concept counts as nearer.

    Raises:
        ValueError: if a picture's concept has no reference but its own.
    """
    prototypes, sizes = group_means(references, reference_concepts, num_concepts)
    own = torch.full_like(concepts, -1) if own is None else own
    has_own, num_others = own >= 0, sizes[concepts] - (own >= 0).long()
    if (num_others < 1).any():
        rows = torch.nonzero(num_others < 1).flatten().tolist()
        raise ValueError(f"{len(rows)} pictures cannot be ranked: their concepts have no reference. Rows {rows[:5]}.")
    right = prototypes[concepts] * sizes[concepts, None] - references[own] * has_own[:, None]
    features = torch.nn.functional.normalize(features, dim=1)
    right = (features * torch.nn.functional.normalize(right, dim=1)).sum(1, keepdim=True)
    cosines = features @ torch.nn.functional.normalize(prototypes, dim=1).T
    is_rival = (sizes > 0) & (torch.arange(num_concepts) != concepts[:, None])
    return 1 + ((cosines >= right) & is_rival).sum(1)


def fit_ridge_probe(
    features: torch.Tensor, labels: torch.Tensor, num_classes: int, penalty: float = 0.1
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Linear regression on one-hot labels with an L2 penalty, in closed form; the largest output is the probe's answer.

    Args:
        features (`torch.Tensor`): N x D, standardised.
        labels (`torch.LongTensor`): N.
        num_classes (`int`): C.
        penalty (`float`): a row; the weight of the squared norm is `penalty * N`. The bias has none.

    Returns:
        `tuple`: weight, D x C, and bias, C.
    """
    targets = torch.nn.functional.one_hot(labels, num_classes).to(features)
    centre, shares = features.mean(0), targets.mean(0)
    centred = features - centre
    gram = centred.T @ centred + penalty * len(features) * torch.eye(features.shape[1]).to(features)
    weight = torch.linalg.solve(gram, centred.T @ (targets - shares))
    return weight, shares - centre @ weight


def bootstrap(values: torch.Tensor, seed: int = 0, num_resamples: int = 1000) -> dict[str, float]:
    """
    The mean with its percentile interval, by resampling the values.

    Args:
        values (`torch.Tensor`): N, one a picture.
        seed (`int`): of the resampling.
        num_resamples (`int`): how many sets of N are drawn.

    Returns:
        `dict`: `value`, `low` and `high`.

    Raises:
        ValueError: if there are no values.
    """
    if not len(values):
        raise ValueError("There are no values to take the mean of.")
    array = values.double().cpu().numpy()
    rows = np.random.default_rng(seed).integers(len(array), size=(num_resamples, len(array)))
    low, high = np.quantile(array[rows].mean(1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {"value": float(array.mean()), "low": float(low), "high": float(high)}


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """
    Wilson's interval of a share: all p whose score test, |count / total - p| / sqrt(p (1 - p) / total), does not reach
    the normal quantile. Stays inside [0, 1], and is no single point for none or all.

    Args:
        count (`int`): of those that are so.
        total (`int`): of all, from 1.
    """
    z = statistics.NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    share, spread = count / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return (0.0 if count == 0 else middle - half), (1.0 if count == total else middle + half)  # exact at the ends

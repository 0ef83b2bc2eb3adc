"""How far a set of drawn pictures is from a set of real ones, by their features: the maths, in float64.

Fréchet distance, Inception Score, unbiased kernel distance, k-nearest-neighbour precision and recall, nearest
neighbours by cosine. Features in, numbers out; which network gives them is said in `training/evaluation`.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F


BLOCK_ROWS = 1024  # of a table of all pairs, that many rows are held at a time


def frechet_distance(features: torch.Tensor, others: torch.Tensor) -> float:
    """
    The squared Fréchet distance between the Gaussians with the two sets' means and (unbiased) covariances,
    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)): what FID is, of Inception features (Heusel et al., 2017).

    The trace of the root comes from a symmetric matrix, or of few rows from the singular values of their products;
    neither asks the covariances to be regular. The estimate is too large by a term in 1 / N
    ([`extrapolate_to_infinity`]), and below D + 1 rows by far.

    Args:
        features (`torch.Tensor`): N x D, N from 2.
        others (`torch.Tensor`): M x D, M from 2.

    Raises:
        ValueError: for fewer than two rows, other sizes, or values that are not finite.
    """
    features, others = _check_pair(features, others, min_rows=2)
    means = features.mean(0), others.mean(0)
    # N x D, such that S = X^T X
    features = (features - means[0]) / (len(features) - 1) ** 0.5
    others = (others - means[1]) / (len(others) - 1) ** 0.5
    if min(len(features), len(others)) <= features.shape[1]:
        root = torch.linalg.svdvals(features @ others.T).sum()
    else:
        root = _trace_of_root(features.T @ features, others.T @ others)
    spread = features.square().sum() + others.square().sum() - 2 * root
    return ((means[0] - means[1]).square().sum() + spread.clamp(min=0)).item()


def _trace_of_root(covariance: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """tr (S1 S2)^(1/2) by the eigenvalues of L^T S2 L, which are those of S1 S2 where S1 = L L^T."""
    factor, is_singular = torch.linalg.cholesky_ex(covariance)
    if is_singular:
        values, vectors = torch.linalg.eigh(covariance)
        factor = vectors * values.clamp(min=0).sqrt()
    return torch.linalg.eigvalsh(factor.T @ other @ factor).clamp(min=0).sqrt().sum()


def extrapolate_to_infinity(sizes: list[int], values: list[float]) -> tuple[float, float]:
    """
    The least-squares line through a figure at several sample sizes against 1 / N (Chong and Forsyth, 2020).

    Returns:
        `tuple`: the line at 1 / N = 0, and its slope.

    Raises:
        ValueError: if there are fewer than two different sizes.
    """
    if len(set(sizes)) < 2 or len(sizes) != len(values):
        raise ValueError(f"{len(values)} values at the sizes {sizes}: a line needs two different sizes.")
    inverse = 1 / torch.tensor(sizes, dtype=torch.float64)
    heights = torch.tensor(values, dtype=torch.float64)
    centred = inverse - inverse.mean()
    slope = (centred * heights).sum() / centred.square().sum()
    return (heights.mean() - slope * inverse.mean()).item(), slope.item()


def inception_score(logits: torch.Tensor, num_splits: int = 10) -> float:
    """
    exp E KL(p(class | picture) || p(class)), of each of `num_splits` parts of the rows in their order, and the mean.

    Args:
        logits (`torch.Tensor`): N x C, N from `num_splits`.
        num_splits (`int`): 10 as in Salimans et al., 2016; a part has at most C and at most N / num_splits.

    Raises:
        ValueError: for fewer rows than parts.
    """
    if not 1 <= num_splits <= len(logits):
        raise ValueError(f"{len(logits)} pictures cannot be split into {num_splits} parts.")
    scores = []
    for part in F.softmax(logits.double(), dim=1).tensor_split(num_splits):
        entropy = torch.special.entr(part).sum(1).mean()
        scores.append((torch.special.entr(part.mean(0)).sum() - entropy).exp())
    return torch.stack(scores).mean().item()


def kernel_distance(
    features: torch.Tensor,
    others: torch.Tensor,
    weights: torch.Tensor | None = None,
    other_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The unbiased squared maximum mean discrepancy under the kernel (x . y / D + 1)^3, what KID is of Inception features
    (Binkowski et al., 2018), for many weightings of the rows in one pass. It may fall below zero.

    Args:
        features (`torch.Tensor`): N x D.
        others (`torch.Tensor`): M x D.
        weights (`torch.Tensor`, *optional*): B x N, how often each row counts; none: once each, B = 1. A row is never
            paired with itself, however often it counts, so that a resample with repeated rows stays unbiased.
        other_weights (`torch.Tensor`, *optional*): B x M.

    Returns:
        `torch.Tensor`: B.

    Raises:
        ValueError: if a weighting counts fewer than two rows of a set.
    """
    features, others = _check_pair(features, others, min_rows=2)
    weights = features.new_ones(1, len(features)) if weights is None else weights.to(features)
    other_weights = others.new_ones(1, len(others)) if other_weights is None else other_weights.to(others)
    if min((weights > 0).sum(1).min(), (other_weights > 0).sum(1).min()) < 2:
        raise ValueError("A weighting counts fewer than two different pictures of a set: nothing can be compared.")
    value = _mean_within(features, weights) + _mean_within(others, other_weights)
    between = value.new_zeros(len(weights))
    for rows, table in _pair_blocks(features, others):
        between += ((weights[:, rows] @ _cubic_kernel(table, features.shape[1])) * other_weights).sum(1)
    return value - 2 * between / (weights.sum(1) * other_weights.sum(1))


def _mean_within(features: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """B: the kernel's weighted mean over pairs of different rows of one set."""
    total = weights.new_zeros(len(weights))
    for rows, table in _pair_blocks(features, features):
        kernel = _cubic_kernel(table, features.shape[1])
        _own_columns(kernel, rows).zero_()
        total += ((weights[:, rows] @ kernel) * weights).sum(1)
    return total / (weights.sum(1).square() - weights.square().sum(1))


def _cubic_kernel(products: torch.Tensor, num_features: int) -> torch.Tensor:
    return (products / num_features + 1) ** 3


def precision_recall(real: torch.Tensor, drawn: torch.Tensor, num_neighbours: int = 3) -> tuple[torch.Tensor, ...]:
    """
    Of each drawn picture whether it lies within the real ones' manifold (their mean is precision), and of each real
    one whether it lies within that of the drawn ones (recall): Kynkäänniemi et al., 2019.

    A set's manifold is the union of balls around its rows, each as far as the row's k-th nearest other row.

    Args:
        real (`torch.Tensor`): N x D, N above `num_neighbours`.
        drawn (`torch.Tensor`): M x D, M above `num_neighbours`.
        num_neighbours (`int`): k.

    Returns:
        `tuple`: M booleans, and N booleans.

    Raises:
        ValueError: for sets of no more than k rows.
    """
    if num_neighbours < 1:
        raise ValueError(f"`num_neighbours` is {num_neighbours}; expected a number from 1.")
    real, drawn = _check_pair(real, drawn, min_rows=num_neighbours + 1)
    return _is_within(real, drawn, num_neighbours), _is_within(drawn, real, num_neighbours)


def _is_within(centres: torch.Tensor, others: torch.Tensor, num_neighbours: int) -> torch.Tensor:
    """Booleans: whether each of `others` is in a ball of `centres`; rounding does not put a row outside its equal."""
    is_in = torch.zeros(len(others), dtype=torch.bool, device=others.device)
    radii = []
    for rows, table in _pair_blocks(centres, centres):
        distances = _squared_distances(table, centres[rows], centres)
        _own_columns(distances, rows).fill_(torch.inf)
        radii.append(distances.kthvalue(num_neighbours, dim=1).values)
    radii = torch.cat(radii)
    scale = 1e-12 * max(centres.square().sum(1).max().item(), others.square().sum(1).max().item())
    for rows, table in _pair_blocks(centres, others):
        distances = _squared_distances(table, centres[rows], others)
        is_in |= (distances <= radii[rows, None] + scale).any(0)
    return is_in


def _squared_distances(products: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    squares = rows.square().sum(1)[:, None] + columns.square().sum(1)[None, :]
    return (squares - 2 * products).clamp(min=0)


def find_nearest(
    queries: torch.Tensor, references: torch.Tensor, first_reference: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Each query's most similar reference by cosine, exactly; of equally similar ones the first.

    Args:
        queries (`torch.Tensor`): N x D, of length 1 each.
        references (`torch.Tensor`): R x D, of length 1 each, R from 1.
        first_reference (`int`): the number of the first reference, where these are a part of all.

    Returns:
        `tuple`: N similarities, and N numbers of references.
    """
    nearest = [table.max(1) for _, table in _pair_blocks(queries, references)]
    similarities = torch.cat([part.values for part in nearest])
    return similarities, torch.cat([part.indices for part in nearest]) + first_reference


def _pair_blocks(features: torch.Tensor, others: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """The products of all pairs of rows, `BLOCK_ROWS` rows of the first set at a time."""
    for first in range(0, len(features), BLOCK_ROWS):
        rows = slice(first, min(first + BLOCK_ROWS, len(features)))
        yield rows, features[rows] @ others.T


def _own_columns(table: torch.Tensor, rows: slice) -> torch.Tensor:
    """The view of a block of a set's table with itself in which a row meets itself."""
    return table[:, rows].diagonal()


def _check_pair(features: torch.Tensor, others: torch.Tensor, min_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    if features.ndim != 2 or others.ndim != 2 or features.shape[1] != others.shape[1]:
        raise ValueError(f"Features are {tuple(features.shape)} and {tuple(others.shape)}; expected N x D and M x D.")
    if min(len(features), len(others)) < min_rows:
        raise ValueError(f"There are {len(features)} and {len(others)} pictures; expected at least {min_rows} each.")
    if not (features.isfinite().all() and others.isfinite().all()):
        raise ValueError("Features are not finite: the network does not fit these pictures.")
    return features.double(), others.double()

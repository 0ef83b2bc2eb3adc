"""Figures of two sets of features, with intervals: Fréchet and kernel distance, Inception Score, precision and recall.

Point figures of the distances and the score are torchmetrics'; precision, recall and all intervals are
`hf_dalle.distribution_metrics`'. Nothing here knows of pictures, models or processes.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from hf_dalle.distribution_metrics import frechet_distance, inception_score, kernel_distance, precision_recall


FIGURES = ("fd", "kd", "is", "precision", "recall")
OF_FIGURE = ("value", "low", "high", "bias", "std")  # std: over torchmetrics' subsets (kd) or parts (is)
CONFIDENCE = 0.95


@dataclass
class FigureSettings:
    """How figures of features are computed."""

    num_neighbours: int = field(default=3, metadata={"help": "Of precision and recall."})
    num_splits: int = field(default=10, metadata={"help": "Parts of the pictures that IS is the mean over."})
    num_subsets: int = field(default=100, metadata={"help": "Random ones, that KD is the mean over."})
    subset_size: int = field(default=1000, metadata={"help": "Pictures in one of them, at most."})
    num_resamples: int = field(default=50, metadata={"help": "For intervals; 0: none."})

    def __post_init__(self):
        for name, lowest in (("num_neighbours", 1), ("num_splits", 1), ("num_subsets", 1), ("subset_size", 2)):
            if getattr(self, name) < lowest:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected a number from {lowest}.")
        if self.num_resamples < 0 or self.num_resamples == 1:
            raise ValueError(f"`num_resamples` is {self.num_resamples}; expected 0, or a number from 2.")


def measure_distances(
    real: np.ndarray, drawn: np.ndarray, settings: FigureSettings, generator: torch.Generator
) -> np.ndarray:
    """FD, KD, precision and recall, each as `OF_FIGURE`."""
    real, drawn = torch.from_numpy(real).double(), torch.from_numpy(drawn).double()
    picks = [
        (
            torch.randint(len(real), (len(real),), generator=generator),
            torch.randint(len(drawn), (len(drawn),), generator=generator),
        )
        for _ in range(settings.num_resamples)
    ]
    fd = torchmetrics_fd(real, drawn)
    fds = [frechet_distance(real[rows], drawn[others]) for rows, others in picks]
    kd, kd_std = torchmetrics_kd(real, drawn, settings, generator)
    kds = []
    if picks:
        weights = [
            torch.stack([pick[side].bincount(minlength=len(part)) for pick in picks])
            for side, part in enumerate((real, drawn))
        ]
        kds = kernel_distance(real, drawn, *weights).tolist()
    is_in, is_covered = precision_recall(real, drawn, settings.num_neighbours)
    shares = []
    for side, values in ((1, is_in), (0, is_covered)):
        values = values.double()
        resamples = [values[pick[side]].mean().item() for pick in picks]
        shares.append(find_interval(values.mean().item(), resamples, is_biased=False))
    return np.array([find_interval(fd, fds), find_interval(kd, kds, kd_std), *shares])


def measure_classes(logits: np.ndarray, settings: FigureSettings, generator: torch.Generator) -> np.ndarray:
    """IS as `OF_FIGURE`."""
    logits = torch.from_numpy(logits).double()
    value, std = torchmetrics_is(logits, settings, generator)
    resamples = []
    for _ in range(settings.num_resamples):
        rows = torch.randint(len(logits), (len(logits),), generator=generator)
        resamples.append(inception_score(logits[rows], settings.num_splits))
    return np.array(find_interval(value, resamples, std))


def find_interval(
    value: float, resamples: list[float], std: float = float("nan"), is_biased: bool = True
) -> list[float]:
    """
    A figure with its interval: the resamples' quantiles, of a biased figure moved by the difference of their mean from
    it, `bias`, since a resample repeats pictures, and so moves FD and IS as a smaller sample does.
    """
    if not resamples:
        return [value, np.nan, np.nan, np.nan, std]
    bias = float(np.mean(resamples)) - value
    low, high = np.quantile(resamples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]) - bias * is_biased
    return [value, float(low), float(high), bias, std]


# ------------------------------------------------------------------------------------------------------ torchmetrics


class _Given(torch.nn.Module):
    """Features that are there already: what torchmetrics takes for a network."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def _run_metric(metric: type, feature: torch.nn.Module, generator: torch.Generator, feed: Callable, **options):
    """A metric of one process; its random choices, by the global state, which is put back, follow from `generator`."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # it keeps all features, which is meant
        seed = int(torch.randint(2**62, (), generator=generator))
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        made = metric(feature=feature, sync_on_compute=False, distributed_available_fn=lambda: False, **options)
        feed(made.set_dtype(torch.float64))
        return made.compute()


def torchmetrics_fd(real: torch.Tensor, drawn: torch.Tensor) -> float:
    """The Fréchet distance of N x D and M x D features."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    def feed(metric) -> None:
        metric.update(real, real=True)
        metric.update(drawn, real=False)

    return _run_metric(FrechetInceptionDistance, _Given(real.shape[1]), torch.Generator(), feed).item()


def torchmetrics_kd(
    real: torch.Tensor, drawn: torch.Tensor, settings: FigureSettings, generator: torch.Generator
) -> tuple:
    """The mean kernel distance of random subsets, and the standard deviation over them."""
    from torchmetrics.image.kid import KernelInceptionDistance

    def feed(metric) -> None:
        metric.update(real, real=True)
        metric.update(drawn, real=False)

    size = min(settings.subset_size, len(real), len(drawn))
    options = {"subsets": settings.num_subsets, "subset_size": size}
    mean, std = _run_metric(KernelInceptionDistance, _Given(real.shape[1]), generator, feed, **options)
    return mean.item(), std.item()


def torchmetrics_is(logits: torch.Tensor, settings: FigureSettings, generator: torch.Generator) -> tuple[float, float]:
    """The mean Inception Score of the parts, and the standard deviation over them (`nan` of one part)."""
    from torchmetrics.image.inception import InceptionScore

    def feed(metric) -> None:
        metric.update(logits)

    options = {"splits": settings.num_splits}
    mean, std = _run_metric(InceptionScore, _Given(logits.shape[1]), generator, feed, **options)
    return mean.item(), std.item()

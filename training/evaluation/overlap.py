"""Real pictures that are near a training picture: found by a network's features, judged by a person on a page.

`fidelity` draws a second curve without those at or above the threshold (paper, Evaluation). The page is
`overlap_page.py`'s, networks are `features.py`'s.
"""

import functools
import hashlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from report_parts import make_table

from evaluation.features import (
    FeatureNetwork,
    NetworkName,
    PictureSet,
    compute_features,
    list_real,
    load_network,
    make_extract,
)
from evaluation.frame import Evaluation
from evaluation.overlap_page import Pair, write_page
from evaluation.pictures import digest_encoded
from evaluation.stored import Shards
from hf_dalle.data import load_rows
from hf_dalle.distribution_metrics import find_nearest


USES_PICTURES = False  # of models
SHARD_SIZE = 1024  # training pictures whose features are kept in one file
NUM_QUERIES = 4096  # real pictures that are compared with all of them in one go
NUM_HASHED = 65_536  # training pictures that the digest of their set is of, at most
LARGE = 1_000_000  # training pictures from which on faiss searches, where it is installed
PAGE = "overlap.html"
BIN_WIDTH = 0.01  # of the similarities, that the page shows as many pairs of


@dataclass
class Settings:
    """The settings of `overlap`."""

    train_data_dir: str | None = field(
        default=None, metadata={"help": "Folder with the training pictures; none: `data_dir`, or `dataset_name`."}
    )
    train_dataset_name: str | None = field(default=None, metadata={"help": "A data set on the Hub, instead."})
    train_split: str = "train"
    train_image_column: str = "image"
    num_train_pictures: int | None = field(default=None, metadata={"help": "The first so many; none: all."})
    network: NetworkName = "efficientnet-lite0"
    weights: str | None = field(default=None, metadata={"help": "`transformers`: a folder or a Hub id, as of a CLIP."})
    side: int = field(default=224, metadata={"help": "Centre squares of this side are compared."})
    radius: float = field(
        default=3.0,
        metadata={"help": "Of a blur before: without it what compression leaves counts as much as what is shown."},
    )
    threshold: float | None = field(
        default=None, metadata={"help": "Cosine from which on a picture counts as overlapping; a person sets it."}
    )
    search: Literal["auto", "exact", "faiss"] = field(
        default="auto", metadata={"help": "`auto`: faiss from a million training pictures on, if it is installed."}
    )
    num_pairs: int = field(default=300, metadata={"help": "On the page, at most."})
    batch_size: int = field(default=32, metadata={"help": "Pictures that the network sees at a time."})

    def __post_init__(self):
        if self.train_data_dir is not None and self.train_dataset_name is not None:
            raise ValueError("Give at most one of `train_data_dir` and `train_dataset_name`.")
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise ValueError(f"`threshold` is {self.threshold}; a cosine lies between -1 and 1.")
        if self.radius < 0:
            raise ValueError(f"`radius` is {self.radius}; expected a number from 0.")
        for name in ("num_pairs", "batch_size", "num_train_pictures", "side"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected a number from 1.")


def check(evaluation: Evaluation, settings: Settings) -> None:
    """
    Raises:
        OSError: if the training pictures, the network or faiss are not there.
        ValueError: if there is no such column, or the training pictures are the measured ones.
    """
    if settings.search == "faiss" and importlib.util.find_spec("faiss") is None:
        raise OSError("`search: faiss` needs another package: pip install faiss-cpu")
    evaluation.on_main_first(lambda: load_network(settings.network, settings.weights))
    args, source = evaluation.args, choose_source(evaluation, settings)
    if source == (args.data_dir, args.dataset_name) and settings.train_split in args.splits:
        raise ValueError(
            f"`overlap` compares split {settings.train_split!r} with itself: each picture would be its own nearest."
        )
    evaluation.on_main_first(lambda: load_train(evaluation, settings))


def choose_source(evaluation: Evaluation, settings: Settings) -> tuple[str | None, str | None]:
    """Folder and data set of the training pictures, one of which is `None`."""
    if settings.train_data_dir is None and settings.train_dataset_name is None:
        return evaluation.args.data_dir, evaluation.args.dataset_name
    return settings.train_data_dir, settings.train_dataset_name


def load_train(evaluation: Evaluation, settings: Settings) -> Any:
    """The training rows, of which only pictures are looked at."""
    column = settings.train_image_column
    rows = load_rows(*choose_source(evaluation, settings), settings.train_split, column)
    if column not in rows.column_names:
        raise ValueError(f"The training split has no column {column!r}; it has {sorted(rows.column_names)}.")
    if not len(rows):
        raise ValueError(f"The training split {settings.train_split!r} is empty.")
    return rows


# ------------------------------------------------------------------------------------------------------------ search


def find_overlap(evaluation: Evaluation, settings: Settings) -> dict[str, np.ndarray]:
    """
    Of each real picture (`rows.references`) the nearest training picture: `similarities`, cosines of features about
    the training pictures' mean, and `nearest`, rows of the training split. Stored. All processes must call it.
    """
    network = load_network(settings.network, settings.weights, evaluation.device)
    train = list_train(evaluation, settings)
    shards = compute_shards(evaluation, network, train, settings)
    real = list_real(evaluation)
    features = compute_features(evaluation, network, real, settings.side, settings.radius, settings.batch_size)[
        "features"
    ]
    use_faiss = settings.search == "faiss"
    if settings.search == "auto" and len(train.rows) >= LARGE:
        use_faiss = importlib.util.find_spec("faiss") is not None
    mean = functools.cache(lambda: average_features(shards))

    def search(places: list[int]) -> dict[str, np.ndarray]:
        queries = normalize(features[places], mean())
        blocks = ((shards.rows_of(n)[0], normalize(part, mean())) for n, part in enumerate(iterate_shards(shards)))
        similarities, nearest = search_blocks(queries, blocks, use_faiss)
        return {"similarities": similarities, "nearest": nearest}

    words = "the nearest training pictures"
    key = {**real.key, "train": shards.folder.name, "use_faiss": use_faiss}
    return evaluation.compute("overlap", key, range(len(real.rows)), search, NUM_QUERIES, words)


def list_train(evaluation: Evaluation, settings: Settings) -> PictureSet:
    """The training pictures."""
    rows = evaluation.on_main_first(lambda: load_train(evaluation, settings))
    number = min(len(rows), settings.num_train_pictures or len(rows))
    column = settings.train_image_column
    key = {"rows": evaluation.from_main(lambda: hash_pictures(rows, column, number))}
    return PictureSet("training pictures", key, range(number), lambda row: rows[row][column])


def hash_pictures(rows: Any, column: str, number: int) -> str:
    """A digest of the first `number` encoded pictures; of more than `NUM_HASHED` of so many, spread evenly."""
    digest = hashlib.sha256(str(number).encode())
    for row in sorted(
        {place * number // NUM_HASHED for place in range(NUM_HASHED)} if number > NUM_HASHED else range(number)
    ):
        digest.update(digest_encoded(rows[row][column]))
    return digest.hexdigest()


def compute_shards(evaluation: Evaluation, network: FeatureNetwork, train: PictureSet, settings: Settings) -> Shards:
    """Features of the training pictures, left in their files: of millions they do not fit into memory."""
    key = {**train.key, "network": network.digest, "side": settings.side, "radius": settings.radius}
    key["batch_size"] = settings.batch_size
    shards = Shards(evaluation.work_dir / "overlap-train", key, train.rows, SHARD_SIZE)
    extract = make_extract(network, train, settings.side, settings.radius, settings.batch_size)
    missing = evaluation.from_main(shards.list_missing)
    for number in evaluation.progress(evaluation.share(missing), "training pictures: features", unit="shard"):
        shards.write(number, {"features": extract(shards.rows_of(number))["features"]})
    evaluation.wait()
    return shards


def iterate_shards(shards: Shards) -> Iterator[np.ndarray]:
    """The features of one shard after the other."""
    for number in range(len(shards)):
        with np.load(shards.path(number), allow_pickle=False) as file:
            yield file["features"]


def average_features(shards: Shards) -> np.ndarray:
    """D, float64: the mean feature of all training pictures, in their order."""
    total = sum(part.sum(0, dtype=np.float64) for part in iterate_shards(shards))
    return total / len(shards.rows)


def normalize(features: np.ndarray, mean: np.ndarray) -> torch.Tensor:
    """About the mean and of length 1, float32: without it any two pictures are alike in what all pictures share."""
    return F.normalize(torch.from_numpy(features - mean), dim=1).float()


def search_blocks(
    queries: torch.Tensor, blocks: Iterator[tuple[int, torch.Tensor]], use_faiss: bool
) -> tuple[np.ndarray, np.ndarray]:
    """
    Each query's most similar reference, over blocks of references that come one after the other.

    Args:
        queries (`torch.Tensor`): N x D, of length 1.
        blocks: the number of a block's first reference, and R x D, of length 1.
        use_faiss (`bool`): by faiss, whose flat index is exact too; else by matrix products.

    Returns:
        `tuple`: N cosines, float32, and N numbers of references.
    """
    best, nearest = torch.full((len(queries),), -torch.inf), torch.zeros(len(queries), dtype=torch.long)
    for first, references in blocks:
        if use_faiss:
            import faiss

            index = faiss.IndexFlatIP(references.shape[1])
            index.add(references.numpy())
            similarities, numbers = (torch.from_numpy(found[:, 0]) for found in index.search(queries.numpy(), 1))
            numbers = numbers + first
        else:
            similarities, numbers = find_nearest(queries, references, first)
        is_nearer = similarities > best
        best, nearest = torch.where(is_nearer, similarities, best), torch.where(is_nearer, numbers, nearest)
    return best.clamp(-1, 1).numpy(), nearest.numpy()


# ------------------------------------------------------------------------------------------------------- measurement


def measure(evaluation: Evaluation, settings: Settings) -> dict:
    """
    Finds pairs and writes the page. All processes call it.

    Returns:
        `dict`: `threshold`, `num_overlapping` (`None` without a threshold), `num_pictures`, `num_train`, `quantiles`
        of the similarities, `counts` at thresholds, `network`, `page`.
    """
    found = find_overlap(evaluation, settings)
    network = load_network(settings.network, settings.weights)
    similarities = found["similarities"].astype(np.float64)
    train = list_train(evaluation, settings)
    if evaluation.is_main:
        pairs = choose_pairs(evaluation, train, found, settings.num_pairs)
        write_page(evaluation.folder / PAGE, similarities, pairs, settings.threshold, network.words)
    if settings.threshold is None:
        evaluation.warn(f"overlap: no `threshold` is set. Open {PAGE}, choose one, and write it into the settings.")
    thresholds = sorted({0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, *([settings.threshold] if settings.threshold else [])})
    return {
        "split": "+".join(evaluation.args.splits),
        "network": network.words,
        "side": settings.side,
        "radius": settings.radius,
        "num_pictures": len(similarities),
        "num_train": len(train.rows),
        "threshold": settings.threshold,
        "num_overlapping": None if settings.threshold is None else count_from(similarities, settings.threshold),
        "quantiles": {f"{share:g}": float(np.quantile(similarities, share)) for share in (0, 0.25, 0.5, 0.75, 0.9, 1)},
        "counts": {f"{threshold:g}": count_from(similarities, threshold) for threshold in thresholds},
        "page": PAGE,
    }


def find_from(similarities: np.ndarray, threshold: float) -> np.ndarray:
    """Which are at or above it; in float64, since numpy would round the threshold to similarities of float32."""
    return similarities.astype(np.float64) >= threshold


def count_from(similarities: np.ndarray, threshold: float) -> int:
    """How many are at or above it."""
    return int(find_from(similarities, threshold).sum())


def choose_pairs(evaluation: Evaluation, train: PictureSet, found: dict[str, np.ndarray], number: int) -> list[Pair]:
    """At most `number` pairs, most similar first: of each `BIN_WIDTH` of similarity as many, so that all are seen."""
    order = np.argsort(-found["similarities"], kind="stable")
    bins = np.floor(found["similarities"][order] / BIN_WIDTH)
    # of each bin the first, then of each the second, and so on, from the most similar on
    ranks = np.concatenate([np.arange(count) for count in np.unique(-bins, return_counts=True)[1]])
    chosen = np.sort(np.argsort(ranks, kind="stable")[:number])
    rows, real = evaluation.rows, list_real(evaluation)
    pairs = []
    for place in order[chosen].tolist():
        row, nearest = real.rows[place], int(found["nearest"][place])
        pictures = real.open(row), train.open(nearest)
        pairs.append(Pair(*pictures, float(found["similarities"][place]), rows.ids[row], f"training {nearest}"))
    return pairs


def describe(figures: dict) -> str:
    """The section of the report."""
    number, total = figures["num_overlapping"], figures["num_pictures"]
    page = f"[{figures['page']}]({figures['page']})"
    if number is None:
        said = f"No threshold is set: open {page}, choose one and write it into the settings."
    else:
        said = (
            f"At the threshold {figures['threshold']:g}, which a person set on {page},"
            f" {number:,} of {total:,} pictures ({100 * number / total:.1f} %) overlap the training pictures."
        )
    rows = [
        [threshold, f"{count:,}", f"{100 * count / total:.1f} %"] for threshold, count in figures["counts"].items()
    ]
    return (
        f"## Overlap with the training pictures\n{said}\n\nOf each of {total:,} real pictures the nearest of"
        f" {figures['num_train']:,} training pictures, by the cosine of features about the training pictures' mean"
        f" ({figures['network']}), of centre squares at {figures['side']} x {figures['side']} after a blur of radius"
        f" {figures['radius']:g}.\n\n{make_table(['cosine from', 'real pictures', 'share'], rows)}"
    )


def plot(figures: dict, folder: Path) -> dict[str, str]:
    """Nothing: the page has the histogram."""
    return {}


def list_results(figures: dict) -> list[dict]:
    """Nothing: the overlap is the data's."""
    return []

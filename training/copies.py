"""How much a checkpoint copies: of each drawn picture the nearest training picture of the same concept.

Pixels are compared, at a small side, and with the training pictures as the dVAE reconstructs them: a copied picture is
drawn from the same tokens, so the dVAE's own error must not hide it. Grids of pairs are `report.py`'s.
"""

from dataclasses import dataclass

import datasets
import torch
from judge import reduce_picture
from PIL import Image
from tqdm.auto import tqdm

from hf_dalle import DALLEPipeline
from hf_dalle.data import open_picture


SIDE = 32
# Sets of drawings share designs, so some distance lies between two honest pictures: this share of training pictures
# is nearer to another style's picture of its concept than the threshold. An exact copy lies at 0.
QUANTILE = 0.05


@dataclass
class Pair:
    """A drawn picture (3 x H x W), the nearest training picture and their distance."""

    drawn: torch.Tensor
    nearest: Image.Image
    distance: float
    caption: str


def flatten_small(pictures: list) -> torch.Tensor:
    """N x D: pictures reduced, scaled so that a distance is the root of the mean squared difference of pixels."""
    small = torch.stack([reduce_picture(picture, SIDE) for picture in pictures]).flatten(1)
    return small / small.shape[1] ** 0.5


@torch.no_grad()
def reconstruct_rows(
    pipe: DALLEPipeline, train: datasets.Dataset, rows: list[int], batch_size: int
) -> dict[int, torch.Tensor]:
    """Training pictures by row, as the dVAE reconstructs them, flattened."""
    small = {}
    for first in tqdm(range(0, len(rows), batch_size), desc="train: reconstructing for copies", unit="batch"):
        batch = rows[first : first + batch_size]
        pictures = [open_picture(image) for image in train.select(batch)["image"]]
        pixel_values = pipe.image_processor.preprocess(pictures)["pixel_values"].to(pipe.device)
        tokens = pipe.dvae.encode(pixel_values).tokens.flatten(1)
        small.update(zip(batch, flatten_small(pipe.decode_tokens(tokens)), strict=True))
    return small


def find_nearest(wanted: torch.Tensor, rows: list[int], small: dict[int, torch.Tensor]) -> tuple[int | None, float]:
    """The nearest of `rows` and its distance; none if there are no rows."""
    if not rows:
        return None, float("inf")
    distances = (torch.stack([small[row] for row in rows]) - wanted).square().sum(1).sqrt()
    return rows[distances.argmin()], distances.min().item()


def measure_copies(
    pipe: DALLEPipeline,
    train: datasets.Dataset,
    fold: list[int],
    sample: list[int],
    splits: dict,
    made: dict,
    batch_size: int,
) -> tuple[dict[str, dict], dict[str, list[Pair]]]:
    """
    The share of near-duplicates of training pictures, of each split whose concepts training pictures show.

    Args:
        pipe ([`DALLEPipeline`]): of the checkpoint.
        train (`datasets.Dataset`): the training split.
        fold (`list[int]`): its rows that trained nothing.
        sample (`list[int]`): its rows that the threshold is set by.
        splits, made (`dict`): by name what `evaluate_concepts.py` read and what the checkpoint made of it.
        batch_size (`int`): pictures reconstructed at a time.

    Returns:
        `tuple`: by split `share`, `threshold`, `num_pictures` and `share_real`, what the same threshold says of the
        reconstructed real pictures of the split (for `train`: beside their own); and by split the pairs.
    """
    of_concept, left_out = {}, set(fold)
    concepts = train["hexcode"][:]
    for row, concept in enumerate(concepts):
        if row not in left_out:
            of_concept.setdefault(concept, []).append(row)
    measured = {name: split for name, split in splits.items() if {*split.concepts} & of_concept.keys()}
    needed = {concepts[row] for row in sample}.union(*(split.concepts for split in measured.values()))
    rows = sorted(row for concept in needed for row in of_concept.get(concept, ()))
    small = reconstruct_rows(pipe, train, rows, batch_size)

    def list_others(concept: str, own: int) -> list[int]:
        return [row for row in of_concept.get(concept, ()) if row != own]

    apart = [find_nearest(small[row], list_others(concepts[row], row), small)[1] for row in sample]
    threshold = torch.tensor(apart).quantile(QUANTILE).item()
    figures, pairs = {}, {}
    for name, split in measured.items():
        drawn, real = flatten_small(made[name].drawn), flatten_small(made[name].reconstructions)
        pairs[name], distances, distances_real = [], [], []
        for index, (concept, own) in enumerate(zip(split.concepts, split.own, strict=True)):
            nearest, distance = find_nearest(drawn[index], of_concept.get(concept, []), small)
            distances.append(distance)
            distances_real.append(find_nearest(real[index], list_others(concept, own), small)[1])
            if nearest is not None:
                picture = open_picture(train[nearest]["image"])
                pairs[name].append(Pair(made[name].drawn[index], picture, distance, split.captions[index]))
        shares = [sum(value <= threshold for value in values) / len(split) for values in (distances, distances_real)]
        figures[name] = {
            "share": shares[0],
            "share_real": shares[1],
            "threshold": threshold,
            "num_pictures": len(split),
        }
    return figures, pairs

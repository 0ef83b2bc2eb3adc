"""How near a model's pictures are to real ones as a whole: Fréchet and kernel distance, Inception Score, precision and
recall of a network's features, after Gaussian blur of both sides (paper, Evaluation).

What is compared, in which order, by which processes, is here; figures of features are in `fidelity_figures.py`, tables
and plots in `fidelity_report.py`. Which real pictures the second curve leaves out is `overlap.py`'s.
"""

import importlib.util
from dataclasses import dataclass, field

import numpy as np
import torch

from evaluation import overlap
from evaluation.features import (
    FeatureNetwork,
    NetworkName,
    compute_features,
    list_drawn,
    list_real,
    load_network,
)
from evaluation.fidelity_figures import FIGURES, OF_FIGURE, FigureSettings, measure_classes, measure_distances
from evaluation.fidelity_report import describe, list_results, plot  # noqa: F401, what a measurement has
from evaluation.frame import Evaluation
from evaluation.inspection import inspect_model, inspect_rows
from evaluation.pictures import make_generator
from evaluation.settings import read_settings
from hf_dalle.distribution_metrics import extrapolate_to_infinity, frechet_distance


CURVES = ("all", "no_overlap")
GREY_DIFFERENCE = 0.05  # between the shares of grey pictures of two sets, that is said


@dataclass
class Settings(FigureSettings):
    """The settings of `fidelity`."""

    network: NetworkName = "efficientnet-lite0"
    weights: str | None = field(
        default=None, metadata={"help": "`inception`: path of its weights; `transformers`: a folder or a Hub id."}
    )
    side: int | None = field(
        default=None,
        metadata={"help": "All pictures become squares of this side, before blur; none, for folders: they are."},
    )
    radii: list[float] = field(
        default_factory=lambda: [0.0, 1.0, 2.0, 4.0, 8.0],
        metadata={"help": "Standard deviations of the blur, in pixels at that side."},
    )
    num_sizes: int = field(default=6, metadata={"help": "Sample sizes that FD is extrapolated from; 0: it is not."})
    use_few_pictures: bool = field(
        default=False, metadata={"help": "FD of no more pictures than features, whose covariances are singular."}
    )
    batch_size: int = field(default=32, metadata={"help": "Pictures that the network sees at a time."})

    def __post_init__(self):
        if not self.radii or min(self.radii) < 0 or sorted(set(self.radii)) != self.radii:
            raise ValueError(f"`radii` is {self.radii}; expected different numbers from 0, in rising order.")
        super().__post_init__()
        if self.batch_size < 1 or (self.side is not None and self.side < 8):
            raise ValueError("Expected `batch_size` from 1, and `side` from 8, or none.")
        if self.num_sizes < 0 or self.num_sizes == 1:
            raise ValueError(f"`num_sizes` is {self.num_sizes}; expected 0, or a number from 2.")


# ------------------------------------------------------------------------------------------------------------ checks


def check(evaluation: Evaluation, settings: Settings) -> None:
    """
    Raises:
        OSError: if the network or torchmetrics is not there.
        ValueError: if there are too few pictures, or no `side` and pictures of differing or of unknown sides.
    """
    if importlib.util.find_spec("torchmetrics") is None:
        raise OSError("`fidelity` needs another package: pip install torchmetrics")
    network = evaluation.on_main_first(lambda: load_network(settings.network, settings.weights))
    check_number(len(evaluation.rows.references), "real", network, settings)
    check_number(len(evaluation.rows), "drawn", network, settings)
    drawn = [name for name, model in evaluation.models.items() if model.is_drawn]
    if settings.side is None and drawn:
        raise ValueError(
            f"`side` is missing in `fidelity`: how large {drawn[0]} draws is seen only afterwards, and real pictures"
            " of another resolution would differ in blur. All pictures are cropped and resized to it alike."
        )
    check_sides(evaluation, settings, [name for name, model in evaluation.models.items() if not model.is_drawn])


def check_number(number: int, words: str, network: FeatureNetwork, settings: Settings) -> None:
    """Refuses a set that is too small for what is asked."""
    least = max(2, settings.num_neighbours + 1, settings.num_splits if network.num_classes else 0)
    if number < least:
        raise ValueError(
            f"There are {number} {words} pictures; precision and recall with {settings.num_neighbours} neighbours and"
            f" IS of {settings.num_splits} parts need {least}."
        )
    if number <= network.num_features and not settings.use_few_pictures:
        raise ValueError(
            f"There are {number} {words} pictures for {network.num_features} features: their covariance is singular,"
            f" and {network.name('FD')} would say more of the number of pictures than of the model. Take more of them,"
            " or set `use_few_pictures: true` to have it beside a warning; the kernel distance has no such bias."
        )


def check_sides(evaluation: Evaluation, settings: Settings, models: list[str]) -> None:
    """Refuses pictures of differing sides where no side is set; warns of what is odd between real and drawn ones."""
    found = {"the real pictures": inspect_rows(evaluation)}
    found |= {name: inspect_model(evaluation, evaluation.models[name]) for name in models}
    sides = {words: np.unique(np.stack([each["width"], each["height"]]), axis=1).T for words, each in found.items()}
    if settings.side is None and len(np.unique(np.concatenate([each.flatten() for each in sides.values()]))) > 1:
        shown = "; ".join(
            f"{words} {', '.join(f'{width} x {height}' for width, height in each[:3].tolist())}"
            for words, each in sides.items()
        )
        raise ValueError(
            f"Pictures are not squares of one side: {shown}. A difference in resolution is a difference in blur: set"
            " `side` in `fidelity`, which crops and resizes all of them alike."
        )
    for words, each in found.items():
        shortest = np.minimum(each["width"], each["height"])
        if settings.side is not None and (shortest < settings.side).any():
            evaluation.warn(
                f"fidelity: {(shortest < settings.side).sum()} of {len(shortest)} of {words} are smaller than the side"
                f" {settings.side} and are enlarged: they have no finer detail to compare."
            )
    greys = {words: each["is_grey"].mean() for words, each in found.items()}
    if max(greys.values()) - min(greys.values()) > GREY_DIFFERENCE:
        shown = ", ".join(f"{100 * share:.0f} % of {words}" for words, share in greys.items())
        evaluation.warn(f"fidelity: grey are {shown}; distances include it.")


def find_kept(evaluation: Evaluation, settings: Settings, network: FeatureNetwork) -> np.ndarray | None:
    """
    Which real pictures are like no training picture, if `overlap` is measured too and has a threshold; `None` if not,
    or if too few remain. All processes must call it.
    """
    if "overlap" not in evaluation.args.measure:
        return None
    given = read_settings(overlap.Settings, evaluation.args.measure["overlap"], "`measure`, overlap")
    if given.threshold is None:
        return None
    kept = ~overlap.find_from(overlap.find_overlap(evaluation, given)["similarities"], given.threshold)
    try:
        check_number(int(kept.sum()), "real (without overlap)", network, settings)
    except ValueError as error:
        evaluation.warn(f"fidelity: no curve without overlap. {error}")
        return None
    return kept


# ----------------------------------------------------------------------------------------------------------- figures


def measure(evaluation: Evaluation, settings: Settings) -> dict:
    """
    Figures of every model at every radius. All processes call it; each computes a part.

    Returns:
        `dict`: as [`compare_models`] has it.
    """
    network = load_network(settings.network, settings.weights, evaluation.device)
    check_sides(evaluation, settings, list(evaluation.models))
    return compare_models(evaluation, settings, network, find_kept(evaluation, settings, network))


def compare_models(
    evaluation: Evaluation, settings: Settings, network: FeatureNetwork, kept: np.ndarray | None = None
) -> dict:
    """
    Figures of every model at every radius by a network, whose name they carry.

    Args:
        evaluation, settings, network: what [`measure`] has.
        kept (`np.ndarray`, *optional*): booleans, the real pictures of the second curve.

    Returns:
        `dict`: `names` of the figures, `models`: by name by radius by curve by figure `value`, `low`, `high`, `bias`
        and `std`; `real`: the real pictures' own IS; `sizes`: FD at sample sizes, and its limit; what was compared.
    """
    sets = [list_real(evaluation), *(list_drawn(evaluation, name) for name in evaluation.models)]
    tables, sizes = {}, {}
    for radius in settings.radii:
        arrays = [
            compute_features(evaluation, network, each, settings.side, radius, settings.batch_size) for each in sets
        ]
        tables[radius] = compute_figures(evaluation, settings, network, sets, arrays, kept, radius)
        if radius == settings.radii[0] and settings.num_sizes:
            sizes = compute_sizes(evaluation, settings, network, sets, arrays)
    names = {"fd": network.name("FD"), "kd": network.name("KD"), "is": network.name("IS")}
    num_in_part = len(evaluation.rows) // settings.num_splits
    if not network.num_classes:
        evaluation.warn(f"fidelity: {network.words} tells no classes: there is no {names['is']}.")
    elif num_in_part < network.num_classes:
        evaluation.warn(
            f"fidelity: {names['is']} is of parts of {num_in_part} pictures, fewer than the network's"
            f" {network.num_classes} classes: it cannot be above {num_in_part}, and is too low."
        )
    return {
        "names": {**names, "precision": "precision", "recall": "recall"},
        "network": network.words,
        "num_features": network.num_features,
        "num_real": len(sets[0].rows),
        "num_kept": None if kept is None else int(kept.sum()),
        "num_drawn": len(evaluation.rows),
        "split": "+".join(evaluation.args.splits),
        "settings": {name: getattr(settings, name) for name in Settings.__dataclass_fields__},
        "models": {
            name: {f"{radius:g}": read_table(tables[radius][index + 1], kept is not None) for radius in settings.radii}
            for index, name in enumerate(evaluation.models)
        },
        "real": {f"{radius:g}": read_table(tables[radius][0], False)["all"].get("is") for radius in settings.radii},
        "sizes": sizes,
    }


def compute_figures(evaluation, settings, network, sets, arrays, kept, radius) -> np.ndarray:
    """Sets x curves x `FIGURES` x `OF_FIGURE`, a set a task of some process; stored. Of the real pictures only IS."""
    stored = {name: value for name, value in vars(settings).items() if name not in ("radii", "num_sizes")}
    key = {
        "network": network.digest,
        "settings": stored,
        "radius": radius,
        "sets": [each.key for each in sets],
        "kept": None if kept is None else np.flatnonzero(kept).tolist(),
        "seed": evaluation.seed,
    }

    seeds = (evaluation.seed, "fidelity", f"{radius:g}")

    def compare(numbers: list[int]) -> dict[str, np.ndarray]:
        results = []
        for number in numbers:
            result = np.full((len(CURVES), len(FIGURES), len(OF_FIGURE)), np.nan)
            if "logits" in arrays[number]:
                result[0, 2] = measure_classes(arrays[number]["logits"], settings, make_generator(*seeds, "classes"))
            real, drawn = arrays[0]["features"], arrays[number]["features"]
            for curve in range(0 if number == 0 else 1 if kept is None else 2):
                part = real[kept] if curve else real
                # of all models the same, so that what chance does to the real pictures it does to all alike
                generator = make_generator(*seeds, CURVES[curve])
                result[curve, [0, 1, 3, 4]] = measure_distances(part, drawn, settings, generator)
            results.append(result)
        return {"figures": np.stack(results)}

    words = f"comparing at blur {radius:g}"
    return evaluation.compute("fidelity", key, range(len(sets)), compare, 1, words)["figures"]


def read_table(table: np.ndarray, has_kept: bool) -> dict:
    """Curves x `FIGURES` x `OF_FIGURE` by name, without what is not there."""
    curves = {}
    for curve, rows in zip(CURVES[: 1 + has_kept], table, strict=False):
        entries = {
            name: dict(zip(OF_FIGURE, row.tolist(), strict=True)) for name, row in zip(FIGURES, rows, strict=True)
        }
        curves[curve] = {
            name: {key: number for key, number in entry.items() if number == number}
            for name, entry in entries.items()
            if entry["value"] == entry["value"]
        }
    return curves


def compute_sizes(evaluation, settings, network, sets, arrays) -> dict:
    """By model FD of the first radius at smaller samples of both sides, evenly spaced in 1 / N, and its limit."""
    largest = min(len(each.rows) for each in sets)
    smallest = max(2, largest // 4)
    inverses = np.linspace(1 / smallest, 1 / largest, settings.num_sizes)
    sizes = sorted({int(round(1 / inverse)) for inverse in inverses})
    tasks = [(number, size) for number in range(1, len(sets)) for size in sizes]
    key = {
        "network": network.digest,
        "side": settings.side,
        "radius": settings.radii[0],
        "batch_size": settings.batch_size,
    }
    key |= {"sets": [each.key for each in sets], "sizes": sizes, "seed": evaluation.seed}

    def compare(places: list[int]) -> dict[str, np.ndarray]:
        values = []
        for number, size in (tasks[place] for place in places):
            parts = []
            for each in (0, number):
                generator = make_generator(evaluation.seed, "fidelity-sizes", each, size)
                rows = torch.randperm(len(sets[each].rows), generator=generator)[:size]
                parts.append(torch.from_numpy(arrays[each]["features"])[rows])
            values.append(frechet_distance(*parts))
        return {"values": np.array(values)}

    if len(sizes) < 2:
        return {}
    words = "comparing smaller samples"
    values = evaluation.compute("fidelity-sizes", key, range(len(tasks)), compare, 1, words)["values"]
    result = {}
    for index, name in enumerate(evaluation.models):
        own = values[index * len(sizes) : (index + 1) * len(sizes)].tolist()
        limit, slope = extrapolate_to_infinity(sizes, own)
        result[name] = {"sizes": sizes, "values": own, "limit": limit, "slope": slope}
    return result

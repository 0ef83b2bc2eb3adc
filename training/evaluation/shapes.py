"""Whether pictures of shapes show what their captions say, all of it and nothing else, by the checker; beside chance.

Needs rows of `prepare_shapes.py`, whose columns say what each caption means. How a picture is read and judged lives in
`scene_checker.py`.
"""

import hashlib
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scenes
import torch
from loading import read_column
from PIL import Image
from prepare_shapes import FEATURES, read_scene, sample_any_scene
from report_parts import make_table
from scenes import Scene

from evaluation import scene_checker
from evaluation.frame import Evaluation
from evaluation.models import Model
from evaluation.pictures import make_seed
from evaluation.report import is_held_out
from evaluation.scene_checker import Found, Verdict, judge, read_picture
from evaluation.stored import make_digest
from hf_dalle.data import load_rows
from hf_dalle.metrics import wilson_interval


SHARD_SIZE = 64
KINDS = {"one": "of one thing", "two": "of two", "count": "of several", "all": "all"}
COLUMNS = [name for name in FEATURES if name not in ("image", "captions", "kind")]
CHANCES = {"training picture": "a random training picture", "random scene": "a random scene of the kind"}


@dataclass
class Settings:
    """
    What is shown and what is beside it.

    Args:
        train_split (`str`): of the data, for the chance of a random training picture.
        num_chances (`int`): of either chance, so many draws a caption.
        num_shown (`int`): of each split, at most so many right pictures and so many wrong ones in the grid.
    """

    train_split: str = "train"
    num_chances: int = 50
    num_shown: int = 4

    def __post_init__(self):
        for name in ("num_chances", "num_shown"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected a number from 1.")


def check(evaluation: Evaluation, settings: Settings) -> None:
    """
    Raises:
        OSError: if there is no training split.
        ValueError: for rows that are not of `prepare_shapes.py`, or pictures that are not square.
    """
    read_scenes(evaluation)
    _read_training_scenes(evaluation, settings)
    stores = {model.name: model.store for model in evaluation.models.values() if not model.is_drawn}
    for name, picture in {"the rows": evaluation.rows.picture, **{n: s.read for n, s in stores.items()}}.items():
        width, height = picture(0).size
        if width != height:
            raise ValueError(f"The pictures of {name} are {width} x {height}; pictures of shapes are square.")


def read_scenes(evaluation: Evaluation) -> list[Scene]:
    """What each row's caption says."""
    missing = [name for name in COLUMNS if not evaluation.rows.has_column(name)]
    if missing:
        raise ValueError(f"`shapes` needs the columns of prepare_shapes.py; the data lacks {', '.join(missing)}.")
    return _join_scenes(evaluation.rows.column(name) for name in COLUMNS)


def _read_training_scenes(evaluation: Evaluation, settings: Settings) -> list[Scene]:
    args = evaluation.args
    rows = load_rows(args.data_dir, args.dataset_name, settings.train_split, args.image_column)
    missing = [name for name in COLUMNS if name not in rows.column_names]
    if missing:
        raise ValueError(f"Split {settings.train_split!r} lacks {', '.join(missing)}, which prepare_shapes.py writes.")
    return _join_scenes(read_column(rows, name) for name in COLUMNS)


def _join_scenes(columns: Iterable[list]) -> list[Scene]:
    return [read_scene(dict(zip(COLUMNS, values, strict=True))) for values in zip(*columns, strict=True)]


# -------------------------------------------------------------------------------------------------------- measuring


def measure(evaluation: Evaluation, settings: Settings) -> dict:
    """The share of pictures with everything right, and with each part right, by split and kind of scene."""
    wanted, rows = read_scenes(evaluation), evaluation.rows
    index = list(zip(rows.splits, (scene.kind for scene in wanted), strict=True))
    real = _judge_all(evaluation, wanted, {"of": "rows"}, lambda row: [rows.picture(i) for i in row], "real pictures")
    models = {}
    for model in evaluation.models.values():
        drawn = _judge_all(
            *(evaluation, wanted, {"of": "drawn", "model": model.key}),
            *(lambda row, model=model: [model.store.read(i) for i in row], model.name),
        )
        models[model.name] = {"drawn": sum_up(drawn, index)}
        if model.is_dalle:
            decoded = _judge_all(
                *(evaluation, wanted, {"of": "reconstructions", "model": model.fingerprint}),
                *(lambda row, model=model: _reconstruct(evaluation, model, row), f"{model.name}: reconstructions"),
            )
            models[model.name]["reconstructions"] = sum_up(decoded, index)
        if evaluation.is_main:
            models[model.name]["grid"] = _draw_grid(evaluation, model, drawn, settings.num_shown)
    figures = {"splits": evaluation.args.splits, "real": sum_up(real, index), "models": models}
    share = _mean_right(real)
    if share < 1:
        evaluation.warn(
            f"The checker finds {share:.1%} of the real pictures right, where 100 % is what it is made for: these are"
            " not pictures as prepare_shapes.py writes them, and models' figures are low by as much."
        )
    if evaluation.is_main:
        training = _read_training_scenes(evaluation, settings)
        figures["chance"] = {
            "training picture": sum_up(*_judge_chance(evaluation, settings, wanted, index, training)),
            "random scene": sum_up(*_judge_chance(evaluation, settings, wanted, index, None)),
        }
    return figures


def _judge_all(
    evaluation: Evaluation, wanted: list[Scene], key: dict, read: Callable[[list[int]], list[Image.Image]], words: str
) -> np.ndarray:
    """R x 5, the parts of each row's verdict: 1 right, 0 wrong, -1 not asked for."""

    def judge_rows(rows: list[int]) -> dict[str, np.ndarray]:
        verdicts = [judge(read_picture(image), wanted[row]) for row, image in zip(rows, read(rows), strict=True)]
        return {"verdicts": encode_verdicts(verdicts)}

    key = {**key, "checker": _digest_checker(), "scenes": make_digest(wanted)}
    rows = range(len(wanted))
    return evaluation.compute("shapes", key, rows, judge_rows, SHARD_SIZE, f"{words}: checking")["verdicts"]


def _digest_checker() -> str:
    """Verdicts of another checker are not these."""
    sources = (Path(module.__file__).read_bytes() for module in (scene_checker, scenes))
    return hashlib.sha256(b"".join(sources)).hexdigest()


def encode_verdicts(verdicts: list[Verdict]) -> np.ndarray:
    """N x 5 of int8, in the order of [`Verdict`]; a part that the scene does not have is -1."""
    return np.array([[-1 if part is None else part for part in one] for one in verdicts], dtype=np.int8).reshape(-1, 5)


@torch.no_grad()
def _reconstruct(evaluation: Evaluation, model: Model, rows: list[int]) -> list[Image.Image]:
    pipe = evaluation.load_pipeline(model)
    pixels = pipe.image_processor([evaluation.rows.picture(row) for row in rows])["pixel_values"]
    sample = pipe.dvae.decode(pipe.dvae.encode(pixels.to(pipe.dvae.device, pipe.dvae.dtype)).tokens).sample
    return pipe.image_processor.postprocess(sample, output_type="pil")


def _judge_chance(
    evaluation: Evaluation, settings: Settings, wanted: list[Scene], index: list, training: list[Scene] | None
) -> tuple[np.ndarray, list]:
    """Verdicts of `num_chances` random scenes a caption: of the training split, or else of all that its kind has."""
    verdicts, places = [], []
    for row, scene in enumerate(wanted):
        rng = np.random.default_rng(make_seed(evaluation.seed, "chance", evaluation.rows.ids[row]))
        for _ in range(settings.num_chances):
            shown = training[rng.integers(len(training))] if training else sample_any_scene(scene.kind, rng)
            verdicts.append(judge(list_shown(shown), scene))
            places.append(index[row])
    return encode_verdicts(verdicts), places


def list_shown(scene: Scene) -> list[Found]:
    """What the checker finds in a picture of a scene, but for the places."""
    if scene.other is None:
        return [Found(*scene.thing, x=(i + 1) / (scene.count + 1), y=0.5) for i in range(scene.count)]
    x, y = {"left of": (-0.2, 0), "right of": (0.2, 0), "above": (0, -0.2), "below": (0, 0.2)}[scene.relation]
    return [Found(*scene.thing, x=0.5 + x, y=0.5 + y), Found(*scene.other, x=0.5 - x, y=0.5 - y)]


def _mean_right(verdicts: np.ndarray) -> float:
    return float((verdicts != 0).all(1).mean())


def sum_up(verdicts: np.ndarray, index: list[tuple[str, str]]) -> dict:
    """
    Shares by split and kind of scene, "all" for all kinds.

    Args:
        verdicts (`np.ndarray`): N x 5, of [`encode_verdicts`].
        index (`list[tuple[str, str]]`): of each, split and kind.
    """
    figures: dict[str, dict] = {}
    for split in dict.fromkeys(name for name, _ in index):
        figures[split] = {}
        for kind in KINDS:
            chosen = verdicts[[name == split and kind in (own, "all") for name, own in index]]
            if len(chosen):
                parts = {
                    part: interval(int((column == 1).sum()), int((column >= 0).sum()))
                    for part, column in zip(Verdict._fields, chosen.T, strict=True)
                    if (column >= 0).any()
                }
                right = interval(int((chosen != 0).all(1).sum()), len(chosen))
                figures[split][kind] = {"num_pictures": len(chosen), "right": right, **parts}
    return figures


def interval(num_right: int, num_all: int) -> dict[str, float]:
    """A share with its 95 % interval."""
    low, high = wilson_interval(num_right, num_all)
    return {"value": num_right / num_all, "low": low, "high": high}


# -------------------------------------------------------------------------------------------------------- reporting


def _draw_grid(evaluation: Evaluation, model: Model, verdicts: np.ndarray, num_shown: int) -> str:
    """A PNG with a row a split: the first right pictures in green, the first wrong ones in red, and their captions."""
    from matplotlib.figure import Figure

    rows, is_right = evaluation.rows, (verdicts != 0).all(1)
    splits = evaluation.args.splits
    figure = Figure(figsize=(1.35 * 2 * num_shown, 1.85 * len(splits)), dpi=80, layout="constrained")
    axes = figure.subplots(len(splits), 2 * num_shown, squeeze=False)
    for line, split in zip(axes, splits, strict=True):
        for axis in line:
            axis.set_axis_off()
        line[0].text(-0.08, 0.5, split, transform=line[0].transAxes, rotation=90, ha="right", va="center", fontsize=8)
        for first, wish in ((0, True), (num_shown, False)):
            chosen = [row for row in rows.of_split(split) if is_right[row] == wish][:num_shown]
            for axis, row in zip(line[first:], chosen, strict=False):
                axis.set_axis_on()
                axis.imshow(model.store.read(row))
                axis.set(xticks=[], yticks=[])
                axis.set_title("\n".join(textwrap.wrap(rows.captions[row], 24)), fontsize=5.5)
                for side in axis.spines.values():
                    side.set(color="#2a8a3c" if wish else "#c8352b", linewidth=2)
    name = f"shapes-{list(evaluation.models).index(model.name) + 1}.png"  # a model's name may hold spaces
    figure.savefig(evaluation.folder / name)
    return name


def plot(figures: dict, folder: Path) -> dict[str, str]:
    """The grids, which [`measure`] has drawn."""
    return {Path(model["grid"]).stem: model["grid"] for model in figures["models"].values()}


def describe(figures: dict) -> str:
    """The section of the report."""
    lines = [
        "## Shapes: does the picture show what the caption says?\n",
        "A picture is right if it shows every thing of the caption with its colour, shape and size, in number and"
        " relation as said, and nothing else, by a checker that reads pictures back without learning"
        " (`training/evaluation/scene_checker.py`). `test_pairs` and `test_triples` hold combinations that no training"
        " picture shows. In brackets 95 % intervals (Wilson), over captions alone. Chance: a random training picture"
        " in the place of the drawn one, or a random scene of the caption's kind.",
    ]
    for split in figures["splits"]:
        kinds = [kind for kind in KINDS if kind in figures["real"][split]]
        counts = [f"{KINDS[kind]} ({figures['real'][split][kind]['num_pictures']:,})" for kind in kinds]
        table = [
            [title, *(_format(found[split][kind]["right"], has_interval) for kind in kinds)]
            for title, found, has_interval in _list_sides(figures)
        ]
        lines.append(f"\n`{split}`, pictures with everything right, %:\n\n" + make_table(["", *counts], table))
    parts = list(Verdict._fields)
    table = [
        [f"{name}, `{split}`", *(_format(found["drawn"][split]["all"].get(part), False) for part in parts)]
        for name, found in figures["models"].items()
        for split in figures["splits"]
    ]
    lines.append("\nDrawn pictures with this part right, %; things are paired with those of the caption so that most")
    lines.append("words agree:\n\n" + make_table(["", *parts], table))
    for name, model in figures["models"].items():
        lines.append(f"\n![{name}: right pictures (green) and wrong ones (red) by split]({model['grid']})")
    return "\n".join(lines)


def _list_sides(figures: dict) -> Iterator[tuple[str, dict, bool]]:
    """Title, figures by split, and whether their interval says something, of each line of a table."""
    yield "real pictures", figures["real"], True
    for name, model in figures["models"].items():
        if "reconstructions" in model:
            yield f"{name}, reconstructions of the real pictures", model["reconstructions"], True
        yield f"{name}, drawn", model["drawn"], True
    for key, words in CHANCES.items():
        yield f"chance: {words}", figures["chance"][key], False


def _format(figure: dict | None, has_interval: bool) -> str:
    if figure is None:
        return ""
    value, low, high = (f"{100 * figure[key]:.1f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]" if has_interval else value


def list_results(figures: dict) -> list[dict]:
    """For the card's model-index: what was drawn from captions that trained nothing."""
    return [
        {
            "task": "text-to-image",
            "split": split,
            "metric_type": "accuracy",
            "metric_name": f"pictures with everything right, {KINDS[kind]}",
            "value": found["right"]["value"],
            "model": name,
        }
        for name, model in figures["models"].items()
        for split, kinds in model["drawn"].items()
        if is_held_out(split)
        for kind, found in kinds.items()
    ]

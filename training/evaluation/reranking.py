"""The paper's curve of reranking: how good the best-scored of N candidates is, by another network than the reranker.

Candidates are drawn, scored and judged a block at a time, each block once. The curve is exact over all ways to choose
N of those drawn (`hf_dalle.reranking.expect_best_of`); intervals come from resampling the captions.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter
from PIL import Image
from report_parts import make_table

from evaluation.frame import Evaluation
from evaluation.models import Model
from evaluation.pictures import draw_pictures, make_generator
from evaluation.rankers import ConceptJudge, Ranker, find_reranker
from hf_dalle.metrics import bootstrap
from hf_dalle.reranking import expect_best_of


USES_PICTURES = False
JUDGE_SIDE = 32  # what the judge of concepts sees of a picture
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:cyan")


@dataclass
class Settings:
    """
    Args:
        num_candidates (`int`): M, drawn for each caption; the curve goes from 1 to M in powers of two.
        reranker (`str`, *optional*): folder or repository of a CLIP-like model; none: each pipeline's own.
        judge (`str`): `"concepts"`, the network of `judge.py`, for rows with `hexcode` and `style`; or the folder or
            repository of a CLIP-like model that is not the reranker.
        baseline (`str`, *optional*): the model whose N = 1 the gap to the real pictures is measured from; none: each
            model's own.
        block_size (`int`): candidates drawn at a time, and lost at most by a kill.
        num_resamples (`int`): of captions, for the intervals.
    """

    num_candidates: int = 32
    reranker: str | None = None
    judge: str = "concepts"
    baseline: str | None = None
    block_size: int = 32
    num_resamples: int = 1000

    def __post_init__(self):
        lowest = {"num_candidates": 2, "block_size": 1, "num_resamples": 100}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected a whole number from {least}.")

    @property
    def sizes(self) -> list[int]:
        """N: the powers of two up to M, and M."""
        powers = [2**power for power in range(self.num_candidates.bit_length())]
        return sorted({*powers, self.num_candidates})

    @property
    def blocks(self) -> list[range]:
        starts = range(0, self.num_candidates, self.block_size)
        return [range(start, min(start + self.block_size, self.num_candidates)) for start in starts]


def check(evaluation: Evaluation, settings: Settings) -> None:
    """Refuses what has no candidates, no reranker, or a judge that would judge itself."""
    models = list_models(evaluation)
    if not models:
        raise ValueError("`reranking` draws candidates; of `models` none has a `pipeline` to draw with.")
    left_out = [name for name, model in evaluation.models.items() if not model.is_drawn]
    if left_out:
        evaluation.warn(f"reranking: {', '.join(left_out)} are pictures without candidates, and are left out.")
    if settings.baseline is not None and settings.baseline not in models:
        raise ValueError(f"`baseline` is {settings.baseline!r}; expected one of {', '.join(models)}.")
    judge = make_judge(evaluation, settings)
    for model in models.values():
        if find_reranker(model, settings.reranker).fingerprint == judge.fingerprint:
            raise ValueError(f"`judge` {settings.judge} is the reranker of {model.name}: it would judge itself.")


def list_models(evaluation: Evaluation) -> dict[str, Model]:
    return {name: model for name, model in evaluation.models.items() if model.is_drawn}


def make_judge(evaluation: Evaluation, settings: Settings) -> ConceptJudge | Ranker:
    if settings.judge == "concepts":
        return ConceptJudge(evaluation, JUDGE_SIDE)
    return Ranker(settings.judge, evaluation.device)


def measure(evaluation: Evaluation, settings: Settings) -> dict:
    """The curves of each model and split, beside the real pictures, with intervals."""
    judge, rows, candidates = make_judge(evaluation, settings), range(len(evaluation.rows)), {}
    judged = {"judge": judge.key}
    real = evaluation.compute(
        "reranking-real", judged, rows, make_real_judging(evaluation, judge), 16, "reranking: real pictures"
    )
    described = {}
    for name, model in list_models(evaluation).items():
        ranker = find_reranker(model, settings.reranker, evaluation.device)
        described[name] = ranker.name
        parts = []
        for block in settings.blocks:
            key = {**judged, "model": model.key, "reranker": ranker.key, "block": [block.start, block.stop]}
            function = make_block_judging(evaluation, model, ranker, judge, block)
            words = f"{name}: candidates {block.start + 1} to {block.stop} of {settings.num_candidates}"
            parts.append(evaluation.compute("reranking", key, rows, function, 1, words))
        candidates[name] = {key: np.concatenate([part[key] for part in parts], axis=1) for key in parts[0]}
    if not evaluation.is_main:
        return {}
    figures = {
        "num_candidates": settings.num_candidates,
        "judge": judge.name,
        "qualities": judge.qualities,
        "baseline": settings.baseline,
        "models": {name: {"reranker": reranker, "splits": {}} for name, reranker in described.items()},
        "real": {},
    }
    for split in dict.fromkeys(evaluation.rows.splits):
        chosen = evaluation.rows.of_split(split)
        figures["real"][split] = {
            name: bootstrap(torch.from_numpy(real[name][chosen]), evaluation.seed, settings.num_resamples)
            for name in judge.qualities
        }
        parts = {name: {key: values[chosen] for key, values in part.items()} for name, part in candidates.items()}
        truth = {key: values[chosen] for key, values in real.items()}
        for name, curves in summarise(parts, truth, settings, evaluation.seed).items():
            figures["models"][name]["splits"][split] = {"num_captions": len(chosen), **curves}
    return figures


# --------------------------------------------------------------------------------------------------- the candidates


def make_real_judging(evaluation: Evaluation, judge: ConceptJudge | Ranker) -> Callable[[list[int]], dict]:
    def judge_real(rows: list[int]) -> dict[str, np.ndarray]:
        parts = [judge.judge(row, evaluation.rows.captions[row], [evaluation.rows.picture(row)]) for row in rows]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return judge_real


def make_block_judging(
    evaluation: Evaluation, model: Model, ranker: Ranker, judge: ConceptJudge | Ranker, block: range
) -> Callable[[list[int]], dict]:
    """Draws, scores and judges the candidates of `block` of one row; each has a seed of its own."""

    def judge_block(rows: list[int]) -> dict[str, np.ndarray]:
        (row,) = rows
        caption = evaluation.rows.captions[row]
        seeds = [(evaluation.seed, evaluation.rows.ids[row], "candidate", candidate) for candidate in block]
        pictures = draw_candidates(evaluation, model, caption, [make_generator(*seed) for seed in seeds])
        arrays = {"scores": ranker.score(caption, pictures), **judge.judge(row, caption, pictures)}
        return {name: array[None] for name, array in arrays.items()}  # 1 x block

    return judge_block


@torch.no_grad()
def draw_candidates(
    evaluation: Evaluation, model: Model, caption: str, generators: list[torch.Generator]
) -> list[Image.Image]:
    """
    A picture of the caption for each generator, in their order, none checked. A `num_candidates` among the model's
    settings has no part in it: N is the curve's.
    """
    pipe = evaluation.load_pipeline(model)
    generation = {name: value for name, value in model.generation.items() if name != "num_candidates"}
    if not model.is_dalle:
        return draw_pictures(pipe, [caption] * len(generators), generators, generation)
    tokens = pipe(
        caption, num_images_per_prompt=len(generators), generator=generators, output_type="latent", **generation
    ).images
    return pipe.image_processor.postprocess(pipe.decode_tokens(tokens.flatten(1)))


# -------------------------------------------------------------------------------------------------------- the curves


def summarise(
    candidates: dict[str, dict[str, np.ndarray]], real: dict[str, np.ndarray], settings: Settings, seed: int
) -> dict[str, dict]:
    """
    Curves of all models on the same captions.

    Args:
        candidates (`dict`): by model `scores` and qualities, each captions x M.
        real (`dict`): qualities of the real pictures, one a caption.
        settings ([`Settings`]), seed (`int`): of the intervals.

    Returns:
        `dict`: by model and quality `curve` (by N, the best-scored of N), `best_possible` (the same with a ranking by
        the quality itself) and `gap_closed` (by N, the share of the gap from N = 1 to the real pictures that the best
        of N closes, with an interval; none where there is no gap).
    """
    means = {}  # by model, quality and N, a value a caption
    for name, part in candidates.items():
        order = torch.from_numpy(part["scores"]).argsort(dim=1, descending=True, stable=True)
        for quality in real:
            values = torch.from_numpy(part[quality]).double()
            ranked = values.gather(1, order), values.sort(dim=1, descending=True).values
            means[name, quality] = [{size: expect_best_of(size, each) for size in settings.sizes} for each in ranked]
    figures = {}
    for (name, quality), (curve, best) in means.items():
        start = means[settings.baseline or name, quality][0][1]
        truth = torch.from_numpy(real[quality]).double()
        figures.setdefault(name, {})[quality] = {
            "curve": {str(size): bootstrap(values, seed, settings.num_resamples) for size, values in curve.items()},
            "best_possible": {str(size): values.mean().item() for size, values in best.items()},
            "gap_closed": {
                str(size): bootstrap_share(values, start, truth, seed, settings.num_resamples)
                for size, values in curve.items()
            },
        }
    return figures


def bootstrap_share(
    values: torch.Tensor, start: torch.Tensor, end: torch.Tensor, seed: int, num_resamples: int
) -> dict[str, float] | None:
    """
    (mean of values - mean of start) / (mean of end - mean of start) with its 95 % interval, the captions of all three
    resampled together; none where the means of `start` and `end` are not in this order. `low` and `high` are `None`
    where more than one resample in 40 has no gap: then the gap itself may be chance, and its share be anything.
    """
    if not end.mean() > start.mean():
        return None
    rows = np.random.default_rng(seed).integers(len(values), size=(num_resamples, len(values)))
    value, low, high = (part.numpy()[rows].mean(1) for part in (values, start, end))
    has_gap, bounds = high > low, (None, None)
    if has_gap.mean() >= 1 - 1 / 40:
        bounds = np.quantile(((value - low)[has_gap] / (high - low)[has_gap]), [0.025, 0.975]).tolist()
    share = (values.mean() - start.mean()) / (end.mean() - start.mean())
    return {"value": share.item(), "low": bounds[0], "high": bounds[1]}


# -------------------------------------------------------------------------------------------------------- the report


def plot(figures: dict, folder: Path) -> dict[str, str]:
    """The curves, a picture a split, a panel a quality."""
    names = {}
    for split, real in figures["real"].items():
        figure = matplotlib.figure.Figure(figsize=(5.2 * len(figures["qualities"]), 4.2), layout="constrained")
        panels = figure.subplots(1, len(figures["qualities"]), squeeze=False)[0]
        for panel, quality in zip(panels, figures["qualities"], strict=True):
            _plot_panel(panel, figures, split, quality, real[quality]["value"])
        panels[-1].legend(fontsize=8)
        names[f"reranking_{split}"] = f"reranking_{split}.png"
        figure.savefig(folder / names[f"reranking_{split}"], dpi=110)
    return names


def _plot_panel(panel, figures: dict, split: str, quality: str, real: float) -> None:
    for colour, (name, model) in zip(itertools.cycle(COLOURS), figures["models"].items(), strict=False):
        curves = model["splits"][split][quality]
        sizes = [int(size) for size in curves["curve"]]
        points = list(curves["curve"].values())
        panel.plot(sizes, [point["value"] for point in points], "o-", color=colour, label=f"{name}, best of N")
        bounds = [[point[bound] for point in points] for bound in ("low", "high")]
        panel.fill_between(sizes, *bounds, color=colour, alpha=0.15, linewidth=0)
        panel.plot(
            sizes, list(curves["best_possible"].values()), ":", color=colour, label=f"{name}, by a perfect ranking"
        )
        panel.axhline(points[0]["value"], color=colour, linewidth=0.8, linestyle="--", label=f"{name}, one at random")
    panel.axhline(real, color="black", linewidth=1, label="real pictures")
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(FixedLocator(sizes))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    panel.set_xlabel("candidates, N")
    panel.set_ylabel(quality)
    panel.set_title(f"{quality}, {split}", fontsize=10)
    panel.grid(alpha=0.3)


def describe(figures: dict) -> str:
    """The section of the report: a row a model, split and quality."""
    sizes = [*next(iter(figures["models"].values()))["splits"].values()][0][figures["qualities"][0]]["curve"]
    base = f"of {figures['baseline']}" if figures["baseline"] is not None else "of the same model"
    head = ["model", "split", "judged by", *(f"N = {size}" for size in sizes), "real", "perfect ranking"]
    head += [f"gap closed, N = {size}" for size in _list_gap_sizes(sizes)]
    rows = [
        _describe_row(name, split, quality, curves[quality], figures["real"][split][quality])
        for name, model in figures["models"].items()
        for split, curves in model["splits"].items()
        for quality in figures["qualities"]
    ]
    rerankers = sorted({model["reranker"] for model in figures["models"].values()})
    parts = [
        "## Reranking",
        f"The best of N candidates by the reranker ({'; '.join(rerankers)}), judged by another network:"
        f" {figures['judge']}. The mean over all ways to choose N of {figures['num_candidates']} candidates a caption,"
        " so N = 1 is a picture at random. In brackets 95 % intervals from resampling the captions. Perfect ranking:"
        f" all candidates ranked by the judge itself. Gap: that between N = 1 {base} and the real pictures.",
        make_table(head, rows),
        *(f"![Quality of the best of N, {split}](reranking_{split}.png)" for split in figures["real"]),
    ]
    return "\n\n".join(parts)


def _describe_row(name: str, split: str, quality: str, curves: dict, real: dict) -> list[str]:
    points = [
        f"{point['value']:.3f} ({point['low']:.3f} to {point['high']:.3f})" for point in curves["curve"].values()
    ]
    closed = [curves["gap_closed"][size] for size in _list_gap_sizes(curves["curve"])]
    shares = [_describe_gap(gap) for gap in closed]
    best = list(curves["best_possible"].values())[-1]
    return [name, split, quality, *points, f"{real['value']:.3f}", f"{best:.3f}", *shares]


def _describe_gap(gap: dict | None) -> str:
    if gap is None:
        return "no gap"
    if gap["low"] is None:
        return f"{gap['value']:.0%} (the gap may be chance)"
    return f"{gap['value']:.0%} ({gap['low']:.0%} to {gap['high']:.0%})"


def _list_gap_sizes(sizes: Iterable[str]) -> list[str]:
    """32, from where on the paper's gains are small, and the largest N."""
    sizes = list(sizes)
    return [size for size in sizes if size == "32" or size == sizes[-1]]


def list_results(figures: dict) -> list[dict]:
    """Each model's best of all its candidates."""
    size = str(figures["num_candidates"])
    return [
        {
            "task": "text-to-image",
            "split": split,
            "metric_type": quality,
            "metric_name": f"{quality} of the best of {size} candidates, judged by {figures['judge']}",
            "value": curves[quality]["curve"][size]["value"],
            "model": name,
        }
        for name, model in figures["models"].items()
        for split, curves in model["splits"].items()
        for quality in figures["qualities"]
    ]

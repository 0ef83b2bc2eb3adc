"""The measurement `elb`: the evidence lower bound on ln p(picture, caption) of DALL-Es with a likelihood of pixels.

The bound and its parts are `hf_dalle.evidence_lower_bound`'s; here are the rows, means with their errors, the table
and the figure. Models without a likelihood (folders, other pipelines, VQGANs) are named and left out.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from report_parts import make_table, spread

from evaluation import pictures
from evaluation.frame import Evaluation
from evaluation.models import Model
from hf_dalle import encode_captions
from hf_dalle.evidence_lower_bound import EvidenceLowerBound, evidence_lower_bound, logit_errors
from hf_dalle.metrics import bits_per_dim


USES_PICTURES = False
PARTS = {
    "picture": "E ln p(x|z)",
    "entropy": "H(q)",
    "tokens": "E ln p(z|y)",
    "text": "ln p(y)",
}
SHARD_SIZE = 16


@dataclass
class Settings:
    """How the bound is measured."""

    num_samples: int = field(default=8, metadata={"help": "Samples of each picture's tokens from q(z | x)."})
    max_rows: int | None = field(
        default=None, metadata={"help": "Of each split, so many rows, evenly over it; none: all."}
    )
    scale: Literal["decoder", "fitted"] = field(
        default="decoder",
        metadata={"help": "Of the likelihood: the decoder's; fitted: a constant around what is shown."},
    )
    min_log_b: float | None = field(
        default=None, metadata={"help": "Floor under the decoder's ln b, where training had it; none: as it stands."}
    )
    fit_split: str = field(default="train", metadata={"help": "With `scale: fitted`: not one that is measured."})
    num_fit_pictures: int = field(default=256, metadata={"help": "With `scale: fitted`, at most."})
    betas: dict = field(
        default_factory=dict, metadata={"help": "By a model's name the weight of its KL that training ended at."}
    )
    max_batch_size: int | None = field(
        default=None, metadata={"help": "Samples of a picture computed at once; none: all."}
    )

    def __post_init__(self):
        if self.num_samples < 2:
            raise ValueError(f"`num_samples` is {self.num_samples}; a standard error takes 2 or more.")
        for name in ("max_rows", "num_fit_pictures", "max_batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected a number from 1.")
        if self.scale == "fitted" and self.min_log_b is not None:
            raise ValueError("`min_log_b` does nothing with `scale: fitted`: the constant takes the decoder's place.")
        for name, beta in self.betas.items():
            if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0 <= beta < math.inf:
                raise ValueError(f"`betas` gives {beta!r} for {name}; expected a number from 0.")


def check(evaluation: Evaluation, settings: Settings) -> None:
    """Refuses an evaluation in which no model has a bound, or whose fit is on what it measures."""
    reasons = {model.name: find_obstacle(model) for model in evaluation.models.values()}
    if all(reasons.values()):
        raise ValueError(f"`elb`: no model has a bound: {'; '.join(f'{n}: {r}' for n, r in reasons.items())}.")
    unknown = sorted(set(settings.betas) - {name for name, reason in reasons.items() if reason is None})
    if unknown:
        raise ValueError(f"`elb`: `betas` names {unknown[0]!r}, which is no model that has a bound here.")
    if settings.scale == "fitted":
        if settings.fit_split in evaluation.args.splits:
            raise ValueError(
                f"`elb`: `fit_split` is {settings.fit_split!r}, which is measured: a scale that is fitted to the"
                " measured pictures gives no bound."
            )
        choose_fit_rows(evaluation, settings)


def find_obstacle(model: Model) -> str | None:
    """Why a model has no bound, in words; `None` if it has one."""
    if not model.is_drawn:
        return "a folder of pictures has no likelihood"
    if not model.is_dalle:
        return "its pipeline has no dVAE and prior"
    index = json.loads((model.folder / "model_index.json").read_text(encoding="utf-8"))
    kind = (index.get("dvae") or [None, None])[1]
    return None if kind == "DalleDVAE" else f"its {kind} has no likelihood of pixels"


def choose_measured(rows: list[int], settings: Settings) -> list[int]:
    """`max_rows` of a split's rows. Data often lie in the order of their classes, so that the first are of few."""
    return [rows[place] for place in spread(len(rows), settings.max_rows or len(rows))]


def choose_fit_rows(evaluation: Evaluation, settings: Settings) -> pictures.Rows:
    """The pictures that a constant scale is fitted to."""
    changes = {"splits": [settings.fit_split], "num_captions": settings.num_fit_pictures, "captions": "first"}
    return evaluation.on_main_first(lambda: pictures.choose_rows(dataclasses.replace(evaluation.args, **changes)))


@torch.no_grad()
def measure(evaluation: Evaluation, settings: Settings) -> dict:
    """The figures of each model and split; all processes compute, the main one's value counts."""
    figures = {"settings": dataclasses.asdict(settings), "seed": evaluation.seed, "models": {}, "skipped": {}}
    rows = {split: choose_measured(evaluation.rows.of_split(split), settings) for split in evaluation.args.splits}
    for name, model in evaluation.models.items():
        reason = find_obstacle(model)
        if reason is not None:
            figures["skipped"][name] = reason
            continue
        log_b = fit_scale(evaluation, settings, model) if settings.scale == "fitted" else None
        parts = compute_parts(evaluation, settings, model, log_b, [row for part in rows.values() for row in part])
        first, figures["models"][name] = 0, {}
        for split, part in rows.items():
            own = EvidenceLowerBound(*(a[first : first + len(part)] for a in parts[:-1]), num_dims=parts[-1])
            first += len(part)
            summary = summarize(own, settings.betas.get(name)) | {"split": split, "log_b": log_b}
            figures["models"][name][split] = summary
            if summary["pixel_bits_per_dim"] > 8 and log_b is None:
                evaluation.warn(
                    f"elb: {name} needs {summary['pixel_bits_per_dim']:.1f} bits a dimension for pixels of 8 bits,"
                    " their tokens given: was its likelihood's scale trained? `scale: fitted` fits a constant."
                )
    return figures


def compute_parts(
    evaluation: Evaluation, settings: Settings, model: Model, log_b: float | None, rows: list[int]
) -> tuple:
    """The parts of the bound for these rows, in the order of [`EvidenceLowerBound`]."""
    names = [item.name for item in dataclasses.fields(EvidenceLowerBound)][:-1]
    scale = {"log_b": log_b, "min_log_b": settings.min_log_b}

    def compute_shard(shard: list[int]) -> dict[str, np.ndarray]:
        pipe = evaluation.load_pipeline(model)
        pixel_values = pipe.image_processor.preprocess([evaluation.rows.picture(row) for row in shard])["pixel_values"]
        captions = [evaluation.rows.captions[row] for row in shard]
        text = encode_captions(pipe.tokenizer, captions, pipe.prior.config.text_length)
        # a row's samples are its own: they hang on the seed and the row alone
        generators = [pictures.make_generator(evaluation.seed, evaluation.rows.ids[row], "elb") for row in shard]
        parts = evidence_lower_bound(
            *(pipe.dvae, pipe.prior, pixel_values, text["input_ids"], text["attention_mask"], generators),
            num_samples=settings.num_samples,
            max_batch_size=settings.max_batch_size,
            **scale,
        )
        return {name: parts[name] for name in names} | {"num_dims": np.full(len(shard), parts.num_dims)}

    key = {"pipeline": model.fingerprint, "dtype": model.given.dtype, "seed": evaluation.seed, **scale}
    key |= {"num_samples": settings.num_samples, "max_batch_size": settings.max_batch_size}
    arrays = evaluation.compute("elb", key, rows, compute_shard, SHARD_SIZE, f"{model.name}: ELB")
    return (*(torch.from_numpy(arrays[name]) for name in names), int(arrays["num_dims"][0]))


def fit_scale(evaluation: Evaluation, settings: Settings, model: Model) -> float:
    """The likeliest constant ln b of a model for the pictures of `fit_split`."""
    rows = choose_fit_rows(evaluation, settings)

    def compute_shard(shard: list[int]) -> dict[str, torch.Tensor]:
        pipe = evaluation.load_pipeline(model)
        pixel_values = pipe.image_processor.preprocess([rows.picture(row) for row in shard])["pixel_values"]
        return {"errors": torch.cat([logit_errors(pipe.dvae, picture[None]) for picture in pixel_values])}

    key = {"pipeline": model.fingerprint, "dtype": model.given.dtype}
    key |= {"rows": evaluation.from_main(lambda: pictures.fingerprint_rows(rows))}
    words = f"{model.name}: scale of the likelihood"
    errors = evaluation.compute("elb-scale", key, range(len(rows)), compute_shard, SHARD_SIZE, words)["errors"]
    return math.log(math.fsum(errors) / len(errors))


def summarize(parts: EvidenceLowerBound, beta: float | None = None) -> dict:
    """Means over pictures, in nats and bits a dimension, with the standard errors of the bounds."""
    num_pictures, num_dims = len(parts.text), parts.num_dims
    bound, picture, text = (_mean(values) for values in (parts.bound, parts.picture, parts.text))
    figures = {
        "num_pictures": num_pictures,
        "num_dims": num_dims,
        "bound": bound,
        # how far off the mean over these pictures is for lack of samples; over all pictures for lack of pictures
        "sample_error": math.sqrt(math.fsum(parts.sample_error.square().tolist())) / num_pictures,
        "picture_error": _error(parts.bound),
        "parts": {name: _mean(getattr(parts, name)) for name in PARTS},
        "argmax_bound": _mean(parts.argmax_bound),
        "argmax_picture_error": _error(parts.argmax_bound),
        "argmax_parts": {"picture": _mean(parts.argmax_picture), "tokens": _mean(parts.argmax_tokens), "text": text},
        "bits_per_dim": bits_per_dim(-bound, num_dims),
        "bits_per_dim_given_caption": bits_per_dim(text - bound, num_dims),
        "pixel_bits_per_dim": bits_per_dim(-picture, num_dims),
    }
    if beta is not None:
        figures |= {"beta": beta, "objective": _mean(parts.objective(beta))}
    return figures


def _mean(values: torch.Tensor) -> float:
    return math.fsum(values.flatten().tolist()) / values.numel()


def _error(values: torch.Tensor) -> float | None:
    """The standard error of the mean over pictures; `None` for one."""
    if len(values) < 2:
        return None
    return (values.std(correction=1) / math.sqrt(len(values))).item()


# ------------------------------------------------------------------------------------------------------------- report


def list_summaries(figures: dict) -> Iterator[tuple[str, dict]]:
    """(model, figures of a split), in the order of the table."""
    for name, splits in figures["models"].items():
        for summary in splits.values():
            yield name, summary


def describe(figures: dict) -> str:
    """The report's section."""
    settings, summaries = figures["settings"], [summary for _, summary in list_summaries(figures)]
    lines = [
        "## Evidence lower bound",
        "",
        "ln p(x, y) >= E ln p(x|z) + H(q) + E ln p(z|y) + ln p(y), of a picture x and its caption y, expectations"
        f" over q(z|x) by {settings['num_samples']} samples of each picture, H(q) in closed form (paper, section 2,"
        " beta = 1). Higher is better. `argmax` is the bound of the one-hot posterior at the encoder's likeliest"
        " tokens, whose entropy is 0; with nearest codes the two are one. Means over pictures in nats; after +- the"
        " standard error over pictures and, in brackets, that of having so many samples only.",
        "",
        make_table(
            ["model", "split", "pictures", "bound", *PARTS.values()]
            + ["argmax bound", "bits a dimension", "given the caption"],
            [_describe_row(name, summary) for name, summary in list_summaries(figures)],
        ),
        "",
        "Pixels count as continuous numbers in 0 ... 255, a density ln f(phi(x)) + ln((1 - 2 eps)/255) a channel: it"
        " is no length of a code, and may be above 0. Bits a dimension are -bound / (3 H W ln 2), of caption and"
        " picture together and of the picture given its caption; they compare models of pictures of one size only"
        f" ({_list_sizes(summaries)}). ln p(y) is the likelihood of the caption's one segmentation into tokens, pads"
        " counted: a lower bound on the text's own, and comparable for one tokenizer only.",
        "",
        "![The bound and its parts](elb.png)",
    ]
    if settings["scale"] == "fitted":
        scales = {name: next(iter(splits.values()))["log_b"] for name, splits in figures["models"].items()}
        fits = ", ".join(f"{name} {log_b:.3f}" for name, log_b in scales.items())
        lines += [
            "",
            "The likelihood is not the decoder's own, but a logit-Laplace of one scale a model around the picture that"
            f" it shows, ln b fitted to `{settings['fit_split']}`: {fits}.",
        ]
    elif settings["min_log_b"] is not None:
        lines += ["", f"ln b of the likelihood is the decoder's, {settings['min_log_b']:g} at least."]
    objectives = [
        f"{name}, {summary['split']}: {summary['objective']:,.1f} nats at beta = {summary['beta']:g}"
        for name, summary in list_summaries(figures)
        if "objective" in summary
    ]
    if objectives:
        lines += [
            "",
            f"The objective of training weighs the KL divergence by beta and is no bound: {'; '.join(objectives)}.",
        ]
    lines += [line for name, reason in figures["skipped"].items() for line in ("", f"{name} is left out: {reason}.")]
    return "\n".join(lines) + "\n"


def _describe_row(name: str, summary: dict) -> list[str]:
    return [
        *(name, summary["split"], str(summary["num_pictures"])),
        f"{summary['bound']:,.1f}{_plus_minus(summary['picture_error'])} ({summary['sample_error']:.2g})",
        *(f"{summary['parts'][part]:,.1f}" for part in PARTS),
        f"{summary['argmax_bound']:,.1f}{_plus_minus(summary['argmax_picture_error'])}",
        *(f"{summary[bits]:.3f}" for bits in ("bits_per_dim", "bits_per_dim_given_caption")),
    ]


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" +- {error:,.1f}"


def _list_sizes(summaries: list[dict]) -> str:
    sides = sorted({math.isqrt(summary["num_dims"] // 3) for summary in summaries})
    return ", ".join(f"{side} x {side}" for side in sides)


def plot(figures: dict, folder: Path) -> dict[str, str]:
    """What the bound is made of, a panel a part."""
    from matplotlib.figure import Figure

    rows = list(list_summaries(figures))
    panels = {**PARTS, "bound": "the sum, the bound"}
    figure = Figure(figsize=(12, 1.3 + 0.4 * len(rows)), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True)
    for axes, (part, words) in zip(all_axes, panels.items(), strict=True):
        values = [summary["bound"] if part == "bound" else summary["parts"][part] for _, summary in rows]
        errors = [summary["picture_error"] or 0.0 for _, summary in rows] if part == "bound" else None
        axes.barh(range(len(rows)), values, 0.6, xerr=errors, error_kw={"capsize": 3})
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(words, fontsize="medium")
        axes.locator_params(axis="x", nbins=3)
        axes.tick_params(axis="x", labelsize="small")
    all_axes[0].set_yticks(range(len(rows)), [f"{name}, {summary['split']}" for name, summary in rows])
    all_axes[0].invert_yaxis()
    figure.supxlabel("nats a picture, an axis of its own each; the bound with its standard error over pictures")
    figure.savefig(folder / "elb.png", dpi=100)
    return {"elb": "elb.png"}


def list_results(figures: dict) -> list[dict]:
    """Entries for a card's model-index: the bound in nats, and in bits a dimension given the caption."""
    results = []
    for name, summary in list_summaries(figures):
        entry = {"task": "text-to-image", "split": summary["split"], "model": name}
        bound = {"metric_type": "elb", "metric_name": "ELB on ln p(picture, caption), nats, density of 8-bit pixels"}
        bits = {"metric_type": "bits_per_dim", "metric_name": "bits a dimension given the caption, by the ELB"}
        results.append({**entry, **bound, "value": summary["bound"]})
        results.append({**entry, **bits, "value": summary["bits_per_dim_given_caption"]})
    return results

"""Writes what `evaluate_concepts.py` measured: report.json, report.md for a reader, grids and curves as PNG files.

Nothing is measured here. What the report is put together from lives in `report_parts.py`; a model's card is made by
`render_card.py`.
"""

import json
from pathlib import Path

import matplotlib.figure
import torch
from diffusers.utils import make_image_grid
from PIL import Image
from report_parts import draw_entries, make_table, save_png, spread


NUM_GRID_ROWS = 30
NUM_PAIRS = 32
NUM_RECONSTRUCTIONS = 10
ROWS = {"real": "real pictures", "reconstructions": "their reconstructions", "drawn": "drawn from their captions"}
CURVES = {
    "dvae": {"loss": ["loss"], "PSNR, dB": ["validation_psnr"], "perplexity": ["train_perplexity"]},
    "prior": {"loss": ["loss", "validation_loss"], "image loss, nats": ["image_loss", "validation_image_loss"]},
    "reranker": {"loss": ["loss"], "recall@5": ["validation_recall@5", "validation_reconstruction_recall@5"]},
}

HOW_JUDGED = """\
Judged by {judge}, which this project did not train, after every
picture, real, reconstructed or drawn, is reduced to the side that the table names. recall@k: the caption's concept is
among the k nearest of all by the cosine of features (standardised, the style's mean taken off) to each concept's mean
over training pictures. style: a ridge probe, taught on training pictures, names the caption's style. One picture is
drawn a caption, from one seed, by the defaults, without reranking. In brackets 95 % intervals from resampling the
pictures; they say nothing of other seeds or of another training run.

A training picture is left out of the mean that it, its reconstruction and what is drawn from its caption are compared
with, and the pictures of `train` below did not teach the probe. Pictures of a `fold` take no part in the judge. Where
no training picture shows the concepts, their means are those of the split's own real pictures in the other styles."""
HOW_COPIES = """\
For each drawn picture the nearest training picture of the same concept: root of the mean squared difference of pixels
at 32 x 32, between the drawn picture and the training picture as the dVAE reconstructs it (so a picture drawn of the
very same tokens is at 0; one that is shifted is not). Emoji sets share designs, so nearness alone is no proof: the
threshold, {threshold:.3f}, is where 5 % of the training pictures have another style's picture of their concept that
near. Beside it, the share of the split's own real pictures (reconstructed) that are as near to a training picture
other than themselves. Captions of `train` were trained on with their pictures."""


def write_report(
    folder: Path, report: dict, splits: dict, made: dict, pairs: dict, samples: torch.Tensor, metrics: dict[str, Path]
) -> None:
    """
    Writes the report and its pictures.

    Args:
        folder (`Path`): where to.
        report (`dict`): of `evaluate_concepts.py`; gets `"pictures"`.
        splits, made, pairs (`dict`): by split, what was read, what the checkpoint made of it, and
            drawn pictures with the nearest training picture.
        samples (`torch.Tensor`): n pictures a caption of `report["samples"]`, B * n x 3 x H x W in [0, 1].
        metrics (`dict`): by stage the log of its training run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}

    def add(key: str, image: Image.Image, name: str | None = None):
        save_png(image, folder / (name or f"{key}.png"))
        pictures[key] = name or f"{key}.png"

    first = next(iter(splits))
    if len(samples):
        num_images = report["samples"]["num_images"]
        add("samples", make_image_grid(to_images(samples), rows=len(samples) // num_images, cols=num_images))
        pictures["widget"] = []
        for index, image in enumerate(to_images(samples[::num_images])):
            pictures["widget"].append(f"sample_{index}.png")
            save_png(image, folder / pictures["widget"][-1])
    shown = "validation" if "validation" in made else first
    chosen = spread(len(made[shown].drawn), NUM_RECONSTRUCTIONS)
    both = [*made[shown].pixel_values[chosen], *made[shown].reconstructions[chosen]]
    add("reconstructions", make_image_grid(to_images(both), rows=2, cols=len(chosen)))
    for name, split in splits.items():
        add(name, draw_split_grid(split, made[name]))
    for name in sorted(pairs, key=lambda name: (not name.startswith("test"), name == "train"))[:1]:
        add("nearest", draw_pairs(pairs[name]))
        report["splits"][name]["copies"]["is_shown"] = True
    if metrics:
        draw_curves(metrics, folder / "training.png")
        pictures["curve"] = "training.png"
    report["pictures"] = pictures
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(describe(report), encoding="utf-8")


def to_images(pictures: torch.Tensor | list[torch.Tensor]) -> list[Image.Image]:
    """Pictures, 3 x H x W in [0, 1], as PIL's."""
    arrays = [(picture.permute(1, 2, 0) * 255).round().byte().numpy() for picture in pictures]
    return [Image.fromarray(array) for array in arrays]


def draw_split_grid(split, made) -> Image.Image:
    """Real picture, reconstruction and drawn picture of rows spread over the split, in two columns, with captions."""
    entries = []
    for index in spread(len(split), NUM_GRID_ROWS):
        of_model = to_images([made.reconstructions[index], made.drawn[index]])
        entries.append(([split.pictures[index], *of_model], split.captions[index]))
    return draw_entries(entries, ["real", "reconstructed", "drawn"], num_columns=2)


def draw_pairs(pairs: list) -> Image.Image:
    """Drawn pictures beside their nearest training picture: from the nearest of all evenly to the farthest."""
    pairs = sorted(pairs, key=lambda pair: pair.distance)
    entries = []
    for index in spread(len(pairs), NUM_PAIRS):
        pair = pairs[index]
        entries.append(([to_images([pair.drawn])[0], pair.nearest], f"{pair.distance:.3f}: {pair.caption}"))
    return draw_entries(entries, ["drawn", "nearest"], num_columns=2)


def draw_curves(metrics: dict[str, Path], path: Path) -> None:
    """The losses and the validation figures of each stage, by update."""
    panels = [(stage, words, names) for stage in metrics for words, names in CURVES[stage].items()]
    figure = matplotlib.figure.Figure(figsize=(3.6 * len(panels), 2.8), layout="constrained")
    for axes, (stage, words, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        rows = [json.loads(line) for line in metrics[stage].read_text(encoding="utf-8").splitlines()]
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            axes.plot(*zip(*(points or [(0, None)]), strict=True), label=name, linewidth=1)
        axes.set(title=f"{stage}: {words}", xlabel="updates")
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=90)


def describe(report: dict) -> str:
    """The report's tables and pictures, in Markdown."""
    sections = [_describe_model(report), _describe_dvae(report), _describe_rows(report), _describe_copies(report)]
    return "\n\n".join(section for section in [*sections, _describe_runs(report)] if section) + "\n"


def _interval(figure: dict, digits: int = 2) -> str:
    return f"{figure['value']:.{digits}f} [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"


def _picture(report: dict, key: str, words: str) -> str:
    return f"\n\n![{words}]({report['pictures'][key]})" if key in report["pictures"] else ""


def _describe_model(report: dict) -> str:
    model = report["model"]
    rows = [[f"parameters of the {part}", f"{number:,}"] for part, number in model["num_parameters"].items()]
    rows.append(["size on disk", f"{model['size_in_bytes'] / 1e6:.1f} MB"])
    for stage, run in report["training"].items():
        if "hours" in run:
            words = f"{run['updates']:,} updates, {run['pictures']:,} pictures, {run['hours']:.2f} hours"
            rows.append([f"training of the {stage}", words])
    settings = ", ".join(f"{name} {value:g}" for name, value in model["generation"].items())
    samples = ""
    if "samples" in report:
        samples = _picture(report, "samples", "Pictures drawn from captions, a row each")
        rows_of = [f"{row}. {prompt}" for row, prompt in enumerate(report["samples"]["prompts"], start=1)]
        samples += f"\n\nRows, seed {report['samples']['seed']}, as they came:\n\n" + "\n".join(rows_of)
    curve = _picture(report, "curve", "Losses and validation figures by update")
    return (
        f"# {report['name']}, measured on {report['evaluated']}\n\n{make_table(['', ''], rows)}\n\nDrawn with the"
        f" checkpoint's defaults: {settings}.{samples}{curve}"
    )


def _describe_dvae(report: dict) -> str:
    rows = [
        [name, figures["num_pictures"], _interval(figures["psnr"]), f"{figures['perplexity']:.0f}"]
        for name, figures in report["dvae"].items()
    ]
    vocab_size = next(iter(report["dvae"].values()))["vocab_size"]
    return (
        "## The dVAE\nPictures encoded and decoded: the mean PSNR of a split's pictures with its 95 % bootstrap"
        f" interval, and how many of the {vocab_size} codes are in use, in effect (which few pictures limit).\n\n"
        + make_table(["split", "pictures", "PSNR, dB", "perplexity of the codes"], rows)
        + _picture(report, "reconstructions", "Pictures above, their reconstructions below")
    )


def _describe_rows(report: dict) -> str:
    text = "## Concepts and styles\n" + HOW_JUDGED.format(judge=report["judge"]["name"])
    for name, measured in report["splits"].items():
        rows = []
        for side, figures in measured["sides"].items():
            for row, words in ROWS.items():
                cells = [_interval(figures[row][key]) for key in ("recall@1", "recall@5", "style")]
                rows.append([words, f"{side} x {side}", *cells])
        text += (
            f"\n\n### {name}\n{measured['num_pictures']} pictures, {measured['num_concepts']} concepts to choose from,"
            f" seed {measured['seed']}. The prior's image loss: {measured['image_loss']:.3f} nats a token.\n\n"
            + make_table(["", "side", "recall@1", "recall@5", "style"], rows)
            + _picture(report, name, f"{name}: rows spread evenly over the split")
        )
    return text


def _describe_copies(report: dict) -> str:
    measured = {name: split["copies"] for name, split in report["splits"].items() if "copies" in split}
    if not measured:
        return ""
    rows = [
        [name, copies["num_pictures"], f"{100 * copies['share']:.1f} %", f"{100 * copies['share_real']:.1f} %"]
        for name, copies in measured.items()
    ]
    shown = next((name for name, copies in measured.items() if copies.get("is_shown")), "")
    threshold = next(iter(measured.values()))["threshold"]
    return (
        f"## How much is copied\n{HOW_COPIES.format(threshold=threshold)}\n\n"
        + make_table(["captions of", "drawn pictures", "near-duplicates", "of real pictures"], rows)
        + _picture(report, "nearest", f"{shown}: drawn and nearest, from the nearest of all to the farthest")
    )


def _describe_runs(report: dict) -> str:
    if not report["runs"]:
        return ""
    rows = [[run["date"], f"`{run['checkpoint']}`", ", ".join(run["splits"])] for run in report["runs"]]
    return "## Every run on a test split\n" + make_table(["date", "checkpoint", "splits"], rows)

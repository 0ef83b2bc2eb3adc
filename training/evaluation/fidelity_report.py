"""The report's section on fidelity: tables of figures, and their curves over the radius of the blur.

Nothing is computed here. Solid lines are of all real pictures, dashed ones without those that overlap training ones.
"""

from pathlib import Path

import matplotlib.figure
from report_parts import make_table


CURVES_PNG, SIZES_PNG, DPI = "fidelity.png", "fidelity_sizes.png", 110
DIGITS = {"fd": 2, "kd": 4, "is": 2, "precision": 3, "recall": 3}
BETTER = {"fd": "lower", "kd": "lower", "is": "higher", "precision": "higher", "recall": "higher"}

HOW = """\
Every picture{prepared} is blurred by a Gaussian whose standard deviation is the radius, in pixels,
rounded to 8 bits and shown to {network}.
Both sides are blurred alike, {num_real:,} real and {num_drawn:,} drawn pictures a model. The squared Fréchet distance
and the Inception Score (the mean of {num_splits} parts) are biased by the number of pictures: compare them at the same
number only. The kernel distance ({num_subsets} random subsets of at most {subset_size:,}) is unbiased. These three are
torchmetrics'. Precision is the share of drawn pictures in the real ones' manifold, recall the reverse, by
{num_neighbours} neighbours."""
HOW_INTERVALS = """\
In brackets 95 % intervals: {num_resamples} resamples of the real and of the drawn pictures, independently; a resample
repeats pictures and so moves FD and IS, which is taken off again. For precision and recall the manifolds stay.
They say nothing of other seeds or another training run."""
FEW = """\
**Fewer pictures than features ({num_features:,}): the covariances are singular, and {fd} is mostly bias. It may be
compared between models on these very rows, with no figure elsewhere.**"""


def describe(figures: dict) -> str:
    """The section of the report."""
    settings = figures["settings"]
    side = settings["side"]
    prepared = (
        "" if side is None else f", its centre square resized to {side} x {side} (Pillow's bicubic, antialiased),"
    )
    parts = ["## Fidelity", HOW.format(prepared=prepared, **{**settings, **figures})]
    if settings["num_resamples"]:
        parts.append(HOW_INTERVALS.format(**settings))
    if min(figures["num_real"], figures["num_drawn"]) <= figures["num_features"]:
        parts.append(FEW.format(num_features=figures["num_features"], fd=figures["names"]["fd"]))
    parts.append(f"![Figures over the radius of the blur]({CURVES_PNG})")
    for key, name in figures["names"].items():
        rows = list_rows(figures, key)
        if rows:
            head = [f"{name} ({BETTER[key]} is better), blur", *figures["real"]]
            parts.append(make_table(head, rows))
    if figures["num_kept"] is not None:
        parts.append(
            f"Without overlap: against the {figures['num_kept']:,} of {figures['num_real']:,} real pictures that are"
            " near no training picture; the drawn pictures are the same."
        )
    if figures["sizes"]:
        parts += _describe_sizes(figures)
    return "\n\n".join(parts)


def list_rows(figures: dict, key: str) -> list[list[str]]:
    """Of one figure a line a model and curve; for the score one of the real pictures too."""
    rows = []
    for curve, words in (("all", ""), ("no_overlap", ", without overlap")):
        for name, radii in figures["models"].items():
            entries = [curves.get(curve, {}).get(key) for curves in radii.values()]
            if any(entries):
                rows.append([name + words, *(_write(entry, key) for entry in entries)])
    if key == "is" and any(figures["real"].values()):
        rows.append(["the real pictures", *(_write(entry, key) for entry in figures["real"].values())])
    return rows


def _write(entry: dict | None, key: str) -> str:
    if entry is None:
        return ""
    digits = DIGITS[key]
    interval = f" [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]" if "low" in entry else ""
    return f"{entry['value']:.{digits}f}{interval}"


def _describe_sizes(figures: dict) -> list[str]:
    name, radius = figures["names"]["fd"], next(iter(figures["real"]))
    rows = [
        [model, *(f"{value:.2f}" for value in each["values"]), f"{each['limit']:.2f}"]
        for model, each in figures["sizes"].items()
    ]
    sizes = next(iter(figures["sizes"].values()))["sizes"]
    few = " Of fewer pictures than features the line is none, and the limit is not to be trusted."
    return [
        f"{name} at blur {radius} of fewer real and as many drawn pictures, and the limit of the line through them"
        f" over 1 / N (Chong and Forsyth, 2020).{few if sizes[0] <= figures['num_features'] else ''}",
        f"![{name} over 1 / N]({SIZES_PNG})",
        make_table([f"{name}, pictures", *(f"{size:,}" for size in sizes), "limit"], rows),
    ]


def plot(figures: dict, folder: Path) -> dict[str, str]:
    """Writes the curves, and FD over 1 / N; gives their names."""
    keys = [key for key in figures["names"] if list_rows(figures, key)]
    figure = matplotlib.figure.Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    radii = [float(radius) for radius in figures["real"]]
    lines = {}
    for axis, key in zip(axes, keys, strict=False):
        for index, (name, by_radius) in enumerate(figures["models"].items()):
            _draw(axis, radii, [curves["all"].get(key) for curves in by_radius.values()], f"C{index}", "-", name)
            dashed = [curves.get("no_overlap", {}).get(key) for curves in by_radius.values()]
            _draw(axis, radii, dashed, f"C{index}", "--", f"{name}, without overlap")
        if key == "is":
            _draw(axis, radii, list(figures["real"].values()), "black", ":", "the real pictures")
        axis.set(title=f"{figures['names'][key]} ({BETTER[key]} is better)", xlabel="radius of the blur, pixels")
        axis.set_xticks(radii)
        axis.grid(alpha=0.3)
        lines |= {line.get_label(): line for line in axis.lines}
    for axis in axes[len(keys) :]:
        axis.axis("off")
    axes[-1].legend(lines.values(), lines.keys(), loc="center", frameon=False)
    figure.savefig(folder / CURVES_PNG, dpi=DPI)
    written = {"fidelity": CURVES_PNG}
    if figures["sizes"]:
        _plot_sizes(figures, folder / SIZES_PNG)
        written["fidelity_sizes"] = SIZES_PNG
    return written


def _draw(axis, radii: list[float], entries: list[dict | None], color: str, style: str, label: str) -> None:
    """One curve, with its interval where there is one; of a dashed one, which is near, without."""
    if not any(entries):
        return
    axis.plot(radii, [entry["value"] for entry in entries], style, color=color, marker=".", label=label)
    if style != "--" and all("low" in entry for entry in entries):
        lows, highs = ([entry[end] for entry in entries] for end in ("low", "high"))
        axis.fill_between(radii, lows, highs, color=color, alpha=0.15, linewidth=0)


def _plot_sizes(figures: dict, path: Path) -> None:
    figure = matplotlib.figure.Figure(figsize=(5, 3.6), layout="constrained")
    axis = figure.subplots()
    for index, (name, each) in enumerate(figures["sizes"].items()):
        inverses = [1 / size for size in each["sizes"]]
        axis.plot(inverses, each["values"], "o", color=f"C{index}", label=name)
        axis.plot([0, inverses[0]], [each["limit"], each["limit"] + each["slope"] * inverses[0]], color=f"C{index}")
    axis.set_xticks(inverses, [f"1/{size}" for size in each["sizes"]], fontsize=7, rotation=45)
    axis.set(title=f"{figures['names']['fd']} by the number of pictures", xlabel="1 / N; at 0 as many as one likes")
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=DPI)


def list_results(figures: dict) -> list[dict]:
    """For the card: the figures without blur, of all real pictures."""
    results, radius = [], next(iter(figures["real"]))
    if float(radius):
        return results
    for model, radii in figures["models"].items():
        for key, entry in radii[radius]["all"].items():
            name = f"{figures['names'][key]} ({figures['num_real']:,} real, {figures['num_drawn']:,} drawn pictures)"
            results.append(
                {
                    "task": "text-to-image",
                    "split": figures["split"],
                    "metric_type": figures["names"][key].lower(),
                    "metric_name": name,
                    "value": entry["value"],
                    "model": model,
                }
            )
    return results

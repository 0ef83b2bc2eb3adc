"""The page of pairs by which a person sets the threshold of overlap: one HTML file, which needs nothing beside it.

Pictures are in it as small JPEGs, and all similarities: its counts are of all pictures, not only of those shown.
"""

import base64
import html
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from evaluation.pictures import write_whole


THUMBNAIL = 128  # the longer side, in pixels
START = 0.9  # the slider's place where no threshold is set

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>Overlap with the training pictures</title>
<style>
  :root {{ color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }}
  body {{ margin: 0 auto; max-width: 75rem; padding: 1rem; }}
  .bar {{ position: sticky; top: 0; z-index: 1; background: Canvas; padding: .6rem 0; }}
  .bar label {{ display: flex; gap: .8rem; align-items: center; }}
  input[type=range] {{ flex: 1; }}
  input[type=number] {{ width: 5.5rem; font: inherit; }}
  code {{ user-select: all; padding: .1rem .4rem; border: 1px solid GrayText; border-radius: .3rem; }}
  #histogram {{ width: 100%; height: 5rem; display: block; }}
  #histogram rect {{ fill: #888; }}
  #histogram rect.over {{ fill: #c2410c; }}
  .scale {{ display: flex; justify-content: space-between; font-size: .8rem; }}
  ol {{ list-style: none; padding: 0; display: grid; gap: .6rem; }}
  ol {{ grid-template-columns: repeat(auto-fill, minmax(17.5rem, 1fr)); }}
  li {{ border: 3px solid #888; border-radius: .5rem; padding: .4rem; }}
  li.over {{ border-color: #c2410c; }}
  li .pictures {{ display: flex; gap: .3rem; justify-content: center; }}
  li img {{ width: 128px; height: 128px; object-fit: contain; background: #fff; }}
  li p {{ margin: .2rem 0 0; font-size: .8rem; overflow-wrap: anywhere; }}
  li .state::before {{ content: "kept"; }}
  li.over .state::before {{ content: "overlaps"; font-weight: bold; }}
</style>
</head>
<body>
<h1>Overlap with the training pictures</h1>
<p>Each pair is a real picture (left) and the training picture nearest to it (right), by the cosine of features:
{network}. Move the slider to where pairs stop showing the same picture. Those at or above it count as overlapping.
Shown are {num_pairs} pairs of all {num_pictures}, as many of each hundredth of similarity; the counts are of all.</p>
<div class="bar">
  <label>Threshold
    <input type="range" id="slider" min="{low}" max="1" step="0.001" value="{threshold}">
    <input type="number" id="number" min="-1" max="1" step="0.001" value="{threshold}" aria-label="In figures">
  </label>
  <p><output id="counts" for="slider number"></output>
    Into the settings of <code>overlap</code>: <code id="line"></code></p>
</div>
<svg id="histogram" viewBox="0 0 100 100" preserveAspectRatio="none" role="img"
  aria-label="How many real pictures have which similarity"></svg>
<div class="scale"><span>{low}</span><span>how many real pictures have which similarity</span><span>1</span></div>
<ol>
{pairs}
</ol>
<script type="application/json" id="similarities">{similarities}</script>
<script>
"use strict";
const similarities = JSON.parse(document.getElementById("similarities").textContent);  // falling
const slider = document.getElementById("slider"), number = document.getElementById("number");
const histogram = document.getElementById("histogram"), low = Number(slider.min);
const bins = new Array(80).fill(0), bars = [];
for (const value of similarities) {{
  bins[Math.min(bins.length - 1, Math.max(0, Math.floor((value - low) / (1 - low) * bins.length)))] += 1;
}}
const most = Math.max(...bins);
bins.forEach((count, place) => {{
  const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  const height = count / most * 100, width = 100 / bins.length;
  const box = {{x: place * width, width: width * 0.9, y: 100 - height, height: height}};
  for (const name in box) bar.setAttribute(name, box[name]);
  bars.push([low + (place + 0.5) / bins.length * (1 - low), histogram.appendChild(bar)]);
}});
function show(threshold) {{
  const first = similarities.findIndex((value) => value < threshold);
  const over = first < 0 ? similarities.length : first;
  const share = (100 * over / similarities.length).toFixed(1);
  const words = `${{over}} of ${{similarities.length}} real pictures overlap (${{share}} %).`;
  document.getElementById("counts").textContent = words;
  document.getElementById("line").textContent = `threshold: ${{threshold}}`;
  for (const [middle, bar] of bars) bar.classList.toggle("over", middle >= threshold);
  for (const pair of document.querySelectorAll("li")) {{
    pair.classList.toggle("over", Number(pair.dataset.similarity) >= threshold);
  }}
}}
slider.addEventListener("input", () => {{ number.value = slider.value; show(Number(slider.value)); }});
number.addEventListener("input", () => {{
  if (number.value !== "" && number.validity.valid) {{ slider.value = number.value; show(Number(number.value)); }}
}});
show(Number(number.value));
</script>
</body>
</html>
"""


@dataclass
class Pair:
    """A real picture, the training picture nearest to it, their cosine, and what each is called."""

    real: Image.Image
    training: Image.Image
    similarity: float
    real_name: str
    training_name: str


def write_page(path: Path, similarities: np.ndarray, pairs: list[Pair], threshold: float | None, network: str) -> None:
    """
    Writes the page.

    Args:
        path (`Path`): of the HTML file.
        similarities (`np.ndarray`): of all real pictures.
        pairs (`list[Pair]`): those that are shown, most similar first.
        threshold (`float`, *optional*): the slider's place.
        network (`str`): in words.
    """
    ordered = np.sort(similarities)[::-1]
    text = PAGE.format(
        network=html.escape(network),
        num_pairs=f"{len(pairs):,}",
        num_pictures=f"{len(similarities):,}",
        low=f"{np.floor(10 * ordered[-1]) / 10:g}",
        threshold=f"{START if threshold is None else threshold:g}",
        pairs="\n".join(map(_describe_pair, pairs)),
        similarities=json.dumps([round(value, 5) for value in ordered.tolist()]),
    )
    write_whole(path, text)


def _describe_pair(pair: Pair) -> str:
    pictures = "".join(
        f'<img src="{_embed(picture)}" alt="{html.escape(name)}">'
        for picture, name in ((pair.real, pair.real_name), (pair.training, pair.training_name))
    )
    names = f"{html.escape(pair.real_name)} / {html.escape(pair.training_name)}"
    return (
        f'<li data-similarity="{pair.similarity:.5f}"><div class="pictures">{pictures}</div>'
        f'<p>{pair.similarity:.3f} <span class="state"></span><br>{names}</p></li>'
    )


def _embed(picture: Image.Image) -> str:
    """A picture as the address of an image."""
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"

"""The demo's page, for which the extra `demo` is needed: what a visitor sees, and the server that shows it.

What may be drawn is decided in `drawing_service.py`, which requests are let in, in `web_door.py`. Pictures go both
ways as part of the page's messages: no file is written, none is served.
"""

import base64
import html
import io
import json
import logging
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from starlette.middleware import Middleware

from .drawing_service import MAX_SEED, PNG_ADDRESS, Drawing, DrawingService, Rows
from .web_door import OWN_FONTS, PLAIN_PAGE, Door


logger = logging.getLogger(__name__)

MAX_EXAMPLES = 6
SHOWN_SIDE = 256  # about so many CSS pixels, a multiple of the picture's own
JOIN = "/gradio_api/queue/join"
LET_IN = {
    "GET": r"/|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static)(/[\w-][\w.-]*)+|"
    r"/gradio_api/(app_id|startup-events|queue/data|heartbeat/\w+)",
    "POST": rf"{JOIN}|/gradio_api/cancel",
}
SETTINGS = [
    ("guidance_scale", 1, "Guidance", "1 is none; above, the caption counts for more"),
    ("temperature", 0.05, "Temperature", "lower: likelier tokens, pictures more alike"),
]
BUSY = '<p id="said" role="status">{words} <progress aria-label="drawn" value="{value:.3f}" max="1"></progress></p>'
SAID = '<p id="said" role="status">{words}</p>'
REFUSED = '<p id="said" class="refused" role="alert">{words}</p>'
FIGURE = """\
<figure><img src="{address}" alt="{alt}" width="{width}" height="{height}"><figcaption>{words}</figcaption></figure>"""
SAVE = '<a download="{name}" href="{address}" aria-label="Save picture {number}">Save</a>'
CSS = """
.gradio-container { max-width: 1200px !important; margin: auto; }
#gallery .pictures { display: flex; flex-wrap: wrap; gap: 12px; }
#gallery figure { margin: 0; max-width: 100%; }
#gallery img, #given img { max-width: 100%; height: auto; image-rendering: pixelated; background: #fff; }
#gallery figcaption { display: flex; justify-content: space-between; gap: 8px; }
#gallery a { text-decoration: underline; }
#examples { flex-wrap: wrap; gap: 8px; }
#examples button { flex: 0 1 auto; }
.refused { color: #b91c1c; font-weight: 600; }
.dark .refused { color: #fca5a5; }
#gallery, #given-words { overflow-wrap: anywhere; }
#given .frame { position: relative; width: 192px; max-width: 100%; margin-top: 8px; }
#given .frame[hidden] { display: none; }
#given input { max-width: 100%; }
#given .frame img { display: block; width: 100%; }
#given .frame::after {
  content: ""; position: absolute; inset: calc(100% * var(--kept)) 0 0 0; background: rgb(128 128 128 / 85%);
  border-top: 2px dashed #f97316;
}
"""
# A picture is cut to its centre square and scaled down where it is chosen: what it says of place and time stays there.
GIVEN = """
<label for="given-file">A picture whose top rows are kept</label>
<div><input id="given-file" type="file" accept="image/*"> <button id="given-remove" type="button">Remove</button></div>
<p id="given-words" role="status"></p>
<div class="frame" style="--kept: {kept}" hidden><img alt="The picture; what is grey is drawn anew"></div>
"""
HEAD = """
<script>
async function readGiven(file) {
  if (file.size > 32 * 2 ** 20) throw new Error("larger than 32 MB");
  const bitmap = await createImageBitmap(file);
  const side = Math.min(bitmap.width, bitmap.height), size = Math.min(side, MAX_SIDE);
  const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
  canvas.width = canvas.height = size;
  pen.imageSmoothingQuality = "high";
  const left = Math.floor((bitmap.width - side) / 2), top = Math.floor((bitmap.height - side) / 2);
  pen.drawImage(bitmap, left, top, side, side, 0, 0, size, size);
  return canvas.toDataURL("image/png");
}
function showGiven(address, words) {
  const frame = document.querySelector("#given .frame"), image = frame.querySelector("img");
  if (address) image.src = address; else image.removeAttribute("src");
  frame.hidden = !address;
  document.getElementById("given-words").textContent = words;
}
addEventListener("change", async (event) => {
  if (event.target.id !== "given-file") return;
  const file = event.target.files[0];
  try {
    showGiven(file ? await readGiven(file) : "", "");
  } catch {
    event.target.value = "";
    showGiven("", `${file.name} cannot be read as a picture: please choose another.`);
  }
});
addEventListener("click", (event) => {
  if (event.target.id !== "given-remove") return;
  document.getElementById("given-file").value = "";
  showGiven("", "");
});
</script>
"""
# The picture comes from the page itself, where that part of it is open, in the place of the last value.
READ_GIVEN = """(...values) =>
  [...values.slice(0, -1), document.querySelector("#given img")?.getAttribute("src") ?? ""]"""
SHOW_KEPT = """(rows) => { document.querySelector("#given .frame").style.setProperty("--kept", rows / GRID_SIZE); }"""


def build_page(service: DrawingService, title: str, examples: Sequence[str] = (), note: str = "") -> gr.Blocks:
    """
    The page.

    Args:
        service ([`DrawingService`]): what draws.
        title (`str`): in words.
        examples (`Sequence[str]`): captions to begin with.
        note (`str`): below everything.
    """
    limits, settings, grid_size = service.limits, service.settings, service.grid_size
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.HTML(f"<h1>{html.escape(title)}</h1>")
        with gr.Row(equal_height=True):
            words = {"label": "Caption", "elem_id": "prompt", "max_length": limits.max_prompt_length}
            prompt = gr.Textbox(**words, lines=1, scale=4, min_width=280)
            draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=80)
            stop = gr.Button("Stop", elem_id="stop", min_width=80)
        with gr.Row(elem_id="examples", visible=bool(examples)):
            for example in examples[:MAX_EXAMPLES]:
                button = gr.Button(example, size="sm", min_width=0)
                button.click(None, None, prompt, js=f"() => {json.dumps(example)}", api_visibility="private")
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                gallery = gr.HTML(SAID.format(words="Your pictures come here."), elem_id="gallery", padding=True)
            with gr.Column(scale=2, min_width=280):
                number = gr.Slider(1, limits.max_images, min(4, limits.max_images), step=1, label="Pictures")
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed")
                    is_new = gr.Checkbox(True, label="A new seed each time", elem_id="new-seed")
                sliders = [
                    gr.Slider(lowest, service.highest[name], settings[name], step=0.05, label=label, info=words)
                    for name, lowest, label, words in SETTINGS
                ]
                rerank, candidates = _add_reranking(service)
                with gr.Accordion("Finish a picture", open=False, elem_id="finish"):
                    num_kept = max(1, grid_size // 2)
                    gr.HTML(GIVEN.format(kept=num_kept / grid_size), elem_id="given", padding=True)
                    label = f"Rows kept, of {grid_size}"
                    rows = gr.Slider(1, grid_size - 1, num_kept, step=1, label=label, elem_id="rows")
        gr.HTML(f"<p>{html.escape(note)}</p>", visible=bool(note))
        inputs = [prompt, number, seed, is_new, *sliders, rows, rerank, candidates, gr.Textbox(visible=False)]
        private = {"api_visibility": "private", "show_progress": "minimal"}
        event = gr.on(
            [draw.click, prompt.submit],
            _make_drawer(service),
            inputs,
            [gallery, seed],
            js=READ_GIVEN,
            concurrency_limit=1,
            trigger_mode="once",
            **private,
        )
        stop.click(None, None, None, cancels=event, api_visibility="private")
        rows.change(None, rows, None, js=SHOW_KEPT.replace("GRID_SIZE", str(grid_size)), api_visibility="private")
    return page.queue(max_size=limits.max_waiting, api_open=False, default_concurrency_limit=1)


def _add_reranking(service: DrawingService) -> tuple[gr.Checkbox, gr.Slider]:
    """On or off, and how many candidates; not on the page where there is no reranker."""
    with gr.Row(visible=service.has_reranker):
        words = "draws more pictures, and shows those that match the caption best"
        rerank = gr.Checkbox(False, label="Rerank", info=words, elem_id="rerank")
        highest = max(2, service.limits.max_candidates)
        return rerank, gr.Slider(2, highest, min(16, highest), step=1, label="Candidates", elem_id="candidates")


def _make_drawer(service: DrawingService) -> Callable[..., Iterator[tuple]]:
    """What the button does: the gallery as it fills, and the seed."""

    def draw(prompt, number, seed, is_new, guidance, temperature, rows, rerank, candidates, picture):
        started = time.monotonic()
        if rerank and isinstance(number, int) and isinstance(candidates, int):
            candidates = max(number, candidates)
        try:
            order = service.make_order(
                prompt,
                number,
                None if is_new else seed,
                guidance,
                temperature,
                picture,
                rows if picture else None,
                candidates if rerank else None,
            )
            for update in service.draw(order):
                if isinstance(update, Rows):
                    yield show_rows(update), gr.skip()
                else:
                    yield show_drawing(update, time.monotonic() - started), order.seed
        except ValueError as error:
            yield REFUSED.format(words=html.escape(str(error))), gr.skip()
        except torch.OutOfMemoryError:
            yield REFUSED.format(words="Memory ran out: please ask for fewer pictures."), gr.skip()
        except Exception as error:
            # Without its own words, which may repeat the caption.
            place = "".join(traceback.format_tb(error.__traceback__))
            logger.error("a drawing failed: %s\n%s", type(error).__name__, place)
            yield REFUSED.format(words="The drawing failed; the server's log says where."), gr.skip()

    return draw


def show_rows(rows: Rows) -> str:
    """Unfinished pictures as HTML."""
    figures = [_figure(image.size, encode(image), f"picture {i}, unfinished", "") for i, image in _count(rows.images)]
    busy = BUSY.format(words="Drawing\N{HORIZONTAL ELLIPSIS}", value=rows.progress)
    return f'{busy}<div class="pictures">{"".join(figures)}</div>'


def show_drawing(drawing: Drawing, seconds: float) -> str:
    """Pictures with their seed and a link that saves each, as HTML."""
    order, figures = drawing.order, []
    for number, file in _count(drawing.files):
        address = PNG_ADDRESS + base64.b64encode(file).decode()
        save = SAVE.format(name=name_file(order.prompt, order.seed, number), address=address, number=number)
        words = f"<span>seed {order.seed}, no. {number}</span> {save}"
        figures.append(_figure(_read_size(file), address, f"{order.prompt}, picture {number}", words))
    best = f", the best of {order.num_candidates}" if order.num_candidates is not None else ""
    said = f"{len(figures)} of \N{LEFT DOUBLE QUOTATION MARK}{order.prompt}\N{RIGHT DOUBLE QUOTATION MARK}{best}"
    said += f", seed {order.seed}, {seconds:.1f} s."
    if drawing.num_withheld:
        said += f" {drawing.num_withheld} held back by the safety checker."
    return f'{SAID.format(words=html.escape(said))}<div class="pictures">{"".join(figures)}</div>'


def name_file(prompt: str, seed: int, number: int) -> str:
    """A name for a saved picture: the caption's first letters and digits, the seed, which picture."""
    words = re.sub(r"[\W_]+", "-", prompt).strip("-")[:40] or "picture"
    return f"{words}-{seed}-{number}.png"


def encode(image: Image.Image) -> str:
    """An unfinished picture as a small `data:` address."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def launch(
    service: DrawingService,
    source: str | Path,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    block: bool = True,
) -> gr.Blocks:
    """
    Opens the page, until it is interrupted.

    Args:
        service ([`DrawingService`]): what draws.
        source (`str` or `Path`): the checkpoint's folder or repository, whose name and card the page shows.
        host (`str`): the address to listen on, by default this machine's own, which no other reaches.
        port (`int`, *optional*): by default the first that is free from 7860 on.
        share (`bool`): whether Gradio's servers lend the page a public address.
        block (`bool`): `False` returns while the page is open; `close()` closes it.

    Raises:
        OSError: if the port is taken.
    """
    examples, note = read_card(source)
    page = build_page(
        service, f"DALL-E: {Path(source).resolve().name if Path(source).is_dir() else source}", examples, note
    )
    door = Middleware(
        Door,
        let_in=LET_IN,
        counted=JOIN,
        max_per_minute=service.limits.max_per_minute,
        max_body_bytes=4 * (service.max_picture_bytes // 3) + 65_536,
    )
    _, local, public = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        app_kwargs={"middleware": [door], "openapi_url": None},
        prevent_thread_lock=True,
        quiet=True,
        inline=False,
        enable_monitoring=False,
        num_workers=0,
        theme=gr.themes.Default(**OWN_FONTS),
        css=CSS,
        head=HEAD.replace("MAX_SIDE", str(service.max_picture_side)),
        **PLAIN_PAGE,
    )
    print(f"Open on {local}" + (f" and {public}" if public else ""), flush=True)
    if block:
        page.block_thread()
    return page


def read_card(source: str | Path) -> tuple[list[str], str]:
    """The captions that a checkpoint's card shows, and a line on its licence; nothing where there is no card."""
    try:
        card = ModelCard.load(Path(source, "README.md") if Path(source).is_dir() else source)
    except (OSError, ValueError, HfHubHTTPError):
        return [], ""
    widget = card.data.get("widget") or []
    examples = [entry["text"] for entry in widget if isinstance(entry, dict) and isinstance(entry.get("text"), str)]
    licence = card.data.get("license")
    return examples, f"The checkpoint's licence: {licence}." if licence else ""


def _count(things: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    return enumerate(things, start=1)


def _figure(size: tuple[int, int], address: str, alt: str, words: str) -> str:
    """A picture enlarged by a whole number."""
    scale = max(1, round(SHOWN_SIDE / max(size)))
    width, height = (length * scale for length in size)
    return FIGURE.format(address=address, alt=html.escape(alt), width=width, height=height, words=words)


def _read_size(file: bytes) -> tuple[int, int]:
    """Width and height of a PNG file."""
    return int.from_bytes(file[16:20]), int.from_bytes(file[20:24])

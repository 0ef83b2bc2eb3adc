"""Drawing for strangers: what a visitor may ask for, pictures checked before they are decoded, rows as they are drawn.

No page and no server: those are `gradio_app.py`'s. The drawing itself is [`DALLEPipeline`]'s.
"""

import base64
import binascii
import io
import queue
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from PIL import Image

from .pipeline_dalle import DALLEPipeline
from .provenance import describe_drawing, save_png
from .sampling import resolve_settings


MAX_SEED = 2**31 - 1
MAX_PREVIEWS = 16  # of a drawing; each is decoded
HIGHEST = {"guidance_scale": 10.0, "temperature": 2.0}  # or the checkpoint's own, where that is more
PNG_ADDRESS = "data:image/png;base64,"


@dataclass(frozen=True)
class Limits:
    """
    What a visitor may ask for.

    Args:
        max_images (`int`): pictures of a drawing.
        max_candidates (`int`): pictures of a drawing among which the reranker chooses.
        max_prompt_length (`int`): characters of a caption.
        max_waiting (`int`): drawings that wait, besides the one that is being drawn; more are refused.
        max_per_minute (`int`): drawings of one address; more are refused for a while.

    Raises:
        ValueError: if one is below 1.
    """

    max_images: int = 9
    max_candidates: int = 64
    max_prompt_length: int = 300
    max_waiting: int = 20
    max_per_minute: int = 30

    def __post_init__(self):
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"`{field.name}` is {getattr(self, field.name)}; expected a whole number from 1.")


@dataclass(frozen=True)
class Order:
    """A drawing that may be drawn; its fields are the arguments of [`DALLEPipeline`]'s call, and the seed."""

    prompt: str
    num_images_per_prompt: int
    seed: int
    guidance_scale: float
    temperature: float
    image: Image.Image | None = None
    num_prefix_rows: int | None = None
    num_candidates: int | None = None

    def to_arguments(self) -> dict[str, Any]:
        """What the pipeline is called with, without the seed."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "seed"}


@dataclass(frozen=True)
class Rows:
    """Unfinished pictures, none where they are not to be seen yet, and how much of the drawing is done, in [0, 1]."""

    images: list[Image.Image]
    progress: float


@dataclass(frozen=True)
class Drawing:
    """The order that was drawn, the bytes of each picture's PNG file, and how many a safety checker holds back."""

    order: Order
    files: list[bytes]
    num_withheld: int


class DrawingService:
    """
    Draws for one visitor after the other.

    Args:
        pipe ([`DALLEPipeline`]): what draws. Its progress bar is turned off.
        limits ([`Limits`], *optional*): what may be asked for.
        use_provenance (`bool`, *optional*, defaults to `True`): whether files say what they were drawn from.

    Attributes:
        settings (`dict[str, float]`): the checkpoint's own guidance scale and temperature.
        highest (`dict[str, float]`): the largest guidance scale and temperature that may be asked for.
        max_picture_side (`int`): of a picture that is given, in pixels.
        max_picture_bytes (`int`): of its file.
    """

    def __init__(self, pipe: DALLEPipeline, limits: Limits | None = None, use_provenance: bool = True):
        self.pipe, self.limits, self.use_provenance = pipe, limits or Limits(), use_provenance
        pipe.set_progress_bar_config(disable=True)
        own = resolve_settings(pipe.prior.generation_config)
        self.settings = {name: float(own[name]) for name in HIGHEST}
        self.highest = {name: max(highest, self.settings[name]) for name, highest in HIGHEST.items()}
        self.max_picture_side = min(4 * pipe.dvae.config.sample_size, 1024)
        self.max_picture_bytes = 4 * self.max_picture_side**2 + 65_536  # an RGBA picture that nothing compresses
        self.grid_size, self.has_reranker = pipe.dvae.image_grid_size, pipe.reranker is not None
        self._turn = threading.Lock()  # a pipeline draws one thing at a time

    def make_order(
        self,
        prompt: Any,
        num_images: Any,
        seed: Any = None,
        guidance_scale: Any = None,
        temperature: Any = None,
        picture: Any = "",
        num_prefix_rows: Any = None,
        num_candidates: Any = None,
    ) -> Order:
        """
        Checks what came from outside, of whatever type.

        Args:
            prompt: the caption.
            num_images: how many pictures.
            seed (*optional*): by default a new one.
            guidance_scale, temperature (*optional*): by default the checkpoint's own.
            picture (*optional*): a PNG file as a `data:` address, whose top rows are kept; "" is none.
            num_prefix_rows (*optional*): how many rows of tokens; needed with a picture, unused without.
            num_candidates (*optional*): how many the reranker chooses among; by default no more than are shown.

        Raises:
            ValueError: with words for the visitor, which do not repeat the caption.
        """
        limits, own = self.limits, self.settings
        num_images = _check_number("The number of pictures", num_images, 1, limits.max_images)
        if seed is None:
            seed = secrets.randbelow(MAX_SEED + 1)
        if num_candidates is not None:
            if not self.has_reranker:
                raise ValueError("There is no reranker here to choose among candidates.")
            highest = max(limits.max_candidates, num_images)
            num_candidates = _check_number("The number of candidates", num_candidates, num_images, highest)
        scale = own["guidance_scale"] if guidance_scale is None else guidance_scale
        heat = own["temperature"] if temperature is None else temperature
        image = self.read_picture(picture)
        if image is not None:
            num_prefix_rows = _check_number("The number of rows kept", num_prefix_rows, 1, self.grid_size - 1)
        return Order(
            self.check_prompt(prompt),
            num_images,
            int(_check_number("The seed", seed, 0, MAX_SEED)),
            _check_number("The guidance scale", scale, 1, self.highest["guidance_scale"], is_whole=False),
            _check_number("The temperature", heat, 0.01, self.highest["temperature"], is_whole=False),
            image,
            num_prefix_rows if image is not None else None,
            num_candidates,
        )

    def check_prompt(self, prompt: Any) -> str:
        """
        The caption without spaces around it.

        Raises:
            ValueError: if there is none, or it is longer than allowed or than the model reads.
        """
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError("Please write a caption.")
        prompt = prompt.strip()
        if len(prompt) > self.limits.max_prompt_length:
            limit = self.limits.max_prompt_length
            raise ValueError(f"The caption has {len(prompt)} characters; at most {limit} are drawn from.")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError("The caption is not valid text.") from error
        # What is cut would be quoted in the log.
        num_tokens, text_length = len(self.pipe.tokenizer(prompt)["input_ids"]), self.pipe.prior.config.text_length
        if num_tokens > text_length:
            raise ValueError(
                f"The caption has {num_tokens} tokens; this model reads {text_length}: please shorten it."
            )
        return prompt

    def read_picture(self, address: Any) -> Image.Image | None:
        """
        Decodes a picture after its size in bytes and in pixels is checked.

        Args:
            address: a PNG file as a `data:` address; "" or `None` is none.

        Raises:
            ValueError: if it is no such file, or too large.
        """
        if address is None or address == "":
            return None
        if not isinstance(address, str) or not address.startswith(PNG_ADDRESS):
            raise ValueError("The picture did not come as a PNG file: please choose another.")
        encoded, side = address[len(PNG_ADDRESS) :], self.max_picture_side
        if len(encoded) > 4 * (self.max_picture_bytes // 3 + 1):
            raise ValueError(f"The picture's file is larger than {self.max_picture_bytes:,} bytes.")
        try:
            image = Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)), formats=["PNG"])  # its header
            if max(image.size) > side:
                raise ValueError(
                    f"The picture has {image.width} x {image.height} pixels; at most {side} x {side} are read."
                )
            image.load()
        except (binascii.Error, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError("The picture cannot be read: its file is damaged, or is none.") from error
        return image

    def draw(self, order: Order) -> Iterator[Rows | Drawing]:
        """
        Draws, and gives unfinished pictures as rows are completed, at last the [`Drawing`]. What is not iterated to
        its end stops after the token that it is at.

        With a safety checker, unfinished pictures are not given: it has not seen them.

        Args:
            order ([`Order`]): from `make_order`.

        Raises:
            ValueError, torch.OutOfMemoryError: as the pipeline.
        """
        given: queue.SimpleQueue = queue.SimpleQueue()
        is_stopped = threading.Event()
        thread = threading.Thread(target=self._draw, args=(order, given.put, is_stopped), daemon=True)
        thread.start()
        try:
            while True:
                update = given.get()
                if isinstance(update, BaseException):
                    raise update
                yield update
                if isinstance(update, Drawing):
                    return
        finally:
            is_stopped.set()
            thread.join()

    def _draw(self, order: Order, give: Callable[[Any], None], is_stopped: threading.Event) -> None:
        """In a thread of its own: the pipeline's call does not return before the end."""
        try:
            with self._turn:
                generator = torch.Generator().manual_seed(order.seed)
                output = self.pipe(
                    **order.to_arguments(),
                    generator=generator,
                    callback_on_step_end=self._watch(order, give, is_stopped),
                )
                if not is_stopped.is_set():
                    give(self._finish(order, output.images, output.nsfw_content_detected))
        except Exception as error:  # the one who iterates is told
            give(error)

    def _watch(self, order: Order, give: Callable[[Any], None], is_stopped: threading.Event) -> Callable:
        rows_each = -(-self.grid_size // MAX_PREVIEWS)

        def watch(pipe: DALLEPipeline, step: int, cell: int, tensors: dict[str, torch.Tensor]) -> dict:
            row, is_inside = divmod(cell + 1, self.grid_size)
            if is_stopped.is_set():
                pipe._interrupt = True
            elif not is_inside and row % rows_each == 0 and step + 1 < pipe.num_timesteps:
                shown = tensors["latents"][: order.num_images_per_prompt]
                images = pipe.decode_partial(shown) if pipe.safety_checker is None else []
                give(Rows(images, (step + 1) / pipe.num_timesteps))
            return {}

        return watch

    def _finish(self, order: Order, images: list[Image.Image], flags: list[bool] | None) -> Drawing:
        """Each picture's file; what a safety checker flags is left out."""
        provenance = None
        if self.use_provenance:
            provenance = describe_drawing(self.pipe, seed=order.seed, **order.to_arguments())
        files = []
        for index, (image, is_flagged) in enumerate(zip(images, flags or [False] * len(images), strict=True)):
            if not is_flagged:
                file = io.BytesIO()
                save_png(image, file, replace(provenance, index=index) if provenance else None)
                files.append(file.getvalue())
        return Drawing(order, files, len(images) - len(files))


def _check_number(what: str, value: Any, lowest: float, highest: float, is_whole: bool = True) -> int | float:
    """The number, if it is one and in range."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and lowest <= value <= highest
    if not is_number or (is_whole and value != int(value)):
        kind = "whole number" if is_whole else "number"
        raise ValueError(f"{what} must be a {kind} from {lowest:g} to {highest:g}.")
    return int(value) if is_whole else float(value)

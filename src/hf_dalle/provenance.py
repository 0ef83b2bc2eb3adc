"""What a picture was drawn from, in the text of its PNG file: written, read back, and the arguments to draw it again.

Pictures that a pipeline returns carry nothing; whoever writes files chooses. The drawing is `pipeline_dalle.py`'s.
"""

import json
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, get_type_hints

import torch
from diffusers import DiffusionPipeline
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile, PngInfo
from transformers.utils.hub import extract_commit_hash

from .sampling import resolve_settings


KEY = "hf_dalle"  # JSON of all fields: what is read back
TEXT_KEY = "parameters"  # what AUTOMATIC1111's web UI and programs like it write and show: for people


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """
    One call of a [`DALLEPipeline`] with one prompt, and which of its pictures this is. The same version on the same
    kind of device draws it again: `pipe(**provenance.to_arguments()).images[provenance.index]`.

    Args:
        prompt (`str`): the caption.
        seed (`int`): of the call's one generator.
        index (`int`, *optional*): which picture of the call this is, from 0; `None` for a grid of all.
        num_images_per_prompt, num_candidates, negative_prompt, guidance_scale, temperature, top_k, top_p:
            As the pipeline's, with the checkpoint's own settings in place of what was not given.
        prefix_tokens (`list[list[int]]`, *optional*): rows of image tokens that were given, of a picture say.
        model (`str`, *optional*): the repository on the Hub, or the last part of a folder's path, or unknown.
        revision (`str`, *optional*): the commit, of a repository on the Hub.
        adapters (`list[str]`): names of the LoRA adapters that were loaded. How strong they were is not said.
        dtype (`str`): of the prior's weights, as "float32".
        version (`str`): of hf-dalle.

    Raises:
        ValueError: for a value of another type or outside its range.
    """

    prompt: str
    seed: int
    index: int | None = 0
    num_images_per_prompt: int = 1
    num_candidates: int | None = None
    negative_prompt: str | None = None
    guidance_scale: float | int
    temperature: float | int
    top_k: int
    top_p: float | int
    prefix_tokens: list | None = None
    model: str | None = None
    revision: str | None = None
    adapters: list
    dtype: str
    version: str

    def __post_init__(self):
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"`{name}` is {value!r}; expected {getattr(kind, '__name__', kind)}.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"`seed` is {self.seed}; it must be in [0, 2**63).")
        if self.index is not None and not 0 <= self.index < self.num_images_per_prompt:
            raise ValueError(f"`index` is {self.index}, of {self.num_images_per_prompt} pictures.")
        rows = self.prefix_tokens or []
        are_rows = all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows)
        if not are_rows or not all(isinstance(token, int) and 0 <= token < 2**31 for row in rows for token in row):
            raise ValueError("`prefix_tokens` must be rows of image tokens, all of one length.")

    def to_arguments(self) -> dict[str, Any]:
        """The arguments of the call, with a generator and, where a picture was given, its tokens as `latents`."""
        names = ("prompt", "negative_prompt", "num_images_per_prompt", "num_candidates")
        settings = ("guidance_scale", "temperature", "top_k", "top_p")
        arguments = {name: getattr(self, name) for name in (*names, *settings)}
        if self.prefix_tokens is not None:
            num_images = self.num_candidates or self.num_images_per_prompt
            arguments["latents"] = torch.tensor(self.prefix_tokens).expand(num_images, -1, -1)
        return {**arguments, "generator": torch.Generator().manual_seed(self.seed)}

    def to_text(self) -> str:
        """Prompt, negative prompt and a line of settings, in AUTOMATIC1111's manner."""
        settings = {
            "Seed": self.seed,
            "Image": None if self.index is None else f"{self.index + 1} of {self.num_images_per_prompt}",
            "Candidates": self.num_candidates,
            "CFG scale": self.guidance_scale,
            "Temperature": self.temperature,
            "Top k": self.top_k,
            "Top p": self.top_p,
            "Kept rows": len(self.prefix_tokens or []) or None,
            "Model": self.model,
            "Version": f"hf-dalle {self.version}",
        }
        lines = [self.prompt, *([f"Negative prompt: {self.negative_prompt}"] if self.negative_prompt else [])]
        lines.append(", ".join(f"{name}: {value}" for name, value in settings.items() if value is not None))
        return "\n".join(lines).replace("\0", " ")  # the one character that PNG does not allow


def describe_drawing(
    pipeline: DiffusionPipeline,
    prompt: str,
    seed: int,
    *,
    index: int | None = 0,
    num_images_per_prompt: int = 1,
    num_candidates: int | None = None,
    negative_prompt: str | None = None,
    image: Any = None,
    num_prefix_rows: int | None = None,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Provenance:
    """
    What a call that has been made drew from. A picture that it was given is kept as its tokens.

    Args:
        pipeline ([`DALLEPipeline`]): as it was when it drew.
        prompt (`str`): the call's one prompt. Of several, make `generator` a list and describe each as a call.
        seed (`int`): of the call's generator, `torch.Generator().manual_seed(seed)`, used for nothing before.
        index (`int`, *optional*, defaults to 0): which of the call's pictures; `None` for a grid of all.
        num_images_per_prompt, num_candidates, negative_prompt, image, num_prefix_rows: what the call was given.
        guidance_scale, temperature, top_k, top_p: likewise.

    Raises:
        ValueError: for a value of another type, or a setting outside its range.
    """
    prefix_tokens = None
    if image is not None:
        tokens = pipeline.encode_image_prefix(image, num_prefix_rows, 1)
        prefix_tokens = tokens.unflatten(1, (num_prefix_rows, -1))[0].tolist()
    source = pipeline.config.get("_name_or_path")
    is_folder = source is not None and Path(source).is_absolute()  # as `DallePublishingMixin` keeps them
    return Provenance(
        prompt=prompt,
        seed=seed,
        index=index,
        num_images_per_prompt=num_images_per_prompt,
        num_candidates=num_candidates,
        negative_prompt=negative_prompt,
        **resolve_settings(pipeline.prior.generation_config, guidance_scale, temperature, top_k, top_p),
        prefix_tokens=prefix_tokens,
        model=Path(source).name if is_folder else source,  # the rest of a path would tell of the machine
        revision=extract_commit_hash(pipeline.prior.name_or_path, None),
        adapters=list(getattr(pipeline.prior, "peft_config", None) or ()),
        dtype=str(pipeline.prior.dtype).removeprefix("torch."),
        version=sys.modules[__package__].__version__,
    )


def save_png(image: Image.Image, file: str | Path | BinaryIO, provenance: Provenance | None = None) -> None:
    """
    Writes a picture as PNG, with what it was drawn from, if that is given, in its text: under `parameters` for people,
    under `hf_dalle` as JSON for [`read_provenance`]. Anybody who gets the file can read the prompt there.

    Args:
        image (`PIL.Image.Image`): the picture.
        file (`str`, `Path` or a binary file): where to.
        provenance ([`Provenance`], *optional*): by default the file has no text at all.
    """
    text = PngInfo()
    if provenance is not None:
        # Latin-1 as tEXt, any other script as iTXt, which is UTF-8: PIL chooses.
        text.add_text(TEXT_KEY, provenance.to_text())
        text.add_text(KEY, json.dumps(asdict(provenance), ensure_ascii=False))
    image.save(file, format="PNG", pnginfo=text)


def read_provenance(file: str | Path | BinaryIO) -> Provenance | None:
    """
    What a PNG file says that it was drawn from. Anybody can write such text: it is a note, not a proof.

    Args:
        file (`str`, `Path` or a binary file): of [`save_png`], `hf-dalle draw` or `hf-dalle demo`.

    Returns:
        [`Provenance`], or `None` where the file says nothing.

    Raises:
        OSError: if there is no such file, or it is no PNG.
        ValueError: if what it says is damaged, or of another version of hf-dalle that says other things.
    """
    try:
        with Image.open(file, formats=["PNG"]) as image:
            assert isinstance(image, PngImageFile)
            text = image.text.get(KEY)
    except UnidentifiedImageError as error:
        raise OSError(f"{file} is no PNG file; other kinds say nothing of how they were drawn.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if text is None:
        return None
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object.")
        if unknown := sorted(values.keys() - {field.name for field in fields(Provenance)}):
            raise ValueError(f"{unknown[0]!r} is unknown to this version of hf-dalle.")
        return Provenance(**values)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"What {file} says of how it was drawn ({KEY!r} in its text) is damaged: {error}") from error

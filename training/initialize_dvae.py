"""Where a short dVAE run starts from: a codebook taken from the data, instead of the paper's random one; and how codes
that fell out of use come back.

From random weights, at the learning rates that a run of minutes needs, most pilot runs on flat drawings were down to a
few codes within some hundred updates. Here the encoder's features are clustered, and each code begins as one
cluster: the 1x1 convolutions on both sides of the codebook are set, so the model's architecture and its file stay what
they are.
"""

import math

import torch

from hf_dalle import DalleDVAE
from hf_dalle.logit_laplace import map_pixels


@torch.no_grad()
def initialize_from_data(model: DalleDVAE, pixel_values: torch.Tensor, kl_per_token: float, seed: int = 0) -> None:
    """
    Sets the codebook's two sides and the decoder's output bias from pictures.

    Args:
        model ([`DalleDVAE`]): changed in place.
        pixel_values (`torch.Tensor`): some hundred pictures, B x 3 x H x W in [0, 1]; at least K cells in all.
        kl_per_token (`float`):
            With `quantizer="gumbel"`, how sharp the encoder begins: the KL to the uniform prior in nats a cell, on
            average over these pictures, between 0 and ln K. Unused with "nearest".
        seed (`int`): of the clustering.

    Raises:
        ValueError: for too few pictures, or a KL that is out of range or cannot be reached.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab_size, is_nearest = model.config.vocab_size, model.config.quantizer == "nearest"
    if not is_nearest and not 0 < kl_per_token < math.log(vocab_size):
        raise ValueError(f"`kl_per_token` is {kl_per_token}; it lies between 0 and ln K = {math.log(vocab_size):.2f}.")
    features = cell_features(model, pixel_values)
    if len(features) < vocab_size:
        raise ValueError(f"{len(features)} cells are too few for {vocab_size} codes; give more pictures.")
    centres = cluster(features, vocab_size, generator)
    if is_nearest:
        model.codebook.codes.copy_(centres)
        model.codebook.ema_sum.copy_(centres)
        model.codebook.ema_count.fill_(1)
    else:
        # logit_k = -s |h - c_k|^2 up to what is equal for all k: linear in h.
        scale = find_scale(features[torch.randperm(len(features), generator=generator)[:2048]], centres, kl_per_token)
        model.encoder.conv_out.weight.copy_((2 * scale * centres)[:, :, None, None])
        model.encoder.conv_out.bias.copy_(-scale * centres.square().sum(dim=1))
        # Codes of near cells are near for the decoder too, so a noisy choice between them does little harm.
        spread = (centres - features.mean(dim=0)) / features.std(dim=0).mean()
        width = spread.shape[1]
        projection = torch.randn(width, model.config.decoder_in_channels, generator=generator) / math.sqrt(width)
        model.decoder.conv_in.weight.copy_((spread @ projection).T[:, :, None, None])
    initialize_output_bias(model, pixel_values)


@torch.no_grad()
def revive_codes(model: DalleDVAE, pixel_values: torch.Tensor, min_share: float, seed: int = 0) -> int:
    """
    Puts codes of a "nearest" codebook that are hardly used onto random cells of these pictures.

    Args:
        model ([`DalleDVAE`]): changed in place.
        pixel_values (`torch.Tensor`): B x 3 x H x W in [0, 1].
        min_share (`float`): of the mean use of all codes; codes with less are moved.
        seed (`int`): of the choice of cells.

    Returns:
        `int`: how many codes were moved.
    """
    codebook = model.codebook
    mean_count = codebook.ema_count.mean()
    unused = (codebook.ema_count < min_share * mean_count).nonzero()[:, 0]
    if not len(unused):
        return 0
    features = cell_features(model, pixel_values).to(codebook.codes)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    moved = unused[: len(features)]
    codes = features[order[: len(moved)].to(features.device)]
    codebook.codes[moved] = codes
    codebook.ema_count[moved] = mean_count / 2
    codebook.ema_sum[moved] = codes * mean_count / 2
    return len(moved)


def cell_features(model: DalleDVAE, pixel_values: torch.Tensor) -> torch.Tensor:
    """What codes are compared with, cells x width: input of the last 1x1 ("gumbel") or its output ("nearest")."""
    caught = []
    is_nearest = model.config.quantizer == "nearest"
    hook = model.encoder.conv_out.register_forward_hook(
        lambda module, inputs, output: caught.append(output if is_nearest else inputs[0])
    )
    try:
        for chunk in pixel_values.split(64):
            model.encoder(map_pixels(chunk, model.config.logit_laplace_eps))
    finally:
        hook.remove()
    return torch.cat(caught).movedim(1, -1).flatten(0, 2)  # B x C x h x w -> (B h w) x C


def cluster(
    features: torch.Tensor, num_clusters: int, generator: torch.Generator, num_rounds: int = 5
) -> torch.Tensor:
    """k-means from random distinct cells; a centre that loses all its cells stays where it was."""
    distinct = torch.unique(features, dim=0)
    if len(distinct) < num_clusters:
        raise ValueError(f"Only {len(distinct)} cells differ, which are too few for {num_clusters} codes.")
    centres = distinct[torch.randperm(len(distinct), generator=generator)[:num_clusters]].clone()
    for _ in range(num_rounds):
        nearest = torch.cat([torch.cdist(chunk, centres).argmin(dim=1) for chunk in features.split(4096)])
        counts = torch.zeros(num_clusters).index_add_(0, nearest, torch.ones(len(features)))
        sums = torch.zeros_like(centres).index_add_(0, nearest, features)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
    return centres


def find_scale(features: torch.Tensor, centres: torch.Tensor, kl_per_token: float) -> float:
    """The s at which softmax(-s |h - c_k|^2) has, on average, this KL to the uniform: bisection on a log scale."""
    distances = torch.cdist(features, centres).square()
    unit = distances.mean().item()
    low, high = 1e-6 / unit, 1e9 / unit
    for _ in range(60):
        scale = math.sqrt(low * high)
        log_probs = (-scale * distances).log_softmax(dim=1)
        kl = (log_probs.exp() * log_probs).sum(dim=1).mean().item() + math.log(len(centres))
        low, high = (scale, high) if kl < kl_per_token else (low, scale)
    if abs(kl - kl_per_token) > 0.01:
        raise ValueError(f"`kl_per_token` of {kl_per_token} is out of reach: on these pictures it comes to {kl:.2f}.")
    return scale


def initialize_output_bias(model: DalleDVAE, pixel_values: torch.Tensor) -> None:
    """The decoder begins at each channel's mean logit, with the mean deviation as its scale."""
    logits = torch.logit(map_pixels(pixel_values, model.config.logit_laplace_eps))
    mean = logits.mean(dim=(0, 2, 3))
    log_b = (logits - mean[:, None, None]).abs().mean(dim=(0, 2, 3)).log()
    # six maps, each of patch_size^2 channels
    model.decoder.conv_out.bias.copy_(torch.cat([mean, log_b]).repeat_interleave(model.config.patch_size**2))

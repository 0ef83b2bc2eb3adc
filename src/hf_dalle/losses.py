"""The training objectives: the dVAE's evidence lower bound, the prior's cross-entropy, the reranker's contrast.

Functions of tensors that a model gave; no model, no schedule (the weights beta and temperature come in as numbers from
the training script).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .logit_laplace import logit_laplace_log_prob, map_pixels


@dataclass
class DVAELoss:
    """
    The parts of [`dvae_loss`], all means over the batch.

    Args:
        loss (`torch.Tensor`): (nll + beta * kl) / (3 H W), in nats a pixel channel.
        nll (`torch.Tensor`): -ln p(x | z), summed over the image, in nats.
        kl (`torch.Tensor`): KL from the encoder's categorical to the uniform prior, summed over the image, in nats.
    """

    loss: torch.Tensor
    nll: torch.Tensor
    kl: torch.Tensor


def kl_to_uniform(logits: torch.Tensor) -> torch.Tensor:
    """KL divergence of the categorical of `logits` (B x K x h x w) to the uniform over K, summed over cells: (B,)."""
    log_probs = F.log_softmax(logits.float(), dim=1)
    return ((log_probs.exp() * log_probs).sum(dim=1) + math.log(logits.shape[1])).flatten(1).sum(dim=1)


def dvae_loss(
    pixel_values: torch.Tensor,
    mu: torch.Tensor,
    log_b: torch.Tensor,
    logits: torch.Tensor,
    beta: float,
    eps: float = 0.1,
    quantizer: str = "gumbel",
    min_log_b: float | None = None,
) -> DVAELoss:
    """
    The negative evidence lower bound of stage 1 (paper, section 2.1), divided by the number of pixel channels.

    Args:
        pixel_values (`torch.Tensor`): the pictures, B x 3 x H x W in [0, 1].
        mu, log_b (`torch.Tensor`): the decoder's maps, B x 3 x H x W.
        logits (`torch.Tensor`): the encoder's logits, B x K x h x w.
        beta (`float`): weight of the KL term.
        eps (`float`): of the pixel map.
        quantizer (`str`): with "nearest" the posterior is one-hot and its KL the constant ln K a cell.
        min_log_b (`float`, *optional*): a floor under `log_b`. On drawings with flat backgrounds the likelihood has no
            upper bound (b goes to 0 where a colour is certain), and such pixels drown all others' gradients.
    """
    if min_log_b is not None:
        log_b = log_b.clamp(min=min_log_b)
    log_prob = logit_laplace_log_prob(map_pixels(pixel_values.float(), eps), mu.float(), log_b.float())
    nll = -log_prob.flatten(1).sum(dim=1).mean()
    if quantizer == "nearest":
        kl = nll.new_tensor(math.log(logits.shape[1]) * logits[0, 0].numel())
    else:
        kl = kl_to_uniform(logits).mean()
    return DVAELoss(loss=(nll + beta * kl) / pixel_values[0].numel(), nll=nll, kl=kl)


def pixel_loss(
    pixel_values: torch.Tensor, sample: torch.Tensor, l1_weight: float = 0.0, l2_weight: float = 0.0
) -> torch.Tensor:
    """
    Weighted mean absolute and mean squared error of decoded pictures, for runs that leave the paper's likelihood.

    Args:
        pixel_values, sample (`torch.Tensor`): B x 3 x H x W in [0, 1].
        l1_weight, l2_weight (`float`): from 0.
    """
    error = sample.float() - pixel_values.float()
    return l1_weight * error.abs().mean() + l2_weight * error.square().mean()


def prior_loss(
    text_logits: torch.Tensor | None,
    text_labels: torch.Tensor | None,
    image_logits: torch.Tensor | None,
    image_labels: torch.Tensor | None,
    text_loss_weight: float = 1 / 8,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """
    Cross-entropy of stage 2 (paper, section 2.2): text tokens weigh `text_loss_weight`, image tokens the rest, each
    kind normalised by its own count.

    Args:
        text_logits (`torch.Tensor`, *optional*): B x t x text classes.
        text_labels (`torch.Tensor`, *optional*): B x t, the next text id or pad id; -100 is left out.
        image_logits (`torch.Tensor`, *optional*): B x n x image classes.
        image_labels (`torch.Tensor`, *optional*): B x n, image tokens in [0, image classes); -100 is left out.
        text_loss_weight (`float`): in [0, 1].

    Returns:
        `(loss, text_loss, image_loss)`, scalars in nats a token; a kind that is absent (no states, or every label
        -100) adds nothing and is `None`.
    """
    text_loss = mean_cross_entropy(text_logits, text_labels)
    image_loss = mean_cross_entropy(image_logits, image_labels)
    weighted = [(text_loss, text_loss_weight), (image_loss, 1 - text_loss_weight)]
    terms = [weight * term for term, weight in weighted if term is not None]
    if not terms:
        raise ValueError("There is nothing to predict: every label is -100, or the stream holds a single token.")
    return sum(terms), text_loss, image_loss


def stream_losses(
    config,
    text_logits: torch.Tensor,
    text_labels: torch.Tensor,
    image_logits: torch.Tensor,
    image_labels: torch.Tensor,
) -> dict[str, torch.Tensor | None]:
    """
    [`prior_loss`] of a prior's stream by name, and `caption_loss`, that of the text ids without pads, a figure to
    report, without gradient.

    Args:
        config ([`DallePriorConfig`] or [`DalleFamilyPriorConfig`]): the prior's.
        text_logits (`torch.Tensor`): B x t x text classes.
        text_labels (`torch.Tensor`): B x t ids of the joint vocabulary; -100 is left out.
        image_logits (`torch.Tensor`): B x n x image classes.
        image_labels (`torch.Tensor`): B x n ids of the joint vocabulary; -100 is left out.
    """
    image_labels = torch.where(image_labels == -100, -100, image_labels - config.image_token_offset)
    losses = prior_loss(text_logits, text_labels, image_logits, image_labels, config.text_loss_weight)
    caption_labels = text_labels.masked_fill(text_labels >= config.pad_token_offset, -100)
    caption_loss = mean_cross_entropy(text_logits.detach(), caption_labels)
    return {**dict(zip(("loss", "text_loss", "image_loss"), losses, strict=True)), "caption_loss": caption_loss}


def mean_cross_entropy(logits: torch.Tensor | None, labels: torch.Tensor | None) -> torch.Tensor | None:
    """Of logits B x t x classes and labels B x t, in nats a label, without those of -100; `None` if none is left."""
    if logits is None or labels is None or not (labels != -100).any():
        return None
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)


def contrastive_loss(
    image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: torch.Tensor, groups: torch.Tensor
) -> torch.Tensor:
    """
    CLIP's symmetric cross-entropy of pictures among captions and of captions among pictures, without negatives that
    are none: rows of one group are not told apart.

    Args:
        image_features, text_features (`torch.Tensor`): B x D, of norm 1, row by row of one pair.
        logit_scale (`torch.Tensor`): what the cosines are multiplied by.
        groups (`torch.LongTensor`): B.

    Returns:
        `torch.Tensor`: the mean over rows and both directions, in nats.
    """
    logits = logit_scale * image_features @ text_features.T  # pictures x captions
    targets = torch.arange(len(logits), device=logits.device)
    is_same = (groups[:, None] == groups) & (targets[:, None] != targets)
    logits = logits.masked_fill(is_same, -math.inf)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2

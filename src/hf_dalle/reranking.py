"""Ranking pictures by how well a contrastive model finds them to match their caption (paper, section 2.6).

Scores, the best of many that are met a few at a time, and what the best of N is worth. Drawing the many is the
pipeline's; training a model to rank by is `training/train_reranker.py`'s.
"""

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin


@torch.no_grad()
def score_images(
    reranker: PreTrainedModel, processor: ProcessorMixin, prompt: str, images: list[Image.Image]
) -> torch.Tensor:
    """
    How well each picture matches the prompt.

    Args:
        reranker (`PreTrainedModel`):
            A CLIP-like model, whose output has `logits_per_image`, pictures x texts.
        processor (`ProcessorMixin`): the model's own; a prompt longer than its text is cut.
        prompt (`str`): the caption.
        images (`list[PIL.Image.Image]`): B pictures, scored at once.

    Returns:
        `torch.Tensor`: B scores, float32, on the CPU; higher is better, to be compared for one prompt only.
    """
    inputs = processor(text=[prompt], images=images, padding=True, truncation=True, return_tensors="pt")
    inputs = inputs.to(reranker.device, dtype=reranker.dtype)  # casts floats only, leaves ids as they are
    return reranker(**inputs).logits_per_image[:, 0].float().cpu()


def order_images(scores: torch.Tensor, is_flagged: torch.Tensor | None = None) -> torch.Tensor:
    """
    Best first; of equal scores the earlier picture first.

    Args:
        scores (`torch.Tensor`): B, higher is better.
        is_flagged (`torch.Tensor`, *optional*):
            B booleans, a safety checker's: those pictures come last, whatever their scores.

    Returns:
        `torch.LongTensor`: B indices.
    """
    order = scores.argsort(descending=True, stable=True)
    return order if is_flagged is None else order[is_flagged[order].int().argsort(stable=True)]


class BestImages:
    """
    The best pictures of one prompt among all that were added: thousands take the memory of a few.

    Args:
        num_kept (`int`): how many stay.

    Attributes:
        images (`torch.Tensor`): at most `num_kept` x 3 x H x W, best first, as [`order_images`] has it.
        scores (`torch.Tensor`): of each.
        is_flagged (`torch.Tensor`): of each, whether a safety checker objects.
    """

    def __init__(self, num_kept: int):
        self.num_kept = num_kept
        self.images: torch.Tensor | None = None
        self.scores: torch.Tensor | None = None
        self.is_flagged: torch.Tensor | None = None

    def add(self, images: torch.Tensor, scores: torch.Tensor, is_flagged: torch.Tensor) -> None:
        """B more pictures, B x 3 x H x W, with B scores and B booleans, on the CPU."""
        if self.images is not None:
            images = torch.cat([self.images, images])
            scores, is_flagged = torch.cat([self.scores, scores]), torch.cat([self.is_flagged, is_flagged])
        order = order_images(scores, is_flagged)[: self.num_kept]
        self.images, self.scores, self.is_flagged = images[order.to(images.device)], scores[order], is_flagged[order]


def expect_best_of(num_drawn: int, qualities: torch.Tensor) -> torch.Tensor:
    """
    What the best-scored of N pictures is worth, over all ways to choose N of the M that were drawn: exact, no sample.

    The picture of rank r (from 1, by its score) is the best of C(M - r, N - 1) of the C(M, N) subsets of size N.

    Args:
        num_drawn (`int`): N, from 1 to M.
        qualities (`torch.Tensor`): ... x M, of a prompt's pictures, in the order of their scores, best first.

    Returns:
        `torch.Tensor`: ..., float64.

    Raises:
        ValueError: for an N outside its range.
    """
    num_all = qualities.shape[-1]
    if not 1 <= num_drawn <= num_all:
        raise ValueError(f"The best of {num_drawn} needs as many pictures; there are {num_all}.")
    weights = torch.zeros(num_all, dtype=torch.float64)
    weights[0] = num_drawn / num_all
    for rank in range(1, num_all - num_drawn + 1):  # C(M - r - 1, N - 1) / C(M - r, N - 1) = (M - r - N + 1) / (M - r)
        weights[rank] = weights[rank - 1] * (num_all - rank - num_drawn + 1) / (num_all - rank)
    return qualities.double() @ weights

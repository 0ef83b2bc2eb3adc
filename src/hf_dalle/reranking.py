"""Ranking pictures by how well a contrastive model finds them to match their caption (paper, section 2.6).

Drawing the many of which the best are kept is the pipeline's.
"""

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin


@torch.no_grad()
def score_images(
    reranker: PreTrainedModel,
    processor: ProcessorMixin,
    prompt: str,
    images: list[Image.Image],
    batch_size: int | None = None,
) -> torch.Tensor:
    """
    How well each picture matches the prompt.

    Args:
        reranker (`PreTrainedModel`):
            A CLIP-like model, whose output has `logits_per_image`, pictures x texts.
        processor (`ProcessorMixin`): the model's own; a prompt longer than its text is cut.
        prompt (`str`): the caption.
        images (`list[PIL.Image.Image]`): B pictures.
        batch_size (`int`, *optional*): how many pictures are scored at once, by default all.

    Returns:
        `torch.Tensor`: B scores, float32, on the CPU; higher is better, to be compared for one prompt only.
    """
    scores, batch_size = [], batch_size or len(images)
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        inputs = processor(text=[prompt], images=batch, padding=True, truncation=True, return_tensors="pt")
        inputs = inputs.to(reranker.device, dtype=reranker.dtype)  # casts floats only, leaves ids as they are
        scores.append(reranker(**inputs).logits_per_image[:, 0].float().cpu())
    return torch.cat(scores)


def rank_images(
    reranker: PreTrainedModel,
    processor: ProcessorMixin,
    prompts: list[str],
    images: list[Image.Image],
    batch_size: int | None = None,
) -> tuple[list[int], torch.Tensor]:
    """
    Sorts each prompt's pictures, best first.

    Args:
        reranker, processor, batch_size: as for [`score_images`].
        prompts (`list[str]`): B prompts.
        images (`list[PIL.Image.Image]`): B * n pictures, those of a prompt side by side.

    Returns:
        `tuple`: the order, indices into `images`, and the scores in that order, each B * n long.
    """
    order, scores = [], []
    num_each = len(images) // len(prompts)
    for first, prompt in zip(range(0, len(images), num_each), prompts, strict=True):
        scored = score_images(reranker, processor, prompt, images[first : first + num_each], batch_size)
        best_first = scored.argsort(descending=True, stable=True)
        order += (first + best_first).tolist()
        scores.append(scored[best_first])
    return order, torch.cat(scores)

"""What bounds a drawn token: its matrix products alone, by three ways to make them, and the bytes of its cache.

How a function is timed lives in `timing.py`, which tokens are drawn in `decode.py`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from hf_dalle import DallePriorForCausalLM
from hf_dalle.linear_dalle import linear


def list_products(prior: DallePriorForCausalLM, num_rows: int) -> dict[str, Callable[[], None]]:
    """
    The matrix products of `num_rows` image tokens, one a picture, over the prior's own weights in their order and with
    the image rows of its head; nothing else of the model.

    Returns:
        `dict[str, Callable]`: one pass by `F.linear`, by `x @ Wt` with Wt contiguous, and by the oneDNN product that
        the prior uses on CPUs.
    """
    config = prior.config
    weights = [module.weight for module in prior.model.layers.modules() if isinstance(module, nn.Linear)]
    weights.append(prior.lm_head.weight[config.image_token_offset : config.vocab_size])
    # The bytes of W as if they were Wt's: the same product to a clock, without a second copy of all weights.
    transposed = [weight.reshape(weight.shape[::-1]) for weight in weights]
    inputs = {weight.shape[1]: torch.randn(num_rows, weight.shape[1]) for weight in weights}

    @torch.no_grad()
    def multiply(product: Callable, matrices: list[torch.Tensor], dim: int) -> None:
        for matrix in matrices:
            product(inputs[matrix.shape[dim]], matrix)

    return {
        "F.linear": lambda: multiply(F.linear, weights, 1),
        "x @ Wt": lambda: multiply(torch.matmul, transposed, 0),
        "oneDNN": lambda: multiply(linear, weights, 1),
    }

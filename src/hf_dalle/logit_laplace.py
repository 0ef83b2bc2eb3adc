"""The logit-Laplace distribution over pixels (paper, section 2.1 and appendix A.3) and the pixel map that it needs.

Pure functions of tensors. The losses that use the log-likelihood live in `losses.py`, the model that uses the map in
`autoencoder_dalle_dvae.py`.
"""

import math

import torch


def map_pixels(pixel_values: torch.Tensor, eps: float = 0.1) -> torch.Tensor:
    """Maps pixels from [0, 1] into [eps, 1 - eps], where the logit is finite: the paper's phi, with 255 as 1."""
    return (1 - 2 * eps) * pixel_values + eps


def unmap_pixels(mapped: torch.Tensor, eps: float = 0.1) -> torch.Tensor:
    """Inverse of [`map_pixels`]; what falls outside [0, 1] is clamped."""
    return ((mapped - eps) / (1 - 2 * eps)).clamp(0, 1)


def logit_laplace_log_prob(mapped: torch.Tensor, mu: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    """
    Log-density of the logit-Laplace distribution,
    `f(x | mu, b) = exp(-|logit(x) - mu| / b) / (2 b x (1 - x))`, in nats, elementwise.

    Args:
        mapped (`torch.Tensor`): pixels in the open interval (0, 1), as [`map_pixels`] gives them.
        mu (`torch.Tensor`): location of the logit, same shape.
        log_b (`torch.Tensor`): log of the scale, same shape.
    """
    log_x, log_1mx = mapped.log(), (1 - mapped).log()
    return -(log_x - log_1mx - mu).abs() * torch.exp(-log_b) - log_b - log_x - log_1mx - math.log(2)

"""Schedules of training: pure functions of the update's number, and the learning-rate schedule made of them.

No state and no clock: a resumed run computes the same values from its step alone.
"""

import math

import torch


def cosine_anneal(step: int, start: float, end: float, num_steps: int) -> float:
    """
    From `start` at step 0 to `end` at `num_steps` along half a cosine, `end` from there on: the form of all the
    paper's stage 1 schedules (temperature, KL weight, learning rate; appendix A.2). `num_steps` of 0 is `end` at once.
    """
    if step >= num_steps:
        return end
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def get_warmup_cosine_schedule(
    optimizer: torch.optim.Optimizer, num_warmup_steps: int, num_training_steps: int, min_ratio: float = 0.0
) -> torch.optim.lr_scheduler.LambdaLR:
    """
    Linear warm-up to the optimizer's learning rate, then a cosine down to `min_ratio` of it, which the update after
    the last would have. With w updates of warm-up the first has 1 / (w + 1) of the peak: no update is without effect.

    Args:
        optimizer (`torch.optim.Optimizer`): its learning rate is the peak.
        num_warmup_steps (`int`): updates of warm-up; 0 starts at the peak.
        num_training_steps (`int`): updates in all.
        min_ratio (`float`): last learning rate / peak, in [0, 1].
    """

    def ratio(step: int) -> float:
        if step < num_warmup_steps:
            return (step + 1) / (num_warmup_steps + 1)
        return cosine_anneal(step - num_warmup_steps, 1.0, min_ratio, num_training_steps - num_warmup_steps)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, ratio)

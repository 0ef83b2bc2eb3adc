"""What training does to the weights besides their gradients: schedules, learning rates, AdamW with a bounded moment.

Schedules are functions of the update's number (and of where a plateau was found): a resumed run computes the same
values. Which optimizer gets which weights lives in `training/optimizers.py`, scales in `gradient_scaling.py`.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch


def cosine_anneal(step: int, start: float, end: float, num_steps: int) -> float:
    """
    From `start` at step 0 to `end` at `num_steps` along half a cosine, `end` from there on: the form of all the
    paper's stage 1 schedules (temperature, KL weight, learning rate; appendix A.2). `num_steps` of 0 is `end` at once.
    """
    if step >= num_steps:
        return end
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


class PlateauHalving:
    """
    Halves a learning rate each time the training loss no longer falls: the paper's stage 2 did so five times (appendix
    B.2), by a rule that it does not give. This one compares means of the loss over windows of `num_steps` updates: one
    that is not below `1 - threshold` times the least mean before it halves the rate.

    Args:
        num_steps (`int`): updates a window, from 1.
        threshold (`float`): the least relative fall that counts, in [0, 1).
        max_halvings (`int`): as often at most.
        first_step (`int`): updates before the first window, such as the warm-up.
    """

    def __init__(self, num_steps: int, threshold: float = 1e-3, max_halvings: int = 5, first_step: int = 0):
        self.num_steps, self.threshold, self.max_halvings = num_steps, threshold, max_halvings
        self.halvings: list[int] = []  # the updates, counted from 0, from which on the rate is halved once more
        self.least: float | None = None
        self.last_step, self.sum, self.count = first_step, 0.0, 0

    def observe(self, loss: float, step: int) -> None:
        """
        Takes notice of a loss, the same in all processes.

        Args:
            loss (`float`): the mean over the updates since the last call; one that is not finite is passed over.
            step (`int`):
                How many updates there were so far. The next one has its learning rate already: what this call halves
                is halved from the one after it, in a run that is resumed here too.
        """
        num_updates = step - self.last_step
        if num_updates <= 0:
            return
        self.last_step = step
        if math.isfinite(loss):
            self.sum, self.count = self.sum + loss * num_updates, self.count + num_updates
        if self.count < self.num_steps:
            return
        mean, self.sum, self.count = self.sum / self.count, 0.0, 0
        is_flat = self.least is not None and mean > self.least - self.threshold * abs(self.least)
        if is_flat and len(self.halvings) < self.max_halvings:
            self.halvings.append(step + 1)
        self.least = mean if self.least is None else min(mean, self.least)

    def ratio(self, step: int) -> float:
        """The learning rate of update `step`, counted from 0, / that without halvings."""
        return 0.5 ** sum(first <= step for first in self.halvings)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("least", "last_step", "sum", "count")} | {
            "halvings": list(self.halvings)
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state, halvings=list(state["halvings"]))


def get_scheduler(
    name: str,
    optimizer: torch.optim.Optimizer,
    num_warmup_steps: int = 0,
    num_training_steps: int | None = None,
    min_ratio: float = 0.0,
    plateau: PlateauHalving | None = None,
) -> torch.optim.lr_scheduler.LambdaLR:
    """
    A learning-rate schedule by the name it has in transformers. Linear warm-up to the optimizer's learning rate comes
    first: with w updates of warm-up the first has 1 / (w + 1) of the peak, so that no update is without effect.

    Args:
        name (`str`):
            `"cosine"` or `"linear"`: down to `min_ratio` of the peak, which the update after these steps has.
            `"constant"`, without warm-up, or `"constant_with_warmup"`. `"reduce_lr_on_plateau"`: as `plateau` says.
        optimizer (`torch.optim.Optimizer`): its learning rate is the peak.
        num_warmup_steps (`int`): updates of warm-up; 0 starts at the peak.
        num_training_steps (`int`, *optional*): updates until a schedule that leads down ends, warm-up counted.
        min_ratio (`float`): last learning rate / peak, in [0, 1].
        plateau ([`PlateauHalving`], *optional*): what decides; schedules of several optimizers may share it.

    Raises:
        ValueError: for another name, or if what it needs is missing.
    """
    curves: dict[str, Callable[[int], float]] = {
        "cosine": lambda step: cosine_anneal(step - num_warmup_steps, 1.0, min_ratio, num_decay_steps),
        "linear": lambda step: 1 - (1 - min_ratio) * min((step - num_warmup_steps) / max(num_decay_steps, 1), 1),
        "constant": lambda step: 1.0,
        "constant_with_warmup": lambda step: 1.0,
        "reduce_lr_on_plateau": lambda step: plateau.ratio(step),
    }
    if name not in curves:
        raise ValueError(f"There is no learning-rate schedule {name!r}; known are {', '.join(curves)}.")
    if name in ("cosine", "linear") and num_training_steps is None:
        raise ValueError(f"The schedule {name!r} needs `num_training_steps`, where it ends.")
    if name == "reduce_lr_on_plateau" and plateau is None:
        raise ValueError(f"The schedule {name!r} needs a `plateau`, which decides.")
    num_warmup_steps = 0 if name == "constant" else num_warmup_steps
    num_decay_steps = (num_training_steps or 0) - num_warmup_steps

    def ratio(step: int) -> float:
        return (step + 1) / (num_warmup_steps + 1) if step < num_warmup_steps else curves[name](step)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, ratio)


class BoundedAdamW(torch.optim.AdamW):
    """
    AdamW whose running second moment is clipped: v = min(v, `max_second_moment`) after its update and before it is
    used (the paper's stage 2: 5; appendix B.2). Otherwise it is [`torch.optim.AdamW`], with the same states.

    Args:
        params: parameters or groups of them.
        max_second_moment (`float`): the bound, above 0.
        lr, betas, eps, weight_decay: as for [`torch.optim.AdamW`].

    Raises:
        ValueError: for a bound that is not above 0.
    """

    def __init__(
        self,
        params: Iterable,
        max_second_moment: float,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        if not max_second_moment > 0:
            raise ValueError(f"`max_second_moment` is {max_second_moment}; expected a number above 0.")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.max_second_moment = max_second_moment

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """One update of the parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            # All at once is fewer kernels to launch; on a CPU one after the other stays in its caches.
            is_on_cpu = all(param.device.type == "cpu" for param in params)
            for part in [[param] for param in params] if is_on_cpu else [params]:
                self._update(group, part)
        return loss

    def _update(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        states, grads = [self.state[param] for param in params], [param.grad for param in params]
        for param, state in zip(params, states, strict=True):
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
            state["step"] += 1
        first, second = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        (beta1, beta2), lr = group["betas"], group["lr"]
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        torch._foreach_clamp_max_(second, self.max_second_moment)
        steps = [int(state["step"]) for state in states]
        denominators = torch._foreach_sqrt(second)
        torch._foreach_div_(denominators, [math.sqrt(1 - beta2**step) for step in steps])
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(params, first, denominators, [-lr / (1 - beta1**step) for step in steps])

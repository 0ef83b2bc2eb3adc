"""Training in float16: a gradient scale for each resblock of the prior (paper, section 2.4), or one for a whole model.

A scaler puts float16 and its scales onto a model in training mode, takes the scales out of the gradients and says
whether these are finite; whether to update is the training loop's. No optimizer here, no loop.
"""

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import MethodType

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .modeling_dalle_prior import DallePriorLayer


INITIAL_SCALE, MIN_SCALE, MAX_SCALE = 2.0**13, 2.0**7, 2.0**24
GROWTH, BACKOFF, BACKOFF_INTERVAL = 2 ** (1 / 1000), 1 / math.sqrt(2), 125

GLOBAL_INITIAL_SCALE, GLOBAL_GROWTH, GLOBAL_BACKOFF, GLOBAL_GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000


class GradientScaler:
    """
    What all scalers have in common; by itself the one that scales nothing. Of an update:

    ```py
    scaler.scale_loss(loss).backward()  # as often as gradients are accumulated
    if scaler.unscale():
        optimizer.step()
    optimizer.zero_grad()
    scaler.update()
    ```

    Args:
        model (`torch.nn.Module`): whose trained parameters are float32, before it is wrapped for several processes.

    Raises:
        ValueError: for a trained parameter of another dtype.
    """

    is_scaling = False

    def __init__(self, model: nn.Module):
        self.model = model
        for name, parameter in model.named_parameters():
            if self.is_scaling and parameter.requires_grad and parameter.dtype != torch.float32:
                raise ValueError(f"{name} is {parameter.dtype}; float16 training keeps its weights in float32.")
        self._undo: list[Callable[[], None]] = []
        # By scale (`None`: no scale) what belongs to it, and after `unscale` whether its gradients are finite.
        self._parameters: dict[str | None, list[nn.Parameter]] = {}
        self._owners: dict[int, str | None] = {}  # by the parameter's id
        self._is_finite: dict[str | None, bool] | None = None

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to call `backward()` on."""
        return loss

    def scale_of(self, parameter: nn.Parameter) -> float:
        """What the gradient of this parameter is multiplied by between `backward()` and `unscale()`."""
        self._grouped_parameters()
        name = self._owners.get(id(parameter))
        return 1.0 if name is None else self._scale(name)

    def unscale(self) -> bool:
        """
        Takes the scales out of the gradients, once an update, after its last `backward()`.

        Returns:
            `bool`: whether all gradients are finite, the same in all processes. Where it is `False` the update is to
            be skipped: the gradients are of no use. Without scales `True`, unseen.
        """
        if not self.is_scaling:
            return True
        gradients = {name: _local_gradients(group) for name, group in self._grouped_parameters().items()}
        flags = [self._find_nonfinite(name, grads) for name, grads in gradients.items()]
        device = next(self.model.parameters()).device
        flags = torch.stack([flag.to(device, torch.int32) for flag in flags])
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            # Gradients that DDP has averaged are the same everywhere; shards of them, and what a filter saw, are not.
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        self._is_finite = {name: not flag for name, flag in zip(gradients, flags.tolist(), strict=True)}
        is_finite = all(self._is_finite.values())
        if is_finite:
            for name, grads in gradients.items():
                if name is not None and grads:
                    torch._foreach_mul_(grads, 1 / self._scale(name))
        return is_finite

    def update(self) -> None:
        """
        Adapts the scales to what `unscale` found, once an update, a skipped one too.

        Raises:
            ValueError: if `unscale` was not called.
        """
        if self.is_scaling and self._is_finite is None:
            raise ValueError("Call `unscale()` after `backward()` and before `update()`.")
        if self.is_scaling:
            self._adapt(self._is_finite)
        self._is_finite = None

    def state_dict(self) -> dict:
        """The scales and their counters, plain numbers, the same in all processes."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """
        Goes on from a state; an empty one, of a run without scales, leaves the initial scales.

        Raises:
            ValueError: for a state of other scales.
        """

    def remove(self) -> None:
        """Leaves the model as it was."""
        while self._undo:
            self._undo.pop()()

    def _scale(self, name: str) -> float:
        raise NotImplementedError

    def _adapt(self, is_finite: dict[str | None, bool]) -> None:
        raise NotImplementedError

    def _owner_of(self, name: str) -> str | None:
        """The scale that a parameter's gradient has, by the parameter's name."""
        return None

    def _grouped_parameters(self) -> dict[str | None, list[nn.Parameter]]:
        # Looked up late: sharding a model gives it new parameters.
        if not self._parameters:
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    owner = self._owners[id(parameter)] = self._owner_of(name)
                    self._parameters.setdefault(owner, []).append(parameter)
        return self._parameters

    def _find_nonfinite(self, name: str | None, grads: list[torch.Tensor]) -> torch.Tensor:
        """A bool, not waited for."""
        # The largest magnitude: NaN if there is one, inf if there is one.
        return ~torch.isfinite(torch.nn.utils.get_total_norm(grads, math.inf)) if grads else torch.tensor(False)

    def _wrap_forward(self, module: nn.Module, run: Callable) -> None:
        """`run(forward, *args, **kwargs)` in the place of `module`'s forward in training mode."""

        @functools.wraps(type(module).forward)
        def forward(self, *args, **kwargs):
            own_forward = MethodType(type(self).forward, self)  # looked up now: sharding changes a module's class
            return run(own_forward, *args, **kwargs) if self.training else own_forward(*args, **kwargs)

        # A method, which a copy of the module binds to itself.
        module.forward = MethodType(forward, module)
        self._undo.append(lambda: module.__dict__.pop("forward"))


class GlobalGradientScaler(GradientScaler):
    """
    One scale for all gradients, on the loss, and the whole model under autocast: as in [`torch.amp.GradScaler`] the
    scale starts at 2^16, is halved by each update that is not finite, and doubled after 2,000 finite ones in a row.

    Unlike that class it needs no optimizer, so any number of them may share it, and works on any device.

    Args:
        model (`torch.nn.Module`): as for [`GradientScaler`].
        dtype (`torch.dtype`, *optional*, defaults to `torch.float16`): of autocast; none: no autocast.
    """

    is_scaling = True

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = torch.float16):
        super().__init__(model)
        self.scale, self.num_finite = GLOBAL_INITIAL_SCALE, 0

        def run(forward, *args, **kwargs):
            with _autocast(model, dtype):
                return forward(*args, **kwargs)

        self._wrap_forward(model, run)

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self.scale

    def state_dict(self) -> dict:
        return {"scale": self.scale, "num_finite": self.num_finite}

    def load_state_dict(self, state: dict) -> None:
        if state:
            _check_keys(state, self.state_dict())
            self.scale, self.num_finite = state["scale"], state["num_finite"]

    def _owner_of(self, name: str) -> str | None:
        return "loss"

    def _scale(self, name: str) -> float:
        return self.scale

    def _adapt(self, is_finite: dict[str | None, bool]) -> None:
        self.num_finite = self.num_finite + 1 if all(is_finite.values()) else 0
        if self.num_finite == 0:
            self.scale *= GLOBAL_BACKOFF
        elif self.num_finite == GLOBAL_GROWTH_INTERVAL:
            self.scale, self.num_finite = self.scale * GLOBAL_GROWTH, 0


class ResblockGradientScaler(GradientScaler):
    """
    A gradient scale for each resblock of a prior, two a layer: attention and MLP, each with its LayerNorm before
    (paper, section 2.4 and figure 4).

    The resblocks compute under autocast; all else, the residual stream and its gradients among it, the LayerNorms,
    embeddings and logits, is float32. A gradient is multiplied by the resblock's scale, in float32, where it enters
    the resblock's backward pass. Where it leaves it for the residual stream it is divided by the scale, and values
    that are not finite become 0, so that they do not reach the resblocks before. The parameters' gradients stay scaled
    until `unscale`.

    A scale starts at 2^13 and stays in [2^7, 2^24]. An update whose gradients are all finite multiplies each by
    2^(1/1000). Otherwise the update is to be skipped, and the scale of each resblock that has a parameter gradient
    which is not finite is divided by sqrt(2), unless that happened within its last 125 updates, skipped ones counted.
    These are the paper's numbers for M = 1: the gradients of the processes are averaged, not summed. With a resblock
    that has frozen parameters (LoRA), a value that became 0 on the way out counts as well, since there may be no
    parameter gradient to show it.

    Args:
        model ([`DallePriorForCausalLM`] or [`DallePriorModel`]):
            Also with adapters. It is to be wrapped, for several processes, after this. The resblocks' hooks work in
            training mode alone, and with gradient checkpointing.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float16`): of autocast; none: no autocast.

    Raises:
        ValueError: for a model without resblocks, or a trained parameter that is not float32.
    """

    is_scaling = True

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = torch.float16):
        super().__init__(model)
        self.scales: dict[str, float] = {}
        self.num_since_backoff: dict[str, int] = {}
        self._prefixes: dict[str, str] = {}  # of parameters' names, to the resblock
        self._filtered: dict[str, torch.Tensor] = {}  # whether a value became 0, of resblocks with frozen parameters
        for layer_name, layer in model.named_modules():
            if isinstance(layer, DallePriorLayer):
                for norm, body in (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp")):
                    self._add(layer_name, layer, norm, body, dtype)
        if not self.scales:
            raise ValueError("The model has no resblocks of a prior: use one global gradient scale.")

    def state_dict(self) -> dict:
        return {"scales": dict(self.scales), "num_since_backoff": dict(self.num_since_backoff)}

    def load_state_dict(self, state: dict) -> None:
        if not state:
            return
        _check_keys(state, self.state_dict())
        for name, own in self.state_dict().items():
            _check_keys(state[name], own)
        self.scales.update(state["scales"])
        self.num_since_backoff.update(state["num_since_backoff"])

    def _add(self, layer_name: str, layer: nn.Module, norm_name: str, body_name: str, dtype: torch.dtype | None):
        dot = "." if layer_name else ""
        name, norm, body = f"{layer_name}{dot}{body_name}", getattr(layer, norm_name), getattr(layer, body_name)
        self.scales[name], self.num_since_backoff[name] = INITIAL_SCALE, BACKOFF_INTERVAL
        self._prefixes |= {f"{name}.": name, f"{layer_name}{dot}{norm_name}.": name}
        has_frozen = not all(parameter.requires_grad for part in (norm, body) for parameter in part.parameters())

        def leave(module, args):
            note = functools.partial(self._note_filtered, name) if has_frozen else None
            return (_LeaveBackward.apply(args[0], self.scales[name], note), *args[1:]) if module.training else None

        def run(forward, *args, **kwargs):
            with _autocast(body, dtype):
                output = forward(*args, **kwargs)
            states, *rest = output if isinstance(output, tuple) else (output,)
            # To float32 first: in the backward pass, the gradient is then multiplied before it becomes float16.
            states = _EnterBackward.apply(states.float(), self.scales[name])
            return (states, *rest) if isinstance(output, tuple) else states

        self._undo.append(norm.register_forward_pre_hook(leave).remove)
        self._wrap_forward(body, run)

    def _note_filtered(self, name: str, is_nonfinite: torch.Tensor) -> None:
        self._filtered[name] = self._filtered.get(name, False) | is_nonfinite

    def _owner_of(self, name: str) -> str | None:
        return next((block for prefix, block in self._prefixes.items() if name.startswith(prefix)), None)

    def _grouped_parameters(self) -> dict[str | None, list[nn.Parameter]]:
        groups = super()._grouped_parameters()
        for name in self.scales:
            groups.setdefault(name, [])  # all frozen
        return groups

    def _find_nonfinite(self, name: str | None, grads: list[torch.Tensor]) -> torch.Tensor:
        flag = super()._find_nonfinite(name, grads)
        return flag | self._filtered[name].to(flag.device) if name in self._filtered else flag

    def _scale(self, name: str) -> float:
        return self.scales[name]

    def _adapt(self, is_finite: dict[str | None, bool]) -> None:
        self._filtered.clear()
        is_update = all(is_finite.values())
        for name, scale in self.scales.items():
            self.num_since_backoff[name] = min(self.num_since_backoff[name] + 1, BACKOFF_INTERVAL)
            if is_update:
                self.scales[name] = min(scale * GROWTH, MAX_SCALE)
            elif not is_finite[name] and self.num_since_backoff[name] == BACKOFF_INTERVAL:
                self.scales[name], self.num_since_backoff[name] = max(scale * BACKOFF, MIN_SCALE), 0


class _EnterBackward(torch.autograd.Function):
    """The identity, at a resblock's end, where its backward pass begins."""

    @staticmethod
    def forward(ctx, states, scale):
        ctx.scale = scale
        return states.view_as(states)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.scale, None


class _LeaveBackward(torch.autograd.Function):
    """The identity, at a resblock's beginning, where its backward pass ends."""

    @staticmethod
    def forward(ctx, states, scale, note):
        ctx.scale, ctx.note = scale, note
        return states.view_as(states)

    @staticmethod
    def backward(ctx, grad):
        if ctx.note is not None:
            ctx.note(~torch.isfinite(grad).all())
        return torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0) / ctx.scale, None, None


def _autocast(module: nn.Module, dtype: torch.dtype | None) -> AbstractContextManager:
    return nullcontext() if dtype is None else torch.autocast(next(module.parameters()).device.type, dtype)


def _local_gradients(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """This process's part of the gradients that there are."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    grads = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    return [grad for grad in grads if grad.numel()]


def _check_keys(found: dict, own: dict) -> None:
    if found.keys() != own.keys():
        raise ValueError(f"This state is of other gradient scales: {_join(found)}, not {_join(own)}.")


def _join(keys: dict) -> str:
    return ", ".join(list(keys)[:4]) + (", ..." if len(keys) > 4 else "")

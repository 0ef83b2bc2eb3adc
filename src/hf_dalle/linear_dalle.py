"""`DalleLinear`: `nn.Linear` whose float32 products on a CPU go through oneDNN, for few rows and for many.

PyTorch sends float32 `F.linear` to MKL, which on processors of other makers than its own reads weights at half the
memory's speed and multiplies at half the cores'. Weights, names and results (to rounding) are those of `nn.Linear`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class DalleLinear(nn.Linear):
    """A linear layer, `nn.Linear` but for its speed; its float32 gradients on a CPU have none of their own."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return linear(hidden_states, self.weight, self.bias)


class DallePriorHead(nn.Linear):
    """A linear head of which text states use the first rows only, and image states the last."""

    def forward(
        self, text: torch.Tensor, image: torch.Tensor, num_text_logits: int, num_image_logits: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """... x width each, to ... x num_text_logits and ... x num_image_logits."""
        num_between = len(self.weight) - num_text_logits - num_image_logits
        # One split, whose gradient is written once, where slices would each fill a whole weight.
        text_weight, _, image_weight = self.weight.split([num_text_logits, num_between, num_image_logits])
        return linear(text, text_weight), linear(image, image_weight)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """
    `F.linear`, through oneDNN where that is exact to rounding and there is one: float32 on a CPU, without autocast.
    `torch.backends.mkldnn.flags(enabled=False)` turns it off.

    Args:
        x (`torch.Tensor`): ... x in.
        weight (`torch.Tensor`): out x in, as `nn.Linear` holds it.
        bias (`torch.Tensor`, *optional*): out.

    Returns:
        `torch.Tensor`: ... x out.
    """
    if not _is_onednn_faster(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _OneDnnLinear.apply(x, weight, bias)
    return _multiply(x, weight, bias)


def _is_onednn_faster(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        _HAS_ONEDNN
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and type(weight) in (torch.Tensor, nn.Parameter)  # not a quantized or a distributed one
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()  # an exported graph is to run anywhere
        and (torch.compiler.is_compiling() or torch.backends.mkldnn.enabled)
    )


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if torch.compiler.is_compiling():
        return _multiply_in_graph(x, weight, bias)
    # The operator that `torch.compile` emits for linear layers on CPUs; it takes weights as they lie in memory.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _define_operator() -> Callable[..., torch.Tensor]:
    """
    The product under a name of its own: the compiler takes oneDNN's for weights only that it has packed itself.

    A copy of this module, as of code that came with a model, takes the operator that is there: to define it again
    would leave the first module with one that is gone.
    """
    if hasattr(torch.ops.hf_dalle, "linear"):
        return torch.ops.hf_dalle.linear.default

    @torch.library.custom_op("hf_dalle::linear", mutates_args=())
    def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @multiply.register_fake
    def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return x.new_empty(*x.shape[:-1], len(weight))

    return multiply


_multiply_in_graph = _define_operator()


class _OneDnnLinear(torch.autograd.Function):
    """The operator has no gradient of its own."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            grad_x = _multiply(rows, weight.t()).view_as(x)
        if ctx.needs_input_grad[1]:
            x_rows = x.reshape(-1, x.shape[-1])
            # The operator copies its first argument into rows: the narrower of the two.
            if rows.shape[1] <= x_rows.shape[1]:
                grad_weight = _multiply(rows.t(), x_rows.t())
            else:
                grad_weight = _multiply(x_rows.t(), rows.t()).t().contiguous()
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(dim=0)
        return grad_x, grad_weight, grad_bias

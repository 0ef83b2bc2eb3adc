"""PowerSGD as the paper has it (section 2.5, appendix E): low-rank factors of gradients in the place of gradients.

A communication hook for `DistributedDataParallel`, its error buffers as checkpoints hold them, and the bytes it sends.
Which machines there are, and when an update is skipped, is the training scripts' matter.
"""

import hashlib
import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


EPSILON = 1e-6  # of the identity that is added before P is made orthogonal


def choose_rank(width: int) -> int:
    """
    The rank for a transformer of this width: 0.225 of it, rounded up to a multiple of 128. At the paper's three widths
    (1920, 2688, 3968) these are its ranks (512, 640, 896).
    """
    return 128 * math.ceil(0.225 * width / 128)


def list_compressible(model: nn.Module, rank: int) -> dict[str, nn.Parameter]:
    """
    The trained parameters by name of which PowerSGD sends factors: matrices that are neither an embedding nor the head
    of `model` (which may have a `get_output_embeddings`), and of which the factors of `rank` are smaller.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    others = {id(module.weight) for module in (*modules, head) if module is not None}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and parameter.ndim == 2
        and id(parameter) not in others
        and rank * sum(parameter.shape) < parameter.numel()
    }


def count_bytes(model: nn.Module, rank: int | None = None) -> int:
    """
    Bytes that each process puts into all-reduces at an update: four for each number of the factors and of the other
    gradients, with `rank=None` of all gradients. `model` may be on the meta device. A ring of n processes moves
    2 (n - 1) / n times as many out of each.
    """
    compressible = list_compressible(model, rank) if rank is not None else {}
    factors = sum(rank * sum(matrix.shape) for matrix in compressible.values())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return 4 * (trained - sum(matrix.numel() for matrix in compressible.values()) + factors)


class _Matrix:
    """What belongs to one parameter: its fixed Q, and this process's error buffer, float32."""

    def __init__(self, name: str, parameter: nn.Parameter, rank: int, seed: int):
        self.name, self.is_tall = name, parameter.shape[0] > parameter.shape[1]
        num_columns = max(parameter.shape)
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        q = torch.randn(num_columns, min(rank, *parameter.shape), generator=generator)
        self.q = q.to(parameter.device)
        self.error = torch.zeros(parameter.shape, device=parameter.device)

    def widen(self, whole: torch.Tensor) -> torch.Tensor:
        """Turned so that it has no more rows than columns, and back: the QR is of as few rows as may be."""
        return whole.t() if self.is_tall else whole


class PowerSGD:
    r"""
    Averages gradients over processes by low-rank factors, with error feedback.

    For each matrix with gradient G, turned to m x n with m <= n, and this process's error buffer E:
    `M = G / scale + E`; `P = mean(M Q)`; P = the orthogonal factor of the Householder QR of `P + 1e-6 I`;
    `Q' = mean(M^T P)`; `G_hat = P Q'^T`; `E = M - G_hat`. Means are over processes, Q (n x rank) is drawn once from a
    standard Gaussian and stays, and the gradient that the optimizer sees is `scale * G_hat`. All other parameters'
    gradients are averaged as they are. Everything is computed and sent in float32, where the paper had 16-bit formats
    of its own, and of whole matrices, where the paper's were shards: so its rate of 1 - 5 r / (8 d) is here
    1 - 3 r / (2 d), over the matrices of a layer of width d.

    Where a gradient is not finite on any process it is NaN on all of them, so that all skip the update. Its error
    buffer keeps M where that is finite, else E. A skipped update drops G_hat of the other matrices and keeps their E.

    Args:
        parameters (`dict[str, nn.Parameter]`): what to compress, by name: see [`list_compressible`].
        rank (`int`): of the factors; at most the shorter side of each matrix.
        seed (`int`, *optional*, defaults to 0): Q is a function of it, the parameter's name and its shape.
        scale_of (`Callable`, *optional*):
            Gives what a parameter's gradient is multiplied by at the end of the backward pass (loss or gradient
            scaling), a number or a tensor of one; by default 1.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        rank: int,
        seed: int = 0,
        scale_of: Callable[[nn.Parameter], float | torch.Tensor] | None = None,
    ):
        self.rank, self.seed = rank, seed
        self.scale_of = scale_of or (lambda parameter: 1.0)
        self._matrices = {id(value): _Matrix(name, value, rank, seed) for name, value in parameters.items()}
        self._parameters = list(parameters.values())  # holds them, so that no id is given anew
        self.group: dist.ProcessGroup | None = None
        self._stream: torch.Stream | None = None

    def register(self, model: nn.Module) -> None:
        """
        Takes the place of the all-reduce of `model`.

        Raises:
            `ValueError`: if it is not a [`~torch.nn.parallel.DistributedDataParallel`] of all the parameters, or one
                that looks for unused ones, whose error would be fed back into no gradient.
        """
        if not isinstance(model, DistributedDataParallel):
            raise ValueError(
                f"PowerSGD compresses the gradients of DistributedDataParallel, but the model is a"
                f" {type(model).__name__}: start two processes or more, without FSDP or DeepSpeed, or leave it off."
            )
        if model.find_unused_parameters:
            raise ValueError("PowerSGD needs every parameter at each update: set `find_unused_parameters=False`.")
        trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        lost = [matrix.name for key, matrix in self._matrices.items() if key not in trained]
        if lost:
            raise ValueError(f"PowerSGD was given parameters that the model does not train: {', '.join(lost[:5])}.")
        self.group = model.process_group
        for matrix in self._matrices.values():
            # Drawn alike everywhere; sent once all the same, since processors may differ in the last bit.
            dist.broadcast(matrix.q, dist.get_global_rank(self.group, 0), group=self.group)
        model.register_comm_hook(self, PowerSGD._average_bucket)

    def _average_bucket(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer, pairs = bucket.buffer(), list(zip(bucket.parameters(), bucket.gradients(), strict=True))
        if buffer.device.type == "cpu":
            future = torch.futures.Future()
            self._average(pairs)
            future.set_result(buffer)
            return future
        # On a stream of its own, so that the backward pass goes on. The order of collectives is that of the buckets.
        self._stream = self._stream or torch.Stream(buffer.device)
        self._stream.wait_stream(torch.accelerator.current_stream(buffer.device))
        future = torch.futures.Future(devices=[buffer.device])
        with self._stream:
            self._average(pairs)
            future.set_result(buffer)
        return future

    @torch.no_grad()
    def _average(self, pairs: list[tuple[nn.Parameter, torch.Tensor]]) -> None:
        """Averages gradients in place; each pair is a parameter and its gradient."""
        compressed = [
            (self._matrices[id(key)], self.scale_of(key), g) for key, g in pairs if id(key) in self._matrices
        ]
        others = [gradient for key, gradient in pairs if id(key) not in self._matrices]
        for gradient, mean in zip(others, self._mean([gradient.float() for gradient in others]), strict=True):
            gradient.copy_(mean)
        wholes = [gradient.float() / scale + matrix.error for matrix, scale, gradient in compressed]
        ps = self._mean([m.widen(whole) @ m.q for (m, *_), whole in zip(compressed, wholes, strict=True)])
        is_finite = [p.isfinite().all() for p in ps]
        ps = [_orthogonalize(p.where(flag, 0)) for p, flag in zip(ps, is_finite, strict=True)]
        qs = self._mean([m.widen(whole).t() @ p for (m, *_), whole, p in zip(compressed, wholes, ps, strict=True)])
        for (matrix, scale, gradient), whole, p, q, flag in zip(compressed, wholes, ps, qs, is_finite, strict=True):
            gradient.copy_((matrix.widen(p @ q.t()) * scale).where(flag, math.nan))
            kept = whole.where(whole.isfinite().all(), matrix.error)
            # What is applied, in the gradient's own precision, is what was sent.
            matrix.error = (whole - gradient.float() / scale).where(gradient.isfinite().all(), kept)

    def _mean(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Means over processes, by one all-reduce."""
        if not tensors:
            return []
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat, group=self.group)
        parts = (flat / dist.get_world_size(self.group)).split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def state_dict(self) -> dict:
        """This process's error buffers. Q is no part of it: seed and name give it back."""
        errors = {matrix.name: matrix.error for matrix in self._matrices.values()}
        return {"rank": self.rank, "seed": self.seed, "errors": errors}

    def load_state_dict(self, state: dict) -> None:
        """
        Raises:
            `ValueError`: for a state of another rank or seed, or of other parameters.
        """
        self._check(state)
        for matrix in self._matrices.values():
            matrix.error.copy_(state["errors"][matrix.name])

    def _check(self, state: dict) -> None:
        for name in ("rank", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"The error buffers are of PowerSGD with {name} {state[name]}, but this run's is"
                    f" {getattr(self, name)}: keep it, or start in another folder."
                )
        own = {matrix.name: matrix.error.shape for matrix in self._matrices.values()}
        given = {name: error.shape for name, error in state["errors"].items()}
        if own != given:
            wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
            raise ValueError(f"The error buffers are of other parameters than the model's: {', '.join(wrong[:5])}.")


class SummedErrors:
    """
    The sum of all processes' error buffers, on which alone later updates depend (paper, appendix E.2): what a
    checkpoint needs to go on with any number of processes. Gradients are averaged here, not summed as in the paper, so
    each process starts from the mean of the buffers: then what is still to be sent has the weight that it had.
    """

    def __init__(self, hook: PowerSGD):
        self.hook = hook

    def state_dict(self) -> dict:
        """The same on all processes, and all must call it."""
        state = {**self.hook.state_dict(), "num_processes": dist.get_world_size(self.hook.group)}
        for name, error in state["errors"].items():
            state["errors"][name] = error.clone()
            dist.all_reduce(state["errors"][name], group=self.hook.group)
        return state

    def load_state_dict(self, state: dict) -> None:
        """Errors as for [`PowerSGD.load_state_dict`]."""
        means = {name: total / state["num_processes"] for name, total in state["errors"].items()}
        self.hook.load_state_dict({**state, "errors": means})


def _orthogonalize(p: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns that span those of P + 1e-6 I (m x r, with the r x r identity on top)."""
    return torch.linalg.qr(p + EPSILON * torch.eye(*p.shape, dtype=p.dtype, device=p.device)).Q


__all__ = ["PowerSGD", "SummedErrors", "choose_rank", "count_bytes", "list_compressible"]

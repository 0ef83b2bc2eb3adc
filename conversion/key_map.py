"""Which weights of a source become which of ours, as a list of rules that has no gaps.

Every key of the source is used by one rule or dropped with a reason, every target is filled, and all shapes are
checked before a tensor is read. The names themselves live in `families/`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from .safe_load import StoredTensor


class Rule(NamedTuple):
    """Targets made from sources; `change` takes as many tensors as there are sources, `None` is the identity."""

    targets: tuple[str, ...]
    sources: tuple[str, ...]
    change: Callable | None

    def apply(self, tensors: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The targets by name."""
        made = self.change(*tensors) if self.change is not None else tuple(tensors)
        made = (made,) if isinstance(made, torch.Tensor) else made
        return dict(zip(self.targets, made, strict=True))


class KeyMap:
    """
    The rules from one state dict to another.

    Args:
        source (`Mapping[str, StoredTensor]`): from [`list_tensors`].
        target (`Mapping[str, torch.Size]`): from [`list_parameters`].
    """

    def __init__(self, source: Mapping[str, StoredTensor], target: Mapping[str, torch.Size]):
        self.source, self.target = source, target
        self.rules: list[Rule] = []
        self.dropped: dict[str, str] = {}
        self.beside: dict[str, str] = {}
        self._rule_of: dict[str, Rule] | None = None

    def add(self, targets: str | tuple[str, ...], sources: str | tuple[str, ...], change: Callable | None = None):
        """
        One rule: `add("ours", "theirs")`, or several of several with what makes them.

        Args:
            targets (`str` or tuple of them): names of ours.
            sources (`str` or tuple of them): names of theirs.
            change (`Callable`, *optional*):
                From the sources' tensors to one tensor, or a tuple for several targets. It also runs on the meta
                device, so it may not look at values.
        """
        targets = (targets,) if isinstance(targets, str) else tuple(targets)
        sources = (sources,) if isinstance(sources, str) else tuple(sources)
        self.rules.append(Rule(targets, sources, change))
        self._rule_of = None

    def drop(self, source: str, reason: str) -> None:
        """A key that is not used, and why."""
        self.dropped[source] = reason

    def drop_all(self, prefix: str, reason: str) -> None:
        """[`~KeyMap.drop`] for all keys that begin so."""
        for name in self.source:
            if name.startswith(prefix):
                self.drop(name, reason)

    def drop_beside(self, names: Iterable[str], reason: str) -> None:
        """What a source holds beside its weights, by name, and why it is not looked at."""
        self.beside |= dict.fromkeys(sorted(names), reason)

    def check(self) -> None:
        """
        Raises:
            ValueError: naming every key that is unknown, used twice, neither used nor dropped, every target that is
                not filled or filled twice, and every shape that is another.
        """
        used = [name for rule in self.rules for name in rule.sources]
        filled = [name for rule in self.rules for name in rule.targets]
        faults = [
            ("keys that the source lacks", [*(set(used) - set(self.source)), *(set(self.dropped) - set(self.source))]),
            ("keys that are used twice", _find_repeated([*used, *self.dropped])),
            ("keys that nothing uses", [name for name in self.source if name not in {*used, *self.dropped}]),
            ("weights that nothing fills", [name for name in self.target if name not in set(filled)]),
            ("weights that the model has not", set(filled) - set(self.target)),
            ("weights that are filled twice", _find_repeated(filled)),
        ]
        words = [f"{title}: {_list_some(names)}" for title, names in faults if names]
        if not words:
            words = [fault for rule in self.rules for fault in self._check_shapes(rule)]
        if words:
            raise ValueError(f"The source does not fit the model. {'; '.join(words)}.")

    def _check_shapes(self, rule: Rule) -> Iterable[str]:
        shapes = [tuple(self.source[name].shape) for name in rule.sources]
        try:
            made = rule.apply([torch.empty(shape, device="meta") for shape in shapes])
        except (RuntimeError, ValueError, IndexError) as error:
            yield f"{', '.join(rule.sources)} of shape {shapes} cannot become {', '.join(rule.targets)} ({error})"
            return
        for name, tensor in made.items():
            if tensor.shape != self.target[name]:
                yield (
                    f"{name} is {tuple(self.target[name])}, but becomes {tuple(tensor.shape)} from"
                    f" {', '.join(rule.sources)} of shape {shapes}"
                )

    def read(self, target: str) -> torch.Tensor:
        """
        Reads what one target is made from, and makes it; nothing is kept.

        Args:
            target (`str`): a name of ours.

        Returns:
            `torch.Tensor`: contiguous, in the precision that it is stored in.
        """
        if self._rule_of is None:
            self._rule_of = {name: rule for rule in self.rules for name in rule.targets}
        rule = self._rule_of[target]
        return rule.apply([self.source[name].read() for name in rule.sources])[target].contiguous()


def list_parameters(model: nn.Module) -> dict[str, torch.Size]:
    """
    What a file of a model's weights holds, by name; tied weights once.

    Args:
        model (`nn.Module`): on any device, also "meta".
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}  # transformers' {copy: original}
    return {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}


def join_rows(*parts: torch.Tensor) -> torch.Tensor:
    """The `change` of a rule that puts weights one under the other."""
    return torch.cat(parts)


def _find_repeated(names: list[str]) -> set[str]:
    return {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()


def _list_some(names: Iterable[str], most: int = 20) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

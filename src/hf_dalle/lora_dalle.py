"""Low-rank adapters (LoRA) of the prior under diffusers' names: load, weigh, fuse, unload, save.

The layers are peft's, which the extra `lora` installs and nothing here imports before an adapter is asked for. How
adapters are trained lives in `training/finetune_prior.py`.
"""

import importlib.util
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE, LoraBaseMixin, _fetch_state_dict
from safetensors import SafetensorError
from torch import nn

from .modeling_dalle_prior import DallePriorForCausalLM, DallePriorHead


class DalleLoraLoaderMixin(LoraBaseMixin):
    r"""
    Loads LoRA adapters into a pipeline's `prior` and saves them, as diffusers' own mixins do for their models. What is
    inherited from [`~diffusers.loaders.lora_base.LoraBaseMixin`] works as there: `get_active_adapters`,
    `get_list_adapters`, `enable_lora`, `num_fused_loras`.
    """

    _lora_loadable_modules = ["prior"]
    prior_name = "prior"

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, torch.Tensor],
        weight_name: str | None = None,
        return_lora_metadata: bool = False,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool | None = None,
        proxies: dict | None = None,
    ) -> dict[str, torch.Tensor] | tuple[dict[str, torch.Tensor], dict | None]:
        """
        Reads an adapter's weights.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `Path` or `dict`):
                A folder, a file, a repository of the Hub, or the weights themselves.
            weight_name (`str`, *optional*, defaults to `"pytorch_lora_weights.safetensors"`): file in the folder.
            return_lora_metadata (`bool`, *optional*, defaults to `False`): whether to return the file's metadata too.
            subfolder, revision, token, cache_dir, force_download, local_files_only, proxies:
                As for [`~huggingface_hub.hf_hub_download`].

        Returns:
            `dict` of tensors, names beginning with `prior.`; with `return_lora_metadata` the tuple `(weights,
            metadata)`, the latter `None` where there is none.

        Raises:
            OSError: if the file is missing or damaged.
            ValueError: for a file that is no safetensors file.
        """
        source, weight_name = pretrained_model_name_or_path_or_dict, weight_name or LORA_WEIGHT_NAME_SAFE
        is_file = not isinstance(source, dict) and os.path.isfile(source)
        if not str(source if is_file else weight_name).endswith(".safetensors"):
            raise ValueError(
                f"Adapters are read from .safetensors files only, not {source if is_file else weight_name}."
            )
        try:
            weights, metadata = _fetch_state_dict(
                source if isinstance(source, dict) else str(source),
                weight_name=weight_name,
                use_safetensors=True,
                allow_pickle=False,
                user_agent={"file_type": "lora", "framework": "pytorch"},
                subfolder=subfolder,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                proxies=proxies,
            )
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise OSError(f"The adapter {weight_name} of {source} cannot be loaded: {reason}") from error
        return (weights, metadata) if return_lora_metadata else weights

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        **kwargs,
    ) -> None:
        """
        Adds an adapter to the prior and makes it the active one, with weight 1; after [`disable_lora`] this enables
        adapters again. [`set_adapters`] mixes several.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `Path` or `dict`):
                A folder, a file, a repository of the Hub, or the weights themselves.
            adapter_name (`str`, *optional*): what the other methods call it; by default `default_0`, `default_1`, ...
            kwargs: as for [`lora_state_dict`], such as `weight_name`.

        Raises:
            OSError: if the file is missing or damaged, or peft is not installed.
            ValueError: for an adapter of another model or of a kind other than plain LoRA, or a name that is taken or
                that a layer cannot bear; while adapters are fused.
        """
        check_peft()
        self._check_unfused("load an adapter")
        loaded: Any = self.lora_state_dict(pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs)
        weights, metadata = loaded
        source = pretrained_model_name_or_path_or_dict
        source = "The adapter" if isinstance(source, dict) else f"The adapter of {source}"
        taken = getattr(self.prior, "peft_config", {})
        adapter_name = adapter_name or next(name for i in count() if (name := f"default_{i}") not in taken)
        if adapter_name in taken:
            raise ValueError(f"There is an adapter {adapter_name!r} already: pass another `adapter_name`.")
        if "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
            raise ValueError(
                f"`adapter_name` is {adapter_name!r}, which torch takes for no name of a module: leave out dots, or"
                " choose another word."
            )
        weights = {name.removeprefix(f"{self.prior_name}."): value for name, value in weights.items()}
        ranks = _check_weights(self.prior, weights, source)
        if any(layer.disable_adapters for layer in _list_layers(self.prior)):
            self.enable_lora()  # or the new one would act only in layers that no other adapter has
        was_offloaded = self._optionally_disable_offloading(self)
        _add_adapter(self.prior, weights, _make_config(ranks, _own_metadata(metadata)), adapter_name)
        if was_offloaded[0]:
            self.enable_model_cpu_offload()
        elif was_offloaded[1]:
            self.enable_sequential_cpu_offload()

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | Path,
        prior_lora_layers: nn.Module | dict[str, torch.Tensor],
        weight_name: str | None = None,
        prior_lora_adapter_metadata: dict[str, Any] | None = None,
        is_main_process: bool = True,
    ) -> None:
        """
        Writes one adapter as [`load_lora_weights`] reads it.

        Args:
            save_directory (`str` or `Path`): the folder, made if it is missing.
            prior_lora_layers ([`DallePriorForCausalLM`] or `dict` of tensors):
                The prior with its one active adapter, or what peft's `get_peft_model_state_dict` gives.
            weight_name (`str`, *optional*, defaults to `"pytorch_lora_weights.safetensors"`): the file's name.
            prior_lora_adapter_metadata (`dict`, *optional*):
                `r` and `lora_alpha` of the weights, as peft's `LoraConfig` names them. A prior brings its own; weights
                without any load with an alpha of their rank.
            is_main_process (`bool`, *optional*, defaults to `True`): elsewhere nothing is written.

        Raises:
            ValueError: if the prior has no or several active adapters.
            OSError: if the folder cannot be written.
        """
        layers, metadata = prior_lora_layers, prior_lora_adapter_metadata
        if isinstance(layers, nn.Module):
            layers, metadata = collect_adapter(layers)
        if not layers:
            raise ValueError("`prior_lora_layers` is empty: there is no adapter to save.")
        if Path(save_directory).is_file():
            raise OSError(f"`save_directory` is {save_directory}, which is a file: name a folder.")
        if is_main_process:
            cls._save_lora_weights(
                save_directory=save_directory,
                # safetensors refuses what is not contiguous, such as a transposed matrix
                lora_layers={cls.prior_name: {name: value.contiguous() for name, value in layers.items()}},
                lora_metadata={cls.prior_name: metadata},
                weight_name=weight_name,
            )

    def set_adapters(
        self,
        adapter_names: str | list[str],
        adapter_weights: float | dict | list[float] | list[dict] | None = None,
    ) -> None:
        """
        Makes these adapters the active ones.

        Args:
            adapter_names (`str` or `list[str]`): names that [`load_lora_weights`] gave.
            adapter_weights (`float` or `list[float]`, *optional*, defaults to 1): one for all, or one an adapter.

        Raises:
            OSError: if peft is not installed.
            ValueError: for an unknown name, or while adapters are fused.
        """
        check_peft()
        self._check_names([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        self._check_unfused("weigh adapters")
        super().set_adapters(adapter_names, adapter_weights)

    def disable_lora(self) -> None:
        """Lets the prior compute as without adapters until [`enable_lora`]; a `ValueError` while they are fused."""
        check_peft()
        self._check_unfused("disable adapters")
        super().disable_lora()

    def delete_adapters(self, adapter_names: str | list[str]) -> None:
        """
        Removes adapters; without the last of them the prior is as it was.

        Raises:
            OSError: if peft is not installed.
            ValueError: for an unknown name, or while adapters are fused.
        """
        check_peft()
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._check_names(names)
        self._check_unfused("delete adapters")
        super().delete_adapters(names)
        if not self.get_list_adapters():
            self.unload_lora_weights()

    def fuse_lora(
        self,
        components: Sequence[str] = ("prior",),
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:
        """
        Adds adapters to the prior's own weights, so that they cost nothing. [`unload_lora_weights`] then leaves a
        prior with them in it, which [`save_pretrained`] saves; [`unfuse_lora`] takes them out, exact to rounding.

        Args:
            components (`list[str]`, *optional*): `["prior"]`.
            lora_scale (`float`, *optional*, defaults to 1.0): factor on the adapters' weights while they are fused.
            safe_fusing (`bool`, *optional*, defaults to `False`): whether to check for numbers that are not finite.
            adapter_names (`list[str]`, *optional*): become the active ones; by default those that are.

        Raises:
            OSError: if peft is not installed.
            ValueError:
                For an unknown name, without adapters, if some are fused already, or for numbers that are not finite
                (with `safe_fusing`). What was fused up to then is taken out again.
        """
        check_peft()
        self._check_unfused("fuse adapters")
        names = list(adapter_names or self.get_active_adapters())
        if not names:
            raise ValueError("There is no active adapter to fuse: `load_lora_weights` first.")
        self._check_names(names)
        self._unfused_scaling = [(layer, dict(layer.scaling)) for layer in _list_layers(self.prior)]
        for layer, scaling in self._unfused_scaling:
            layer.set_adapter(names)  # another one would go on to act in the layers that these leave alone
            # Diffusers' own scale would reach the active adapters only, and outlast the fusing.
            layer.scaling.update({name: lora_scale * scaling[name] for name in names if name in scaling})
        try:
            super().fuse_lora(components=list(components), safe_fusing=safe_fusing, adapter_names=names)
        except Exception:
            self.unfuse_lora()
            raise

    def unfuse_lora(self, components: Sequence[str] = ("prior",)) -> None:
        """Takes fused adapters out of the prior's own weights, exact to rounding, and sets their weights as before."""
        check_peft()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already unmerged")  # layers where nothing was fused
            super().unfuse_lora(components=list(components))
        for layer, scaling in self.__dict__.pop("_unfused_scaling", []):
            layer.scaling.update(scaling)

    def unload_lora_weights(self) -> None:
        """Removes all adapters: the prior is as it was, bit for bit; one that is fused keeps what it is fused with."""
        check_peft()
        super().unload_lora_weights()
        self.__dict__.pop("_unfused_scaling", None)

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """
        As [`DiffusionPipeline.save_pretrained`], without adapters: these have a file of their own.

        Raises:
            ValueError: while there are adapters, which transformers would save in the prior's place.
        """
        self._check_no_adapters()
        super().save_pretrained(save_directory, **kwargs)

    def _check_no_adapters(self) -> None:
        if getattr(self.prior, "peft_config", None):  # not `get_list_adapters`, which needs peft
            raise ValueError(
                "There are adapters: save them by `save_lora_weights`, or fuse them (`fuse_lora`) to save a prior with"
                " them in it; then remove them (`unload_lora_weights`) and save the pipeline."
            )

    def _check_names(self, names: Sequence[str]) -> None:
        known = self.get_list_adapters().get(self.prior_name, [])
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"There is no adapter {unknown[0]!r}; loaded are: {', '.join(known) or 'none'}.")

    def _check_unfused(self, what: str) -> None:
        # peft would go on and later take something else out of the weights than it put in.
        if any(layer.merged for layer in _list_layers(self.prior)):
            raise ValueError(
                f"Adapters are fused, and you {what}: `unfuse_lora` first, or `unload_lora_weights` to keep the prior"
                " fused."
            )


def check_peft() -> None:
    """Raises an `OSError` that says what to install, where peft is missing."""
    if importlib.util.find_spec("peft") is None:
        raise OSError("LoRA needs peft, which is not installed: pip install 'peft>=0.20'")


def collect_adapter(prior: DallePriorForCausalLM) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """
    The one active adapter of a prior: weights as peft names them, and what they need to load with the same strength.

    Raises:
        ValueError: if the prior has no or several active adapters.
    """
    check_peft()
    from peft import get_peft_model_state_dict

    names: list[str] = next((layer.active_adapters for layer in _list_layers(prior)), [])
    if len(names) != 1:
        raise ValueError(f"One adapter is saved at a time, but active are: {', '.join(names) or 'none'}.")
    config = prior.peft_config[names[0]].to_dict()
    metadata = {name: config[name] for name in ("r", "lora_alpha", *_PLAIN_SETTINGS) if config.get(name)}
    metadata["target_modules"] = sorted(config["target_modules"])
    return get_peft_model_state_dict(prior, adapter_name=names[0]), metadata


_PLAIN_SETTINGS = ("rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout")


def _list_layers(prior: nn.Module) -> list[nn.Module]:
    """The layers that peft has wrapped."""
    return [module for module in prior.modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")]


def list_linear_layers(prior: DallePriorForCausalLM) -> dict[str, nn.Linear]:
    """The layers that an adapter may change, by name: all linear ones but the head, which computes some rows."""
    layers = {name.removesuffix(".base_layer"): module for name, module in prior.named_modules()}
    return {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, nn.Linear) and not isinstance(layer, DallePriorHead) and ".lora_" not in name
    }


def _check_weights(prior: DallePriorForCausalLM, weights: dict[str, torch.Tensor], source: str) -> dict[str, int]:
    """Raises a `ValueError` that names what does not fit the prior; gives the rank of each layer's adapter."""
    layers, ranks, wrong = list_linear_layers(prior), {}, []
    if not weights:
        raise ValueError(f"{source} is empty.")
    for name, value in weights.items():
        layer_name, kind = next(
            ((name.removesuffix(end), end) for end in (".lora_A.weight", ".lora_B.weight") if name.endswith(end)),
            (name, None),
        )
        partner = weights.get(f"{layer_name}{'.lora_B' if kind == '.lora_A.weight' else '.lora_A'}.weight")
        if kind is None or partner is None:
            wrong.append(f"{name} is no plain LoRA weight of a pair `prior.<layer>.lora_A.weight` and `lora_B`")
        elif layer_name not in layers:
            wrong.append(f"the prior has no linear layer {layer_name}")
        else:
            layer, rank = layers[layer_name], len(value) if kind == ".lora_A.weight" else len(partner)
            own = (rank, layer.in_features) if kind == ".lora_A.weight" else (layer.out_features, rank)
            ranks[layer_name] = rank
            if tuple(value.shape) != own:
                wrong.append(f"{name} is of {tuple(value.shape)}, not {own}")
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"{source} does not fit this prior: {wrong[0]}{more}.")
    return ranks


def _own_metadata(metadata: dict[str, Any] | None) -> dict[str, Any]:
    """The prior's part of a file's metadata."""
    return {name.removeprefix("prior."): value for name, value in (metadata or {}).items()}


def _make_config(ranks: dict[str, int], metadata: dict[str, Any]):
    """peft's `LoraConfig`: layers and ranks as the weights have them, the strength as the metadata says."""
    from peft import LoraConfig

    rank, _ = Counter(ranks.values()).most_common(1)[0]
    others = {name: other for name, other in ranks.items() if other != rank}
    strength = {name: metadata[name] for name in ("lora_alpha", "alpha_pattern", "use_rslora") if name in metadata}
    if "lora_alpha" not in strength:  # as in diffusers: the product of the two matrices, unscaled
        strength |= {"lora_alpha": rank, "alpha_pattern": others}
    return LoraConfig(r=rank, rank_pattern=others, target_modules=list(ranks), inference_mode=True, **strength)


def _add_adapter(prior: DallePriorForCausalLM, weights: dict[str, torch.Tensor], config, adapter_name: str) -> None:
    # Not `prior.load_adapter`: it takes a parameter whose name holds the adapter's name for one of the adapter's.
    from peft import inject_adapter_in_model, set_peft_model_state_dict

    was_trainable = [(parameter, parameter.requires_grad) for parameter in prior.parameters()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
        inject_adapter_in_model(config, prior, adapter_name)
    prior._hf_peft_config_loaded = True
    result = set_peft_model_state_dict(prior, weights, adapter_name)
    assert not result.unexpected_keys, result.unexpected_keys
    for parameter, flag in was_trainable:  # peft freezes all but the adapter
        parameter.requires_grad_(flag)
    prior.to(prior.dtype).train(prior.training)  # the new layers' dropout was on

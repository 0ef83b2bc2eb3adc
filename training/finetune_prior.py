"""Stage 2 from a published checkpoint: what `init_from` brings, and LoRA adapters trained in the place of all weights.

Loss and validation are those of `train_prior.py`; what a pipeline does with a finished adapter lives in
`hf_dalle.lora_dalle`.
"""

from dataclasses import replace
from pathlib import Path

import torch
from arguments import PriorArguments
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from settings_file import check_names

from hf_dalle import DALLEPipeline, DallePriorConfig, DallePriorForCausalLM
from hf_dalle.lora_dalle import check_peft, collect_adapter, list_linear_layers


# What `model` may change in a trained prior: these have no part in the shapes or the meaning of its weights.
CHANGEABLE = ("attention_dropout", "embedding_dropout", "hidden_dropout", "text_loss_weight")


def find_start(args: PriorArguments) -> PriorArguments:
    """
    Finds the checkpoint that `init_from` names, in a folder or on the Hub.

    Returns:
        [`PriorArguments`]: the same with `init_from` as the prior's own folder, and with a pipeline's dVAE and
        tokenizer where the settings name none.

    Raises:
        OSError: if there is no such checkpoint.
        ValueError: if a prior alone comes without dVAE or tokenizer, or the run would write over its start.
    """
    if args.init_from is None:
        return args
    folder = Path(args.init_from)
    if not folder.is_dir():
        patterns = {"allow_patterns": ["*.json", "*.safetensors", "*.txt"], "ignore_patterns": ["*.fp16*"]}
        try:
            folder = Path(snapshot_download(args.init_from, **patterns))
        except (OSError, HFValidationError) as error:
            reason = " ".join(str(error).split())
            raise OSError(f"`init_from` is {args.init_from}, no folder and not to be downloaded: {reason}") from error
    output_dir = Path(args.output_dir).resolve()
    if folder.resolve() in (output_dir, output_dir / "prior"):
        raise ValueError(
            f"`init_from` is {folder} and `output_dir` {args.output_dir}: the run would write over its start."
        )
    parts = {"dvae": args.dvae, "tokenizer": args.tokenizer}
    if (folder / "model_index.json").is_file():
        parts = {name: given or str(folder / name) for name, given in parts.items()}
        return replace(args, init_from=str(folder / "prior"), **parts)
    for name, given in parts.items():
        if not given:
            raise ValueError(
                f"`{name}` is missing: {args.init_from} is no pipeline but a prior alone, which brings none."
            )
    return replace(args, init_from=str(folder))


def load_prior(args: PriorArguments) -> DallePriorForCausalLM:
    """
    The prior in the folder `init_from`, in float32, with what `model` may change.

    Raises:
        OSError: if it is not there or damaged.
        ValueError: if `model` asks for other sizes than the checkpoint's.
    """
    check_names(args.model, list(DallePriorConfig.__annotations__), "`model`")
    try:
        values = DallePriorConfig.from_pretrained(args.init_from).to_dict()
        for name, value in args.model.items():
            if name not in CHANGEABLE and value != values[name]:
                raise ValueError(
                    f"`model` asks for {name} {value}, but the checkpoint has {values[name]}. Leave it out: what may"
                    f" change in a trained prior is {', '.join(CHANGEABLE)}."
                )
        config = DallePriorConfig.from_dict({**values, **args.model, "caption_dropout": args.caption_dropout})
        return DallePriorForCausalLM.from_pretrained(args.init_from, config=config, dtype=torch.float32)
    except StrictDataclassError as error:
        raise ValueError(f"A value in `model` does not fit: {error}") from error
    except (OSError, SafetensorError) as error:
        raise OSError(f"`init_from` names {args.init_from}, which cannot be loaded: {error}") from error


def add_adapter(prior: DallePriorForCausalLM, args: PriorArguments) -> None:
    """
    Freezes the prior and adds an adapter that computes nothing yet.

    Raises:
        OSError: if peft is not installed.
        ValueError: if `lora_target_modules` names what is no linear layer.
    """
    check_peft()
    from peft import LoraConfig

    kinds = sorted({name.rpartition(".")[2] for name in list_linear_layers(prior)})
    check_names(args.lora_target_modules or (), kinds, "`lora_target_modules`")
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha or args.lora_rank,
        lora_dropout=args.lora_dropout,
        target_modules=list(args.lora_target_modules or kinds),
    )
    prior.add_adapter(config)


def save_adapter(prior: DallePriorForCausalLM, folder: Path, weights_dtype: str) -> None:
    """Writes the adapter alone, for `pipe.load_lora_weights(folder)`."""
    layers, metadata = collect_adapter(prior)
    layers = {name: value.to(getattr(torch, weights_dtype)) for name, value in layers.items()}
    DALLEPipeline.save_lora_weights(folder, prior_lora_layers=layers, prior_lora_adapter_metadata=metadata)

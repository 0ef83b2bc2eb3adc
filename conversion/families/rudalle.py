"""ruDALL-E in its v3 form (Malevich, Surrealist XL, Kandinsky): a flat `.bin`, a GumbelVQ, a YouTokenToMe model.

Sizes that only its code says are found from the weights; the number of heads, which no weight shows, by the width.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_dalle import DalleFamilyPriorConfig, DalleFamilyPriorForCausalLM, DalleImageProcessor
from hf_dalle.modeling_family_prior import family_attention_mask

from ..cards import Verification
from ..folders import Conversion, Facts, Part, build_on_meta, fill_module, make_part
from ..key_map import KeyMap
from ..safe_load import list_tensors, load_checkpoint
from ..sizes import count_numbered, find_shape
from .caption_tokenizers import read_youtokentome
from .prior_check import verify_pipeline
from .vqgan import LIGHTNING_CLASSES, find_file, map_vqgan


HEADS_OF_WIDTH = {768: 12, 2048: 16, 3840: 60}  # its dummy, its XL models, Kandinsky
CONV_KERNEL_SIZE = 11
LARGEST_HALF = 65504.0
# The first setting of its README's examples.
TOP_K, TOP_P = 2048, 0.995

FACTS = Facts(
    title="A ruDALL-E checkpoint",
    origin="A prior of [ruDALL-E](https://github.com/ai-forever/ru-dalle), by Sber AI and SberDevices.",
    license="other",
    license_words=(
        "ruDALL-E's code is under the Apache-2.0 licence. Its weights were published each on a page of their own,"
        " whose terms hold; the files do not say them."
    ),
    language="ru",
    notes=[
        "Row and column positions are one table: equal in float32, rounded once more in 16 bits.",
        "The first image token is drawn by the image head, as the original does. Its v3 form never trained that head"
        " there: in training the first token was a label of the text head.",
    ],
)


def read_source(source: Path) -> Conversion:
    """
    Reads a folder with the prior (one `.bin`), the image model (`vqgan.gumbelf8-sber.model.ckpt`) and `bpe.model`.

    Args:
        source (`Path`): the folder.

    Raises:
        OSError: for a file that is missing or damaged.
        ValueError: for what is not ruDALL-E's, or its v2 form.
    """
    if not source.is_dir():
        raise OSError(f"{source} must be a folder with the prior (.bin), the image model (.ckpt) and bpe.model.")
    files = [find_file(source, (".bin",)), find_file(source, (".ckpt",)), find_file(source, (".model",))]
    if "v2" in files[0].stem:
        raise ValueError(f"{files[0].name} is of the v2 form, which is not converted.")
    tensors = list_tensors(load_checkpoint(files[0]).content)
    config, inferred = find_config(tensors)
    model = build_on_meta(DalleFamilyPriorForCausalLM, config)
    model.generation_config.update(top_k=min(TOP_K, config.image_vocab_size), top_p=TOP_P)
    prior = make_part(model, tensors)
    inferred += map_keys(prior.keys, config)
    content = load_checkpoint(files[1], LIGHTNING_CLASSES).content
    vae_tensors = list_tensors(content.get("state_dict", content))
    factor = 2 ** (count_numbered(vae_tensors, r"encoder\.down\.(\d+)\.") - 1)
    dvae, found = map_vqgan(vae_tensors, config.image_grid_size * factor)
    found[0] = f"pictures of {config.image_grid_size * factor}: the prior's grid, {factor} pixels a cell"
    tokenizer = read_youtokentome(files[2], config.text_length, do_lower_case=True, do_add_ends=True)
    if len(tokenizer) != config.text_vocab_size:
        raise ValueError(
            f"{files[2].name} has {len(tokenizer)} ids, but the prior was trained with {config.text_vocab_size}."
        )
    parts = {
        "prior": prior,
        "dvae": dvae,
        "tokenizer": Part(tokenizer),
        "image_processor": Part(DalleImageProcessor(size=dvae.content.config.sample_size)),
    }
    return Conversion(parts, FACTS, files, [*inferred, *found])


def find_config(tensors: Mapping[str, Any]) -> tuple[DalleFamilyPriorConfig, list[str]]:
    """The prior's configuration from the shapes of its weights."""
    num_ids, width = find_shape(tensors, "text_embeddings.weight")
    text_length = find_shape(tensors, "text_pos_embeddings.weight")[0] - 1
    num_layers = count_numbered(tensors, r"transformer\.layers\.(\d+)\.")
    if width not in HEADS_OF_WIDTH:
        known = ", ".join(map(str, HEADS_OF_WIDTH))
        raise ValueError(f"The prior is {width} wide; the number of its heads is known for {known} only.")
    is_sandwich = "transformer.layers.0.before_first_addition_layernorm.weight" in tensors
    config = DalleFamilyPriorConfig(
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=HEADS_OF_WIDTH[width],
        hidden_act="gelu_pytorch_tanh",
        text_vocab_size=num_ids - text_length,
        text_length=text_length,
        bos_token_id=2,
        image_vocab_size=find_shape(tensors, "image_embeddings.weight")[0],
        image_grid_size=find_shape(tensors, "image_row_embeddings.weight")[0],
        attention_types=[find_attention_type(layer, num_layers) for layer in range(num_layers)],
        conv_kernel_size=CONV_KERNEL_SIZE,
        use_sandwich_norm=is_sandwich,
        use_head_norm=True,
        attention_output_limit=LARGEST_HALF,
    )
    inferred = [
        f"{num_layers} layers, {width} wide, {text_length} text positions, {config.text_vocab_size} text ids,"
        f" {config.image_vocab_size} codes on a grid of {config.image_grid_size}: from the names and shapes of the"
        " weights",
        f"{config.num_attention_heads} heads: by the width, as its code has them",
        f"sandwich norms: {'there' if is_sandwich else 'none'}, by the names of the weights",
    ]
    return config, inferred


def find_attention_type(layer: int, num_layers: int) -> str:
    """What its code says: of layers 0, 1, ... every fourth from 1 is column, the last conv, the others row."""
    if (layer - 1) % 4 == 0:
        return "column"
    return "row" if layer != num_layers - 1 else "conv_bordered"


def map_keys(keys: KeyMap, config: DalleFamilyPriorConfig) -> list[str]:
    """The rules for the prior's weights; what was assumed."""
    text_length = config.text_length
    keys.add("model.embed_tokens.weight", ("text_embeddings.weight", "image_embeddings.weight"), join_rows)
    keys.add("model.text_position_embedding.weight", "text_pos_embeddings.weight", lambda weight: weight[:text_length])
    sides = ("image_row_embeddings.weight", "image_col_embeddings.weight")
    keys.add("model.image_position_embedding.weight", sides, add_rows_and_columns)
    pairs = {
        "model.norm": "transformer.final_layernorm",
        "model.head_norm": "to_logits.0",
        "lm_head": "to_logits.1",
    }
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}", f"transformer.layers.{layer}"
        pairs |= {
            f"{ours}.input_layernorm": f"{theirs}.input_layernorm",
            f"{ours}.self_attn.qkv_proj": f"{theirs}.attention.query_key_value",
            f"{ours}.self_attn.o_proj": f"{theirs}.attention.dense",
            f"{ours}.post_attention_layernorm": f"{theirs}.post_attention_layernorm",
            f"{ours}.mlp.fc1": f"{theirs}.mlp.dense_h_to_4h",
            f"{ours}.mlp.fc2": f"{theirs}.mlp.dense_4h_to_h",
        }
        if config.use_sandwich_norm:
            pairs[f"{ours}.attention_output_norm"] = f"{theirs}.before_first_addition_layernorm"
            pairs[f"{ours}.mlp_output_norm"] = f"{theirs}.before_second_addition_layernorm"
    for ours, theirs in pairs.items():
        for name in ("weight", "bias"):
            keys.add(f"{ours}.{name}", f"{theirs}.{name}")
    return check_masks(keys, config)


def join_rows(text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Two embeddings to that of the joint vocabulary."""
    return torch.cat([text, image])


def add_rows_and_columns(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """H x width and W x width to (H * W) x width."""
    return (rows[:, None] + columns[None]).flatten(0, 1)


def check_masks(keys: KeyMap, config: DalleFamilyPriorConfig) -> list[str]:
    """Drops the masks, which we compute, if they are those that the checkpoint holds, where it holds them."""
    names = {"row": "row", "col": "column", "conv": "conv_bordered"}
    masks = {f"transformer.{name}_mask": kind for name, kind in names.items()}
    found = {name: kind for name, kind in masks.items() if name in keys.source}
    sizes = (config.text_length, config.image_grid_size, config.conv_kernel_size)
    for name, kind in found.items():
        stored = keys.source[name].read().bool()
        if not torch.equal(stored.squeeze(), family_attention_mask(kind, *sizes)):
            raise ValueError(f"{name} is not the mask of ruDALL-E's v3 form; its v2 form is not converted.")
        keys.drop(name, "a mask, which is computed; equal")
    if "transformer.conv_mask" in found:
        return ["the v3 form, by the mask of its conv layer"]
    return [
        "the v3 form is assumed: without masks the weights do not tell it from v2 (Emojich and Malevich's"
        " pytorch_model_v2.bin, by rudalle 1.1.3), which is not converted"
    ]


# --------------------------------------------------------------------------------------------------------- --verify


def verify(folder: Path, conversion: Conversion) -> Verification:
    """
    Compares a written folder with rudalle's own model, or with itself where it is not installed or does not import.

    Args:
        folder (`Path`): the pipeline's.
        conversion ([`Conversion`]): what it was made from.
    """
    try:
        import rudalle
        from rudalle.dalle.model import DalleModel
    except (ImportError, AttributeError):
        return verify_pipeline(folder, conversion, "rudalle", None)
    config = conversion.parts["prior"].content.config
    original = DalleModel(
        "cpu",
        **{"num_layers": config.num_hidden_layers, "hidden_size": config.hidden_size},
        **{"vocab_size": config.image_token_offset, "image_vocab_size": config.image_vocab_size},
        **{"text_seq_length": config.text_length, "image_tokens_per_dim": config.image_grid_size},
        **dict.fromkeys(("embedding_dropout_prob", "attention_dropout_prob", "output_dropout_prob"), 0.0),
        num_attention_heads=config.num_attention_heads,
        cogview_sandwich_layernorm=config.use_sandwich_norm,
        cogview_pb_relax=True,
    )
    masks = {name: tensor for name, tensor in original.state_dict().items() if name.endswith("_mask")}
    fill_module(original, {**masks, **dict(conversion.read_rounded("prior"))})

    def compute(text_ids: torch.Tensor, image_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        input_ids = torch.cat([text_ids, image_tokens[:, :-1]], dim=1)
        mask = torch.ones(1, 1, original.total_seq_length, original.total_seq_length).tril()
        logits, _ = original(input_ids, mask)
        text, image = logits.tensor_split([config.text_length - 1], dim=1)
        return text[..., : config.image_token_offset], image[..., config.image_token_offset :]

    return verify_pipeline(folder, conversion, f"rudalle {rudalle.__version__}", compute)

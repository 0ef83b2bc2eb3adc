"""DALLE-pytorch 1.x: the `.pt` that its train_dalle.py writes, with the image model inside, and a caption tokenizer.

Its layer scale is folded into the projection or the norm after which it stands. Checkpoints of 0.x, reversible ones
and those with shared layers are refused by name. Parity is shown for 1.0.0, 1.4.2 and 1.6.6 (tests/parity).
"""

import importlib.util
import math
import re
from collections.abc import Mapping
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hf_dalle import DalleFamilyPriorConfig, DalleFamilyPriorForCausalLM
from hf_dalle.grid_rotary import rotary_table

from ..folders import Conversion, Facts, build_on_meta, join_parts, make_part
from ..key_map import KeyMap, join_rows
from ..safe_load import list_tensors, load_checkpoint
from ..settings import describe, expect_count, expect_dict, expect_flag, expect_names, expect_number
from ..sizes import count_numbered, find_shape
from ..sources import BESIDE, find_file, list_beside
from .caption_tokenizers import (
    is_json_tokenizer,
    read_bert_vocabulary,
    read_clip_bpe,
    read_json_tokenizer,
    read_youtokentome,
)
from .dalle_pytorch_check import FIRST_CAUSAL_CONV, verify
from .dalle_pytorch_vae import map_image_model
from .vqgan import count_levels


__all__ = ["read_source", "verify"]

CLIP_FILES = ("bpe_simple_vocab_16e6.txt", "bpe_simple_vocab_16e6.txt.gz")
CLIP_VOCAB_SIZE = 49408
ATTENTION_TYPES = {"full": "full", "axial_row": "axial_row", "axial_col": "column", "conv_like": "conv_like"}
USED = ("hparams", "vae_params", "version", "weights")
NEEDED = ("num_text_tokens", "text_seq_len", "dim", "depth", "heads", "dim_head")
ROTARY_TOLERANCE = 1e-3  # between the angles that a checkpoint holds and ours; they reach 8192

FACTS = Facts(
    title="A DALLE-pytorch checkpoint",
    origin="A prior trained with [DALLE-pytorch](https://github.com/lucidrains/DALLE-pytorch).",
    license="other",
    license_words=(
        "DALLE-pytorch's code is under the MIT licence. What may be done with these weights is for whoever trained"
        " them to say; the checkpoint itself does not."
    ),
    notes=[
        "The converter's parity is shown for DALLE-pytorch 1.0.0, 1.4.2 and 1.6.6; other versions of 1.x are converted"
        " by the same rules.",
        "Layer scale is folded into the projection or norm before it, row and column positions are one table: equal in"
        " float32, rounded once more in 16 bits.",
        "Captions for CLIP's BPE: the original's ftfy also guesses at text that was decoded wrongly and knows all HTML"
        " entities; here its replacements of single characters and the common entities are made.",
        "Nothing says whether captions were dropped in training, as guidance and the empty prompt need it. As in the"
        " original both draw from any checkpoint: without a caption all of the text is pads.",
    ],
)


class LayerKeys(NamedTuple):
    """One attention or MLP of the source: its keys by what ends them, and how many wrappers stand around them."""

    names: dict[str, str]
    depth: int


def read_source(source: Path) -> Conversion:
    """
    Reads a checkpoint.

    Args:
        source (`Path`):
            The `.pt` file, or a folder with one of them and the file of its caption tokenizer: CLIP's
            bpe_simple_vocab_16e6.txt (found in an installed dalle-pytorch too), a `tokenizers` file (`--hug`),
            bert-base-chinese's vocab.txt (`--chinese`), or a model of YouTokenToMe.

    Raises:
        OSError: for a file that is missing or damaged.
        ValueError: for what is not DALLE-pytorch's, or not supported.
    """
    file = find_file(source, (".pt",))
    content = expect_dict(load_checkpoint(file).content, f"The content of {file}")
    missing = [name for name in ("hparams", "weights") if name not in content]
    if missing:
        raise ValueError(f"{file} is no checkpoint of DALLE-pytorch: it lacks {' and '.join(missing)}.")
    hparams, inferred = expect_dict(content["hparams"], f"`hparams` of {file}"), []
    tensors = list_tensors(content["weights"])
    vae_tensors = {name.removeprefix("vae."): part for name, part in tensors.items() if name.startswith("vae.")}
    tensors = {name: part for name, part in tensors.items() if not name.startswith("vae.")}
    version = read_version(content.get("version"))
    refuse_unsupported(hparams, version, tensors)
    grid_size = find_grid_size(tensors, hparams["text_seq_len"])
    settings = expect_dict(content.get("vae_params") or {}, f"`vae_params` of {file}")
    dvae, found = map_image_model(vae_tensors, settings, find_picture_size(vae_tensors, grid_size))
    inferred += found
    config, found = find_config(hparams, tensors, grid_size, version)
    inferred += found
    prior = make_part(build_on_meta(DalleFamilyPriorForCausalLM, config), tensors)
    map_keys(prior.keys, config)
    prior.keys.drop_beside(list_beside(content, USED), BESIDE)
    tokenizer_file, found = find_tokenizer(file.parent, hparams["num_text_tokens"])
    tokenizer = read_tokenizer(tokenizer_file, hparams["num_text_tokens"], config.text_length)
    return Conversion(join_parts(prior, dvae, tokenizer), FACTS, [file, tokenizer_file], [*inferred, *found])


def read_version(value: Any) -> tuple[int, int] | None:
    """The first two numbers of the checkpoint's version, as of "1.6.6"; `None` where it has none."""
    found = re.match(r"(\d{1,4})\.(\d{1,4})", value) if type(value) is str else None
    if value is not None and found is None:
        raise ValueError(f"The checkpoint's version is {describe(value)}; expected one like 1.6.6, or none.")
    return found and (int(found[1]), int(found[2]))


def refuse_unsupported(hparams: Mapping[str, Any], version: tuple | None, tensors: Mapping[str, Any]) -> None:
    """Raises `ValueError` for what would be converted into another model, and for settings that are none."""
    missing = [name for name in NEEDED if name not in hparams]
    if missing:
        raise ValueError(f"`hparams` lacks {', '.join(missing)}: no prior of DALLE-pytorch 1.x.")
    for name in NEEDED:
        expect_count(hparams, name, "`hparams`")
    # Before 1.1.6 no version was written; token shift and rotary embedding came with 1.0.
    is_known = has_token_shift(tensors) or "transformer.pos_emb" in tensors
    if (version is None and not is_known) or (version is not None and version[0] != 1):
        words = "missing" if version is None else ".".join(map(str, version))
        raise ValueError(
            f"The checkpoint's version is {words}; converted are those of DALLE-pytorch 1.x, which before 1.1.6 are"
            " known by token shift or rotary embedding."
        )
    for name in ("reversible", "shared_attn_ids", "shared_ff_ids", "sparse_attn"):
        value = hparams.get(name)
        if value is not None and value is not False:
            raise ValueError(f"`{name}` is {describe(value)}, which is not converted.")
    unknown = sorted(set(expect_names(hparams, "attn_types", "`hparams`", ["full"])) - set(ATTENTION_TYPES))
    if unknown:
        raise ValueError(
            f"`attn_types` holds {', '.join(map(describe, unknown))}; converted are {', '.join(ATTENTION_TYPES)}."
        )


# ---------------------------------------------------------------------------------------------------------- the prior


def list_layers(tensors: Mapping[str, Any]) -> dict[tuple[int, int], LayerKeys]:
    """The keys of each layer's attention, 0, and MLP, 1. How many `fn.` wrap them differs from version to version."""
    layers: dict[tuple[int, int], LayerKeys] = {}
    pattern = re.compile(r"transformer\.layers\.layers\.(\d+)\.([01])\.((?:fn\.)*)(.+)")
    for name in tensors:
        if match := pattern.fullmatch(name):
            layer, kind, wrappers, rest = match.groups()
            keys = layers.setdefault((int(layer), int(kind)), LayerKeys({}, 0))
            keys.names[rest] = name
            depth = max(keys.depth, len(wrappers) // len("fn."))
            layers[int(layer), int(kind)] = keys._replace(depth=depth)
    return layers


def find_grid_size(tensors: Mapping[str, Any], text_length: int) -> int:
    """The side of the grid of image tokens, by the positions that there are."""
    if "transformer.pos_emb" in tensors:  # a row for each state, or for each but the last in early versions
        shape = tensors["transformer.pos_emb"].shape
        if len(shape) < 2 or shape[-2] <= text_length:
            raise ValueError(
                f"transformer.pos_emb is {tuple(shape)}, with no angles beyond {text_length} text states."
            )
        return math.isqrt(shape[-2] - text_length)
    return find_shape(tensors, "image_pos_emb.weights.0", 4)[1]


def find_picture_size(vae_tensors: Mapping[str, Any], grid_size: int) -> int | None:
    """The side of the pictures of OpenAI's model and of a VQGAN, which no setting says: 256 of those published."""
    if any(name.startswith("enc.") for name in vae_tensors):
        return 8 * grid_size
    if not any(name.startswith("model.encoder.down.") for name in vae_tensors):
        return None
    return grid_size * 2 ** (count_levels(vae_tensors, "model.") - 1)


def has_token_shift(tensors: Mapping[str, Any]) -> bool:
    """An MLP stands behind layer scale and norm, and with token shift behind a wrapper more, or two."""
    mlp = list_layers(tensors).get((0, 1))
    return mlp is not None and mlp.depth > 2


def find_config(
    hparams: Mapping[str, Any], tensors: Mapping[str, Any], image_grid_size: int, version: tuple | None
) -> tuple[DalleFamilyPriorConfig, list[str]]:
    """The prior's configuration, and what of it is not in `hparams`."""
    depth, inferred = hparams["depth"], []
    layers = list_layers(tensors)
    if depth != count_numbered(tensors, r"transformer\.layers\.layers\.(\d+)\."):
        raise ValueError(f"`depth` of `hparams` is {depth}, but the weights are not of so many layers.")
    found = {
        "sandwich_norm": any("norm_out.weight" in keys.names for keys in layers.values()),
        "shift_tokens": has_token_shift(tensors),
        "rotary_emb": "transformer.pos_emb" in tensors,
        "share_input_output_emb": "text_emb.linear.weight" in tensors,
    }
    for name, value in found.items():
        if name not in hparams:
            inferred.append(f"{name} = {value}, by the names of the weights")
        elif expect_flag(hparams, name, "`hparams`") != value:
            raise ValueError(f"`{name}` is {hparams[name]} in `hparams`, but the weights say {value}.")
    for name, default in (("stable", False), ("loss_img_weight", 7), ("attn_types", None)):
        if name not in hparams:
            inferred.append(f"{name} = {default}, DALLE-pytorch's default")
    kinds, found_kinds = find_attention_types(hparams, version)
    inferred += found_kinds
    num_text = hparams["num_text_tokens"] + hparams["text_seq_len"]
    mlp = layers.get((0, 1), LayerKeys({}, 0)).names.get("net.3.weight", "transformer.layers.layers.0.1.fn...net.3")
    config = DalleFamilyPriorConfig(
        hidden_size=hparams["dim"],
        num_hidden_layers=depth,
        num_attention_heads=hparams["heads"],
        head_dim=hparams["dim_head"],
        intermediate_size=find_shape(tensors, mlp)[1],
        hidden_act="geglu",
        text_vocab_size=hparams["num_text_tokens"],
        text_length=hparams["text_seq_len"],
        start_token_id=0,
        image_vocab_size=find_shape(tensors, "to_logits.1.weight")[0] - num_text,
        image_grid_size=image_grid_size,
        attention_types=list(islice(cycle(kinds), depth)),
        conv_kernel_size=5,
        use_rotary_embedding=found["rotary_emb"],
        use_token_shift=found["shift_tokens"],
        use_sandwich_norm=found["sandwich_norm"],
        use_max_norm=expect_flag(hparams, "stable", "`hparams`"),
        text_loss_weight=1 / (1 + expect_number(hparams, "loss_img_weight", "`hparams`", 7)),
        caption_dropout=None,
        tie_word_embeddings=found["share_input_output_emb"],
    )
    return config, inferred


def find_attention_types(hparams: Mapping[str, Any], version: tuple | None) -> tuple[list[str], list[str]]:
    """Ours of `attn_types`, and how what `conv_like` means was found."""
    names = expect_names(hparams, "attn_types", "`hparams`", ["full"])
    if "conv_like" not in names or (version is not None and version >= FIRST_CAUSAL_CONV):
        return [ATTENTION_TYPES[name] for name in names], []
    told = "no version in the checkpoint, so before 1.1.6" if version is None else "the checkpoint's version"
    inferred = f"conv_like is a window centred on the cell, as before DALLE-pytorch 1.5: {told}"
    return [{**ATTENTION_TYPES, "conv_like": "conv_bordered"}[name] for name in names], [inferred]


def map_keys(keys: KeyMap, config: DalleFamilyPriorConfig) -> None:
    """The rules for the prior's weights."""
    for name in ("weight", "bias"):
        keys.add(f"model.norm.{name}", f"to_logits.0.{name}")
    keys.add("lm_head.bias", "to_logits.1.bias")
    if config.tie_word_embeddings:
        keys.add("model.embed_tokens.weight", "to_logits.1.weight")
        for side in ("text_emb", "image_emb"):
            for name in ("weight", "bias"):
                keys.drop(f"{side}.linear.{name}", "the head's once more, which the embeddings share")
    else:
        keys.add("model.embed_tokens.weight", ("text_emb.weight", "image_emb.weight"), join_rows)
        keys.add("lm_head.weight", "to_logits.1.weight")
    if config.use_rotary_embedding:
        check_angles(keys, config)
    else:
        sides = ("image_pos_emb.weights.0", "image_pos_emb.weights.1")
        keys.add("model.text_position_embedding.weight", "text_pos_emb.weight")
        keys.add("model.image_position_embedding.weight", sides, add_rows_and_columns)
    for (layer, kind), found in list_layers(keys.source).items():
        ours = f"model.layers.{layer}"
        first_norm, part, last, last_norm = (
            ("post_attention_layernorm", "mlp", "fc2", "mlp_output_norm")
            if kind
            else ("input_layernorm", "self_attn", "o_proj", "attention_output_norm")
        )
        theirs = {name: found.names.get(name, f"{layer}.{kind}...{name}") for name in SUFFIXES[kind]}
        for name in ("weight", "bias"):
            keys.add(f"{ours}.{first_norm}.{name}", theirs[f"norm.{name}"])
        if kind:
            for name in ("weight", "bias"):
                keys.add(f"{ours}.mlp.fc1.{name}", theirs[f"net.0.{name}"])
        else:
            targets = (f"{ours}.self_attn.qkv_proj.weight", f"{ours}.self_attn.qkv_proj.bias")
            keys.add(targets, theirs["to_qkv.weight"], add_zero_bias)
        out = "net.3" if kind else "to_out.0"
        scaled, plain = (f"{ours}.{part}.{last}", out), None
        if config.use_sandwich_norm:
            scaled, plain = (f"{ours}.{last_norm}", "norm_out"), scaled
        target, source = scaled
        sources = (theirs["scale"], theirs[f"{source}.weight"], theirs[f"{source}.bias"])
        keys.add((f"{target}.weight", f"{target}.bias"), sources, fold_scale)
        if plain:
            for name in ("weight", "bias"):
                keys.add(f"{plain[0]}.{name}", theirs[f"{plain[1]}.{name}"])


_ENDS = ("scale", "norm.weight", "norm.bias", "norm_out.weight", "norm_out.bias")
SUFFIXES = (
    (*_ENDS, "to_qkv.weight", "to_out.0.weight", "to_out.0.bias"),
    (*_ENDS, "net.0.weight", "net.0.bias", "net.3.weight", "net.3.bias"),
)


def add_rows_and_columns(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """1 x H x 1 x width and 1 x 1 x W x width to (H * W) x width."""
    return (rows.float() + columns.float()).flatten(0, 2)


def add_zero_bias(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer without a bias is one with a bias of 0."""
    return weight, weight.new_zeros(len(weight))


def fold_scale(scale: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A scale of each output channel, 1 x 1 x width, into the projection (out x in) or norm (width) before it."""
    scale = scale.flatten().float()
    return (scale * weight.float().movedim(0, -1)).movedim(-1, 0), scale * bias.float()


def check_angles(keys: KeyMap, config: DalleFamilyPriorConfig) -> None:
    """Drops the rotary angles, which we compute, if they are those that the checkpoint holds."""
    shape, num_rows, difference = keys.source["transformer.pos_emb"].shape, config.stream_length, torch.inf
    # 1 x states x channels, in early versions with one more 1; a file of few angles makes no large table of ours
    if len(shape) in (2, 3, 4) and shape[-2:].numel() == shape.numel() and num_rows <= shape[-2] <= num_rows + 1:
        stored = keys.source["transformer.pos_emb"].read().float().view(shape[-2:])[:num_rows]
        cosine, sine = rotary_table(config.num_text_states, config.image_grid_size, config.head_dim)
        if stored.shape[1] == cosine.shape[1]:
            ours = torch.stack([cosine[:num_rows], sine[:num_rows]])
            difference = (ours - torch.stack([stored.cos(), stored.sin()])).abs().max().item()
    if not difference <= ROTARY_TOLERANCE:
        raise ValueError(
            f"The rotary angles, {tuple(shape)}, are not those of DALLE-pytorch 1.6 for"
            f" {config.num_text_states} text states and a grid of {config.image_grid_size}: the largest difference of"
            f" their cosines is {difference:.3g}."
        )
    keys.drop("transformer.pos_emb", f"rotary angles, which are computed; equal to {difference:.1e}")


# --------------------------------------------------------------------------------------------------- the other parts


def find_tokenizer(folder: Path, vocab_size: int) -> tuple[Path, list[str]]:
    """The file of the caption tokenizer beside the checkpoint, or that of an installed dalle-pytorch."""
    found = [folder / name for name in (*CLIP_FILES, "vocab.txt") if (folder / name).is_file()]
    found += [path for path in sorted(folder.glob("*.json")) if is_json_tokenizer(path)]
    found += sorted(folder.glob("*.model"))
    if len(found) == 1:
        return found[0], [f"the caption tokenizer is {found[0].name}, which is beside the checkpoint"]
    if found:
        raise OSError(f"{folder} holds {len(found)} tokenizers ({', '.join(path.name for path in found)}): leave one.")
    package = importlib.util.find_spec("dalle_pytorch")
    if vocab_size == CLIP_VOCAB_SIZE and package is not None and package.origin:
        file = Path(package.origin).parent / "data" / CLIP_FILES[0]
        if file.is_file():
            return file, [f"the caption tokenizer is CLIP's, of the installed dalle-pytorch: {CLIP_VOCAB_SIZE} ids"]
    raise OSError(
        f"{folder} has no caption tokenizer of {vocab_size} ids. Put beside the checkpoint what it was trained with:"
        f" {CLIP_FILES[0]} of dalle-pytorch or CLIP, a `tokenizers` file (.json), bert-base-chinese's vocab.txt, or a"
        " YouTokenToMe model (.model)."
    )


def read_tokenizer(file: Path, vocab_size: int, text_length: int):
    """The caption tokenizer, whose size must be the prior's."""
    readers = {".txt": read_clip_bpe, ".gz": read_clip_bpe, ".json": read_json_tokenizer, ".model": read_youtokentome}
    read = read_bert_vocabulary if file.name == "vocab.txt" else readers[file.suffix]
    tokenizer = read(file, text_length)
    if len(tokenizer) != vocab_size:
        raise ValueError(f"{file.name} has {len(tokenizer)} ids, but the checkpoint was trained with {vocab_size}.")
    return tokenizer

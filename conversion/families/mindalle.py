"""minDALL-E: config.yaml, stage1_last.ckpt (a VQGAN), stage2_last.ckpt (the prior), and a folder with its BPE.

Its text and image heads have no bias: here they are one head with a bias of 0.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_dalle import DalleFamilyPriorConfig, DalleFamilyPriorForCausalLM

from ..cards import Verification
from ..folders import Conversion, Facts, build_on_meta, fill_module, join_parts, make_part
from ..key_map import KeyMap, join_rows
from ..safe_load import list_tensors, load_checkpoint
from ..settings import expect_count, expect_dict, expect_flag, read_yaml
from ..sizes import count_numbered, find_shape
from ..sources import BESIDE, LIGHTNING_CLASSES, list_beside
from .caption_tokenizers import read_char_bpe
from .prior_check import Original, verify_pipeline
from .vqgan import expect_resolution, map_vqgan


FILES = (
    *("config.yaml", "stage1_last.ckpt", "stage2_last.ckpt"),
    *("tokenizer/bpe-16k-vocab.json", "tokenizer/bpe-16k-merges.txt"),
)
TOP_K = 256  # what its `sampling` takes by default
# What its code takes where config.yaml is silent.
DEFAULTS = {"n_heads": 24, "gelu_use_approx": False, "attn_bias": True, "mlp_bias": True}

FACTS = Facts(
    title="A minDALL-E checkpoint",
    origin="A prior and a VQGAN of [minDALL-E](https://github.com/kakaobrain/minDALL-E), by Kakao Brain.",
    license="cc-by-nc-sa-4.0",
    license_words=(
        "minDALL-E's published weights are under CC BY-NC-SA 4.0: name Kakao Brain, no commercial use, the same"
        " licence for what is made of them, which this folder is. Its code is under Apache-2.0. Weights that somebody"
        " else trained with it have that maker's terms."
    ),
    language="en",
    notes=[
        "The original has no guidance, and nothing says that captions were dropped in training: guidance warns, and"
        " the empty prompt is refused.",
    ],
)


def read_source(source: Path) -> Conversion:
    """
    Reads the folder that minDALL-E's archive unpacks to.

    Args:
        source (`Path`): the folder.

    Raises:
        OSError: for a file that is missing or damaged.
        ValueError: for what is not minDALL-E's.
    """
    files = [source / name for name in FILES]
    missing = [name for name, path in zip(FILES, files, strict=True) if not path.is_file()]
    if missing:
        raise OSError(f"{source} must be minDALL-E's folder; it lacks {', '.join(missing)}.")
    (tensors, beside), (stage1, beside_stage1) = (read_state_dict(path) for path in (files[2], files[1]))
    config, inferred = find_config(tensors, read_settings(files[0]))
    model = build_on_meta(DalleFamilyPriorForCausalLM, config)
    model.generation_config.update(top_k=min(TOP_K, config.image_vocab_size))
    prior = make_part(model, tensors)
    map_keys(prior.keys, config)
    dvae, found = map_vqgan(stage1, read_resolution(files[0]))
    prior.keys.drop_beside(beside, BESIDE)
    dvae.keys.drop_beside(beside_stage1, BESIDE)
    tokenizer = read_char_bpe(files[3], files[4], config.text_length)
    return Conversion(join_parts(prior, dvae, tokenizer), FACTS, files, [*inferred, *found])


def read_state_dict(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The tensors of one of the two stages, and what its file holds beside them."""
    content = expect_dict(load_checkpoint(path, LIGHTNING_CLASSES).content, f"The content of {path}")
    if "state_dict" not in content:
        raise ValueError(f"{path} is no checkpoint of minDALL-E: it lacks `state_dict`.")
    return list_tensors(content["state_dict"]), list_beside(content)


def read_settings(path: Path) -> dict[str, Any]:
    """`stage2.hparams` of config.yaml."""
    found = read_yaml(path, "stage2", "hparams")
    return {} if found is None else expect_dict(found, f"`stage2.hparams` of {path}")


def read_resolution(path: Path) -> int | None:
    """`stage1.hparams.resolution` of config.yaml."""
    return expect_resolution(read_yaml(path, "stage1", "hparams", "resolution"), path)


def find_config(tensors: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[DalleFamilyPriorConfig, list[str]]:
    """The prior's configuration, from the shapes of its weights, and what config.yaml did not say."""
    taken = {name: settings.get(name, default) for name, default in DEFAULTS.items()}
    for name, value in taken.items():
        expect = expect_count if name == "n_heads" else expect_flag
        taken[name] = expect({name: value}, name, "config.yaml")
    inferred = [f"{name} = {taken[name]}, minDALL-E's default" for name in DEFAULTS if name not in settings]
    if not (taken["attn_bias"] and taken["mlp_bias"]):
        raise ValueError("Layers without biases (`attn_bias`, `mlp_bias`) are not converted.")
    text_vocab_size, width = find_shape(tensors, "tok_emb_txt.weight")
    num_cells = find_shape(tensors, "pos_emb_img.weight")[0]
    num_layers = count_numbered(tensors, r"blocks\.(\d+)\.")
    config = DalleFamilyPriorConfig(
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=taken["n_heads"],
        hidden_act="quick_gelu" if taken["gelu_use_approx"] else "gelu",
        text_vocab_size=text_vocab_size,
        text_length=find_shape(tensors, "pos_emb_txt.weight")[0],
        use_position_pads=False,
        image_vocab_size=find_shape(tensors, "tok_emb_img.weight")[0],
        image_grid_size=round(num_cells**0.5),
    )
    inferred.append(
        f"{num_layers} layers, {width} wide, {config.text_length} text positions, {text_vocab_size} text ids,"
        f" {config.image_vocab_size} codes, {num_cells} cells: from the names and shapes of the weights"
    )
    return config, inferred


def map_keys(keys: KeyMap, config: DalleFamilyPriorConfig) -> None:
    """The rules for the prior's weights."""
    keys.add("model.embed_tokens.weight", ("tok_emb_txt.weight", "tok_emb_img.weight"), join_rows)
    keys.add("model.text_position_embedding.weight", "pos_emb_txt.weight")
    keys.add("model.image_position_embedding.weight", "pos_emb_img.weight")
    keys.add(("lm_head.weight", "lm_head.bias"), ("head_txt.weight", "head_img.weight"), join_heads)
    pairs = {"model.norm": "ln_f"}
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}", f"blocks.{layer}"
        pairs |= {
            f"{ours}.input_layernorm": f"{theirs}.ln1",
            f"{ours}.self_attn.o_proj": f"{theirs}.attn.proj",
            f"{ours}.post_attention_layernorm": f"{theirs}.ln2",
            f"{ours}.mlp.fc1": f"{theirs}.mlp.0",
            f"{ours}.mlp.fc2": f"{theirs}.mlp.2",
        }
        for name in ("weight", "bias"):
            parts = tuple(f"{theirs}.attn.{part}.{name}" for part in ("query", "key", "value"))
            keys.add(f"{ours}.self_attn.qkv_proj.{name}", parts, join_rows)
    for ours, theirs in pairs.items():
        for name in ("weight", "bias"):
            keys.add(f"{ours}.{name}", f"{theirs}.{name}")


def join_heads(text: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two heads without a bias to one with a bias of 0."""
    weight = torch.cat([text, image])
    return weight, weight.new_zeros(len(weight))


def verify(folder: Path, conversion: Conversion) -> Verification:
    """
    Compares a written folder with minDALL-E's own model where its code can be imported (`dalle`, a clone on the
    PYTHONPATH), or with itself.

    Args:
        folder (`Path`): the pipeline's.
        conversion ([`Conversion`]): what it was made from.
    """
    try:
        from dalle.models.stage2.transformer import Transformer1d
        from dalle.models.tokenizer import build_tokenizer
        from omegaconf import OmegaConf
    except (ImportError, AttributeError, ValueError):  # the last from its dataclasses, which Python 3.11 refuses
        return verify_pipeline(folder, conversion, Original("minDALL-E"))
    config = conversion.parts["prior"].content.config
    hparams = {
        **{
            "embed_dim": config.hidden_size,
            "n_layers": config.num_hidden_layers,
            "n_heads": config.num_attention_heads,
        },
        **{"n_dense_layers": config.num_hidden_layers, "ctx_len_img": config.num_image_tokens},
        **{"ctx_len_txt": config.text_length, "gelu_use_approx": config.hidden_act == "quick_gelu"},
        **{"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "mlp_bias": True, "attn_bias": True},
    }
    original = Transformer1d(config.text_vocab_size, config.image_vocab_size, OmegaConf.create(hparams))
    fill_module(original, dict(conversion.read_stored("prior")))
    options = {"context_length": config.text_length, "lowercase": True, "dropout": None}
    tokenizer = build_tokenizer(str(conversion.files[3].parent), **options)

    def compute(text_ids: torch.Tensor, image_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        places = [torch.arange(ids.shape[1])[None] for ids in (image_tokens, text_ids)]
        image, text = original(image_tokens, text_ids, *places)
        return text, image

    return verify_pipeline(
        folder,
        conversion,
        Original("minDALL-E", "of the clone", compute, lambda caption: tokenizer.encode(caption).ids),
    )

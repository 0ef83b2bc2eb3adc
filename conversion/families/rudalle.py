"""ruDALL-E (Malevich, Surrealist XL, Kandinsky, Emojich): a flat `.bin`, a GumbelVQ, a YouTokenToMe model.

Sizes that only its code says are found from the weights; the number of heads, which no weight shows, by the width;
which of its two forms a prior is of, by the masks that lie with it, else by the user's word.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_dalle import DalleFamilyPriorConfig, DalleFamilyPriorForCausalLM
from hf_dalle.modeling_family_prior import family_attention_mask

from ..cards import Verification
from ..folders import Conversion, Facts, build_on_meta, fill_module, join_parts, make_part
from ..key_map import KeyMap, join_rows
from ..safe_load import list_tensors, load_checkpoint
from ..sizes import count_numbered, find_shape
from ..sources import BESIDE, LIGHTNING_CLASSES, find_file, list_beside, take_weights
from .caption_tokenizers import read_youtokentome
from .prior_check import Original, verify_pipeline
from .vqgan import count_levels, map_vqgan


FORMS = ("v2", "v3")
# Of the published files, by rudalle 1.1.3; some have one name.
PUBLISHED_FORMS = (
    "Malevich's pytorch_model_v3.bin, Surrealist XL and Kandinsky are v3; Emojich and Malevich's pytorch_model_v2.bin"
    " are v2"
)
START_TOKEN_ID = 2  # what the v2 form puts before a caption, which the tokenizer begins with too
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
        "The original has no guidance, and nothing says that captions were dropped in training: guidance warns, and"
        " the empty prompt is refused.",
    ],
)
V3_NOTE = (
    "The first image token is drawn by the image head, as the original does. Its v3 form never trained that head"
    " there: in training the first token was a label of the text head."
)


def read_source(source: Path, form: str | None = None) -> Conversion:
    """
    Reads a folder with the prior (one `.bin`), the image model (`vqgan.gumbelf8-sber.model.ckpt`) and `bpe.model`.

    Args:
        source (`Path`): the folder.
        form (`str`, *optional*): one of [`FORMS`], which a file without masks does not tell.

    Raises:
        OSError: for a file that is missing or damaged.
        ValueError: for what is not ruDALL-E's; for a form that is missing, or another than the file's.
    """
    if not source.is_dir():
        raise OSError(f"{source} must be a folder with the prior (.bin), the image model (.ckpt) and bpe.model.")
    files = [find_file(source, (".bin",)), find_file(source, (".ckpt",)), find_file(source, (".model",))]
    tensors = list_tensors(load_checkpoint(files[0]).content)
    form, told = find_form(tensors, form, files[0].name)
    config, inferred = find_config(tensors, form)
    inferred.append(told)
    model = build_on_meta(DalleFamilyPriorForCausalLM, config)
    model.generation_config.update(top_k=min(TOP_K, config.image_vocab_size), top_p=TOP_P)
    prior = make_part(model, tensors)
    map_keys(prior.keys, config)
    content = load_checkpoint(files[1], LIGHTNING_CLASSES).content
    vae_tensors = list_tensors(take_weights(content))
    factor = 2 ** (count_levels(vae_tensors) - 1)
    dvae, found = map_vqgan(vae_tensors, config.image_grid_size * factor)
    dvae.keys.drop_beside(list_beside(content), BESIDE)
    found[0] = f"pictures of {config.image_grid_size * factor}: the prior's grid, {factor} pixels a cell"
    tokenizer = read_youtokentome(files[2], config.text_length, do_lower_case=True, do_add_ends=True)
    if len(tokenizer) != config.text_vocab_size:
        raise ValueError(
            f"{files[2].name} has {len(tokenizer)} ids, but the prior was trained with {config.text_vocab_size}."
        )
    facts = FACTS if form == "v2" else FACTS.with_note(V3_NOTE)
    return Conversion(join_parts(prior, dvae, tokenizer), facts, files, [*inferred, *found])


def find_form(tensors: Mapping[str, Any], form: str | None, name: str) -> tuple[str, str]:
    """
    Of which form a prior is, and what tells it: the mask of its last layer where the file holds it, else the user.

    Args:
        tensors (`Mapping[str, StoredTensor]`): the file's.
        form (`str`, *optional*): what the user says.
        name (`str`): of the file.
    """
    found = None
    if "transformer.conv_mask" in tensors:
        text_length = find_shape(tensors, "text_pos_embeddings.weight")[0] - 1
        grid_size = find_shape(tensors, "image_row_embeddings.weight")[0]
        fitting = [kind for kind in FORMS if is_mask(tensors, "conv", kind, text_length, grid_size)]
        if not fitting:
            raise ValueError(f"transformer.conv_mask of {name} is the mask of neither form of ruDALL-E, v2 or v3.")
        found = fitting[0] if len(fitting) == 1 else None
    if found is not None and form not in (None, found):
        raise ValueError(f"{name} is of the {found} form, by the mask of its conv layer, and not {form}.")
    if found is not None:
        return found, f"the {found} form, by the mask of its conv layer"
    if form is None:
        raise ValueError(
            f"{name} does not tell its form: add `--form v2` or `--form v3`. The weights are the same, the other form"
            f" draws wrongly. {PUBLISHED_FORMS}, by rudalle 1.1.3."
        )
    if any(other in Path(name).stem for other in FORMS if other != form):
        raise ValueError(f"{name} names another form than `--form {form}`: take the right one, or rename the file.")
    return form, f"the {form} form, by `--form`: no mask in the file tells it"


def find_config(tensors: Mapping[str, Any], form: str) -> tuple[DalleFamilyPriorConfig, list[str]]:
    """
    The prior's configuration from the shapes of its weights.

    Args:
        tensors (`Mapping[str, StoredTensor]`): its own, or the like with shapes.
        form (`str`): one of [`FORMS`]. A prior of the v2 form puts a start-of-text before each caption, by which its
            masks are one state early, and its conv windows go round the grid.
    """
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
        start_token_id=START_TOKEN_ID if form == "v2" else None,
        bos_token_id=2,
        image_vocab_size=find_shape(tensors, "image_embeddings.weight")[0],
        image_grid_size=find_shape(tensors, "image_row_embeddings.weight")[0],
        attention_types=[find_attention_type(layer, num_layers, form) for layer in range(num_layers)],
        conv_kernel_size=CONV_KERNEL_SIZE,
        use_early_masks=form == "v2",
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


def find_attention_type(layer: int, num_layers: int, form: str) -> str:
    """What its code says: of layers 0, 1, ... every fourth from 1 is column, the last conv, the others row."""
    if (layer - 1) % 4 == 0:
        return "column"
    return "row" if layer != num_layers - 1 else MASKS[form]["conv"]


def map_keys(keys: KeyMap, config: DalleFamilyPriorConfig) -> None:
    """The rules for the prior's weights."""
    num_states = config.num_text_states  # the v3 form has one position more than it reads
    keys.add("model.embed_tokens.weight", ("text_embeddings.weight", "image_embeddings.weight"), join_rows)
    keys.add("model.text_position_embedding.weight", "text_pos_embeddings.weight", lambda weight: weight[:num_states])
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
    drop_masks(keys, config)


def add_rows_and_columns(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """H x width and W x width to (H * W) x width."""
    return (rows.float()[:, None] + columns.float()[None]).flatten(0, 1)


# Attention types by the names of the masks.
MASKS = {
    "v2": {"row": "row", "col": "column", "conv": "conv_wrapped"},
    "v3": {"row": "row", "col": "column", "conv": "conv_bordered"},
}


def is_mask(tensors: Mapping[str, Any], name: str, form: str, text_length: int, grid_size: int) -> bool:
    """Whether a mask of the file is the one that we compute for a form."""
    stored = tensors[f"transformer.{name}_mask"]
    num_states = text_length + grid_size**2
    if stored.shape.numel() != num_states**2 or stored.shape[-2:] != (num_states, num_states):
        return False
    ours = family_attention_mask(MASKS[form][name], text_length, grid_size, CONV_KERNEL_SIZE)
    return torch.equal(stored.read().bool().view(num_states, num_states), ours)


def drop_masks(keys: KeyMap, config: DalleFamilyPriorConfig) -> None:
    """Drops the masks, which we compute, if they are those that the checkpoint holds, where it holds them."""
    form = "v2" if config.use_early_masks else "v3"
    for name in MASKS[form]:
        if f"transformer.{name}_mask" not in keys.source:
            continue
        if not is_mask(keys.source, name, form, config.text_length, config.image_grid_size):
            raise ValueError(f"transformer.{name}_mask is not the mask of ruDALL-E's {form} form.")
        keys.drop(f"transformer.{name}_mask", "a mask, which is computed; equal")


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
        import youtokentome
        from rudalle.dalle.model import DalleModel
        from rudalle.tokenizer import YTTMTokenizerWrapper
    except (ImportError, AttributeError):
        return verify_pipeline(folder, conversion, Original("rudalle"))
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
        hf_version="v2" if config.use_early_masks else "v3",
    )
    masks = {name: tensor for name, tensor in original.state_dict().items() if name.endswith("_mask")}
    fill_module(original, {**masks, **dict(conversion.read_stored("prior"))})
    tokenizer = YTTMTokenizerWrapper(youtokentome.BPE(model=str(conversion.files[2])))

    def compute(text_ids: torch.Tensor, image_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        input_ids = torch.cat([text_ids, image_tokens[:, :-1]], dim=1)
        mask = torch.ones(1, 1, original.total_seq_length, original.total_seq_length).tril()
        logits, _ = original(input_ids, mask)
        text, image = logits.tensor_split([config.num_text_states - 1], dim=1)
        return text[..., : config.image_token_offset], image[..., config.image_token_offset :]

    def encode(caption: str) -> list[int]:
        # What its pipelines.generate_images does to a caption.
        return tokenizer.encode_text(caption.lower().strip(), config.text_length).tolist()

    return verify_pipeline(folder, conversion, Original("rudalle", rudalle.__version__, compute, encode))

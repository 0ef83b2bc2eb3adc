"""Tiny checkpoints under the names and in the files of the family's programs, with random weights."""

from collections import OrderedDict

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from conversion.families import vqgan
from conversion.families.dalle_pytorch_vae import _name_original
from hf_dalle import DalleDiscreteVAE


WIDTH, NUM_WORDS, TEXT_LENGTH, NUM_CODES, GRID = 16, 20, 5, 12, 4
HPARAMS = {
    **{"num_text_tokens": NUM_WORDS, "text_seq_len": TEXT_LENGTH, "dim": WIDTH, "depth": 2, "heads": 2, "dim_head": 6},
    **{"reversible": False, "loss_img_weight": 7, "attn_types": ("full", "axial_row"), "stable": False},
    **{"shift_tokens": True, "rotary_emb": False, "shared_attn_ids": None, "shared_ff_ids": None},
}
VAE = {"image_size": 8, "num_layers": 1, "num_tokens": NUM_CODES, "codebook_dim": 6, "hidden_dim": 8}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def name_dalle_pytorch(sandwich=False):
    """A state dict of DALLE-pytorch 1.6 with token shift."""
    num_text = NUM_WORDS + TEXT_LENGTH
    weights = {
        **{"text_emb.weight": draw(num_text, WIDTH), "image_emb.weight": draw(NUM_CODES, WIDTH)},
        **{"text_pos_emb.weight": draw(TEXT_LENGTH + 1, WIDTH)},
        **{"image_pos_emb.weights.0": draw(1, GRID, 1, WIDTH), "image_pos_emb.weights.1": draw(1, 1, GRID, WIDTH)},
        **{"to_logits.0.weight": draw(WIDTH), "to_logits.0.bias": draw(WIDTH)},
        **{"to_logits.1.weight": draw(num_text + NUM_CODES, WIDTH), "to_logits.1.bias": draw(num_text + NUM_CODES)},
    }
    inner = {
        0: {"to_qkv.weight": (36, WIDTH), "to_out.0.weight": (WIDTH, 12), "to_out.0.bias": (WIDTH,)},
        1: {"net.0.weight": (128, WIDTH), "net.0.bias": (128,), "net.3.weight": (WIDTH, 64), "net.3.bias": (WIDTH,)},
    }
    for layer in range(2):
        for kind, wrappers in ((0, "fn.fn.fn.fn.fn."), (1, "fn.fn.fn.fn.")):
            place = f"transformer.layers.layers.{layer}.{kind}."
            weights[f"{place}scale"] = draw(1, 1, WIDTH)
            for norm in ("norm", "norm_out") if sandwich else ("norm",):
                weights |= {f"{place}fn.{norm}.weight": draw(WIDTH), f"{place}fn.{norm}.bias": draw(WIDTH)}
            weights |= {f"{place}{wrappers}{name}": draw(*shape) for name, shape in inner[kind].items()}
    return weights


def save_words(folder, num_words=NUM_WORDS):
    words = {f"w{number}" if number else "[UNK]": number for number in range(num_words)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "words.json"))


def save_dalle_pytorch(folder, weights=None, hparams=None, num_words=NUM_WORDS, **content):
    """A folder with a checkpoint, changed as the arguments say, and its tokenizer; "gone" takes a setting away."""
    folder.mkdir(exist_ok=True)
    sizes = {"sample_size": 8, "vocab_size": NUM_CODES, "codebook_dim": 6, "hidden_channels": 8}
    vae = DalleDiscreteVAE(num_layers=1, num_resnet_blocks=0, **sizes)
    names = {name: f"vae.{_name_original(name, 1, 0)}" for name in vae.state_dict()}
    weights = dict(name_dalle_pytorch() if weights is None else weights)
    weights |= {names[name]: weight for name, weight in vae.state_dict().items()}
    hparams = {name: value for name, value in {**HPARAMS, **(hparams or {})}.items() if value != "gone"}
    whole = {"hparams": hparams, "vae_params": VAE, "weights": weights, "version": "1.6.6", "epoch": 0, **content}
    torch.save(whole, folder / "dalle.pt")
    save_words(folder, num_words)
    return folder


def name_rudalle(
    num_layers=4, width=24, grid=GRID, num_words=NUM_WORDS, text_length=TEXT_LENGTH, num_codes=NUM_CODES, make=draw
):
    """A state dict of ruDALL-E without masks and sandwich norms; `make` makes a weight of its sizes."""
    num_text = num_words + text_length
    shapes = {
        **{"text_embeddings.weight": (num_text, width), "image_embeddings.weight": (num_codes, width)},
        **{"text_pos_embeddings.weight": (text_length + 1, width)},
        **{"image_row_embeddings.weight": (grid, width), "image_col_embeddings.weight": (grid, width)},
        **{"to_logits.0.weight": (width,), "to_logits.0.bias": (width,)},
        **{"to_logits.1.weight": (num_text + num_codes, width), "to_logits.1.bias": (num_text + num_codes,)},
        **{"transformer.final_layernorm.weight": (width,), "transformer.final_layernorm.bias": (width,)},
    }
    for layer in range(num_layers):
        place = f"transformer.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{place}{name}.weight": (width,), f"{place}{name}.bias": (width,)}
        for name, rows, columns in (
            *(("attention.query_key_value", 3 * width, width), ("attention.dense", width, width)),
            *(("mlp.dense_h_to_4h", 4 * width, width), ("mlp.dense_4h_to_h", width, 4 * width)),
        ):
            shapes |= {f"{place}{name}.weight": (rows, columns), f"{place}{name}.bias": (rows,)}
    return {name: make(*shape) for name, shape in shapes.items()}


def name_mindalle(width=16, num_layers=1):
    """minDALL-E's second stage."""
    shapes = {
        **{"tok_emb_img.weight": (NUM_CODES, width), "tok_emb_txt.weight": (NUM_WORDS, width)},
        **{"pos_emb_img.weight": (GRID**2, width), "pos_emb_txt.weight": (TEXT_LENGTH, width)},
        **{"head_img.weight": (NUM_CODES, width), "head_txt.weight": (NUM_WORDS, width)},
        **{"ln_f.weight": (width,), "ln_f.bias": (width,)},
    }
    for layer in range(num_layers):
        for name in ("ln1", "ln2"):
            shapes |= {f"blocks.{layer}.{name}.{part}": (width,) for part in ("weight", "bias")}
        squares = {f"attn.{name}": (width, width) for name in ("query", "key", "value", "proj")}
        for name, shape in {**squares, "mlp.0": (4 * width, width), "mlp.2": (width, 4 * width)}.items():
            shapes |= {f"blocks.{layer}.{name}.weight": shape, f"blocks.{layer}.{name}.bias": shape[:1]}
    return {name: draw(*shape) for name, shape in shapes.items()}


def write_youtokentome(path, merges=((5, 6, 9), (4, 9, 10))):
    characters = {"\u2581": 4, "a": 5, "b": 6, "c": 7, "d": 8}
    lines = [
        f"{len(characters)} {len(merges)}",
        *(f"{ord(character)} {number}" for character, number in characters.items()),
    ]
    lines += [" ".join(map(str, merge)) for merge in merges]
    path.write_text("\n".join([*lines, "1 0 2 3"]))


def build(cls, **config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(**config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter, std=0.1)
        return model


def save_whole_module(weights, path):
    """Weights as a module saved whole, under the classes of a real one as far as these are torch's own."""
    root = nn.Sequential()
    for name, weight in weights.items():
        module = root
        *folders, last = name.split(".")
        for folder in folders:
            if folder not in module._modules:
                module.add_module(folder, nn.Identity() if folder == folders[-1] else nn.Sequential())
            module = module._modules[folder]
        module.register_parameter(last, nn.Parameter(weight))
    torch.save(root, path)


def save_vqgan(path, model, **more):
    """A Lightning checkpoint under taming's names."""
    num_levels, weights = len(model.config.block_out_channels), OrderedDict()
    for name, weight in model.state_dict().items():
        is_linear = ".attentions." in name and weight.ndim == 2
        weights[vqgan.name_original(name, num_levels)] = weight[:, :, None, None] if is_linear else weight
    if model.config.quantizer == "gumbel":
        weights["quantize.embed.weight"] = weights.pop("quantize.embedding.weight")
    torch.save({"epoch": 1, "state_dict": {**weights, **more}}, path)


VQGAN_SIZES = {"sample_size": 16, "vocab_size": 24, "block_out_channels": [32, 64], "layers_per_block": 1}

"""Run where dalle-pytorch is installed: one random checkpoint a case as train_dalle.py saves it, and what it computes.

Of whichever version is first on the path.
Usage: FOLDER CASES, the cases as JSON: {name: {"dalle": {...}, "vae": {...}, "vae_class": name}}.
"""

import inspect
import json
import sys
from importlib.metadata import version
from pathlib import Path

import originals_setup  # noqa: F401
import torch
from dall_e import Decoder, Encoder
from dalle_pytorch import DALLE, DiscreteVAE, OpenAIDiscreteVAE, VQGanVAE
from safetensors.torch import save_file
from taming.models.vqgan import GumbelVQ, VQModel
from torch import nn


VERSION = version("dalle-pytorch")


def build_vae(case):
    """Of each class that a checkpoint may hold; two of them download their weights in their constructors."""
    options, kind = case["vae"], case["vae_class"]
    if kind == "DiscreteVAE":
        return DiscreteVAE(**options)
    vae = {"OpenAIDiscreteVAE": OpenAIDiscreteVAE, "VQGanVAE": VQGanVAE}[kind]
    vae = vae.__new__(vae)
    nn.Module.__init__(vae)
    vae.channels = 3
    if kind == "OpenAIDiscreteVAE":
        vae.image_size, vae.num_layers, vae.num_tokens = 32, 3, options["vocab_size"]
        vae.enc = Encoder(n_hid=options["n_hid"], vocab_size=vae.num_tokens)
        vae.dec = Decoder(n_hid=options["n_hid"], n_init=options["n_init"], vocab_size=vae.num_tokens)
        return vae
    vae.image_size, vae.num_layers, vae.num_tokens = 8, 1, options["n_embed"]
    ddconfig = {
        **{"ch": 32, "out_ch": 3, "ch_mult": [1, 1], "num_res_blocks": 1, "in_channels": 3, "attn_resolutions": [4]},
        **{"resolution": vae.image_size, "z_channels": 16, "double_z": False, "dropout": 0.0},
    }
    shared = {"ddconfig": ddconfig, "lossconfig": {}, "n_embed": vae.num_tokens, "embed_dim": 16}
    vae.is_gumbel = options["kind"] == "gumbel"
    vae.model = GumbelVQ(**shared, temperature_scheduler_config={}) if vae.is_gumbel else VQModel(**shared)
    return vae


def build(case):
    torch.manual_seed(0)
    vae = build_vae(case)
    known = inspect.signature(DALLE).parameters
    dalle = DALLE(vae=vae, **{name: value for name, value in case["dalle"].items() if name in known}).eval()
    with torch.no_grad():
        for name, parameter in dalle.named_parameters():
            if name.startswith("vae."):
                continue
            noise = torch.randn(parameter.shape)
            if name.endswith(".scale"):
                parameter.mul_(1 + 0.5 * noise)
            elif "norm" in name or name.startswith("to_logits.0"):
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * (1.0 if "emb" in name else 2.0 / parameter.shape[-1] ** 0.5))
    return vae, dalle


def save_checkpoint(case, vae, dalle, path):
    hparams = {"text_seq_len": 256, "heads": 8, "dim_head": 64, "loss_img_weight": 7, **case["dalle"]}
    hparams.pop("sandwich_norm", None)  # train_dalle.py does not write it
    hparams = {name: value for name, value in hparams.items() if name in inspect.signature(DALLE).parameters}
    if hparams.get("attn_types") is not None:
        hparams["attn_types"] = tuple(hparams["attn_types"])
    content = {
        "hparams": hparams,
        "vae_params": case["vae"] if isinstance(vae, DiscreteVAE) else None,
        "epoch": 3,
        "version": VERSION,
        "vae_class_name": type(vae).__name__,
        "weights": dalle.state_dict(),
        "opt_state": torch.optim.Adam(dalle.parameters()).state_dict(),
        "scheduler_state": None,
    }
    if tuple(map(int, VERSION.split("."))) < (1, 1, 6):  # they wrote neither
        for name in ("version", "vae_class_name"):
            content.pop(name)
    torch.save(content, path)


def draw_greedily(dalle, text, cond_scale):
    image = torch.empty(len(text), 0, dtype=torch.long)
    for _ in range(dalle.image_seq_len):
        # Uncached, and a copy of the text, which guidance zeroes in place; versions before 1.2 have no guidance.
        if cond_scale == 1:
            logits = dalle(text.clone(), image)[:, -1]
        else:
            logits = dalle.forward_with_cond_scale(text.clone(), image, cond_scale=cond_scale)[:, -1]
        image = torch.cat([image, logits[:, dalle.num_text_tokens :].argmax(dim=1)[:, None]], dim=1)
    return image


@torch.no_grad()
def compute(dalle):
    generator = torch.Generator().manual_seed(1)
    num_ids = dalle.num_text_tokens - dalle.text_seq_len
    text = torch.randint(1, num_ids, (3, dalle.text_seq_len), generator=generator)
    text[1, 3:] = 0
    text[2, 1] = 0
    image = torch.randint(dalle.num_image_tokens, (3, dalle.image_seq_len), generator=generator)
    pixels = dalle.vae.decode(image)
    if isinstance(dalle.vae, DiscreteVAE):  # it normalises what goes in, and leaves what comes out as it is
        pixels = (0.5 * pixels + 0.5).clamp(0, 1)
    guided = {"guided": draw_greedily(dalle, text, 3.0)} if hasattr(dalle, "forward_with_cond_scale") else {}
    return {
        "text": text,
        "image": image,
        "logits": dalle(text.clone(), image),
        "loss": dalle(text.clone(), image, return_loss=True),
        "greedy": draw_greedily(dalle, text, 1.0),
        **guided,
        "pixels": pixels,
    }


def main(folder, cases):
    for name, case in cases.items():
        vae, dalle = build(case)
        place = folder / name
        place.mkdir()
        save_checkpoint(case, vae, dalle, place / "dalle.pt")
        reference = {key: value.contiguous() for key, value in compute(dalle).items()}
        save_file(reference, place / "reference.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))

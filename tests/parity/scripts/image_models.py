"""In the originals' environment: image models with random weights, saved as their makers save them, what they give.

Called as `image_models.py FOLDER OPTIONS`, options as JSON: for each case, which goes into a folder of its name, the
`model` (a function here) and what it takes. One process makes all cases: starting one takes longer than they do.
"""

import json
import sys
from pathlib import Path

import originals_setup  # noqa: F401
import torch
import yaml
from dall_e import Decoder, Encoder, map_pixels, unmap_pixels
from dalle_pytorch import DiscreteVAE
from safetensors.torch import save_file
from taming.models.vqgan import GumbelVQ, VQModel


def save_reference(folder, **tensors):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "reference.safetensors")


def openai_dvae(folder, use_zip, n_hid, n_init, vocab_size, n_blk_per_group, size):
    encoder = Encoder(n_hid=n_hid, vocab_size=vocab_size, n_blk_per_group=n_blk_per_group)
    decoder = Decoder(n_hid=n_hid, n_init=n_init, vocab_size=vocab_size, n_blk_per_group=n_blk_per_group)
    for module in (encoder, decoder):
        for name, weight in module.named_parameters():
            if name.endswith(".b"):  # zero as they begin: a bias that is lost would not be seen
                torch.nn.init.normal_(weight, std=0.1)
    for name, module in (("encoder", encoder), ("decoder", decoder)):
        torch.save(module, folder / f"{name}.pkl", _use_new_zipfile_serialization=use_zip)
    pixels = torch.rand(2, 3, size, size)
    logits = encoder(map_pixels(pixels))
    tokens = logits.argmax(dim=1)
    maps = decoder(torch.nn.functional.one_hot(tokens, vocab_size).permute(0, 3, 1, 2).float())
    sample = unmap_pixels(torch.sigmoid(maps[:, :3]))
    save_reference(folder, pixels=pixels, logits=logits, tokens=tokens, maps=maps, sample=sample)


def vqgan(folder, kind, n_embed, embed_dim, ddconfig):
    shared = {"ddconfig": ddconfig, "lossconfig": {}, "n_embed": n_embed, "embed_dim": embed_dim}
    if kind == "gumbel":
        model = GumbelVQ(**shared, temperature_scheduler_config={})
    else:
        model = VQModel(**shared)
        torch.nn.init.normal_(model.quantize.embedding.weight)  # codes as far apart as what is encoded
    for name, weight in model.named_parameters():
        if "norm" in name:  # one and zero as they begin: an exchange would not be seen
            torch.nn.init.normal_(weight, mean=1.0 if name.endswith("weight") else 0.0, std=0.3)
    model.loss.discriminator = torch.nn.Conv2d(3, 4, 1)  # in the file, and not to be converted
    model.eval()
    checkpoint = {
        "epoch": 3,
        "global_step": 1000,
        "pytorch-lightning_version": "1.0.8",
        "state_dict": model.state_dict(),
        "optimizer_states": [{"state": {0: {"step": 1, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}],
    }
    torch.save(checkpoint, folder / "last.ckpt")
    config = {"model": {"params": {**shared, "ddconfig": ddconfig}}}
    (folder / "model.yaml").write_text(yaml.safe_dump(config))
    size = ddconfig["resolution"]
    pixels = torch.rand(2, 3, size, size)
    encoded = model.quant_conv(model.encoder(2 * pixels - 1))
    if kind == "gumbel":
        logits = model.quantize.proj(encoded)
        tokens, codes = logits.argmax(dim=1), model.quantize.embed.weight
    else:
        tokens = model.quantize(encoded)[2][2].view(2, *encoded.shape[2:])
        codes = model.quantize.embedding.weight
        logits = -torch.cdist(encoded.movedim(1, -1).flatten(0, 2), codes).square()
        logits = logits.view(2, *encoded.shape[2:], -1).movedim(-1, 1)
    sample = (model.decode(codes[tokens].movedim(-1, 1)).clamp(-1.0, 1.0) + 1) * 0.5  # as its users decode
    save_reference(folder, pixels=pixels, logits=logits, tokens=tokens, sample=sample)


def discrete_vae(folder, **options):
    vae = DiscreteVAE(**{name: value for name, value in options.items() if value is not None}).eval()
    if options.get("normalization", 1) is None:
        vae.normalization = None  # earlier versions take it as an argument; this one still calls without
    torch.save({"hparams": options, "weights": vae.state_dict()}, folder / "vae.pt")
    pixels = torch.rand(2, 3, vae.image_size, vae.image_size)
    logits = vae(pixels, return_logits=True)
    tokens = vae.get_codebook_indices(pixels)
    save_reference(folder, pixels=pixels, logits=logits, tokens=tokens, decoded=vae.decode(tokens))


if __name__ == "__main__":
    with torch.no_grad():
        for name, case in json.loads(sys.argv[2]).items():
            place = Path(sys.argv[1]) / name
            place.mkdir()
            torch.manual_seed(0)
            {"openai_dvae": openai_dvae, "vqgan": vqgan, "vae": discrete_vae}[case.pop("model")](place, **case)

"""Run with the path of a clone of kakaobrain/minDALL-E: random checkpoints in its files, and what its code computes.

Usage: FOLDER OPTIONS, as JSON {"clone": path, "captions": [...], "cases": {name: {"stage1": {...}, "stage2": {...}}}}.
"""

import json
import sys
from pathlib import Path

import originals_setup
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import save_file
from tokenizers import CharBPETokenizer


def import_original(clone):
    originals_setup.add_mindalle(clone)
    from dalle.models.stage1.vqgan import VQGAN
    from dalle.models.stage2.transformer import Transformer1d
    from dalle.models.tokenizer import build_tokenizer

    return VQGAN, Transformer1d, build_tokenizer


def train_tokenizer(captions, vocab_size, folder):
    folder.mkdir()
    tokenizer = CharBPETokenizer(unk_token="[UNK]", lowercase=True)
    special_tokens = ["[PAD]", "[UNK]"]
    tokenizer.train_from_iterator(captions, vocab_size, special_tokens=special_tokens, show_progress=False)
    tokenizer.save_model(str(folder), "bpe-16k")


def draw_greedily(model, text, places):
    image = torch.empty(len(text), 0, dtype=torch.long)
    for _ in range(model.ctx_len_img):
        padded = torch.cat([image, image.new_zeros(len(text), 1)], dim=1)
        logits, _ = model(padded, text, places(padded), places(text))
        image = torch.cat([image, logits[:, -1].argmax(dim=1)[:, None]], dim=1)
    return image


def save_case(case, captions, place, classes):
    torch.manual_seed(0)
    vqgan_class, prior_class, build_tokenizer = classes
    stage1, stage2 = OmegaConf.create(case["stage1"]), OmegaConf.create(case["stage2"])
    train_tokenizer(captions, stage2.vocab_size_txt, place / "tokenizer")
    (place / "config.yaml").write_text(yaml.safe_dump(case))
    vqgan = vqgan_class(stage1.n_embed, stage1.embed_dim, stage1.hparams).eval()
    prior = prior_class(stage2.vocab_size_txt, stage2.vocab_size_img, stage2.hparams).eval()
    with torch.no_grad():
        for name, parameter in prior.named_parameters():
            noise = torch.randn(parameter.shape)
            scale = 1.0 if "emb" in name else 2.0 / parameter.shape[-1] ** 0.5
            parameter.copy_(1 + 0.3 * noise if ".ln" in name or "ln_f" in name else scale * noise)
    for number, model in ((1, vqgan), (2, prior)):
        torch.save({"state_dict": model.state_dict()}, place / f"stage{number}_last.ckpt")
    tokenizer = build_tokenizer(
        str(place / "tokenizer"), context_length=stage2.hparams.ctx_len_txt, lowercase=True, dropout=None
    )
    ids = [tokenizer.encode(caption).ids for caption in captions]
    (place / "reference.json").write_text(json.dumps(ids))

    def places(tokens):
        return torch.arange(tokens.shape[1]).expand(len(tokens), -1)

    text = torch.tensor(ids[1:4])
    image = torch.randint(stage2.vocab_size_img, (3, prior.ctx_len_img))
    grid = int(prior.ctx_len_img**0.5)
    with torch.no_grad():
        image_logits, text_logits = prior(image, text, places(image), places(text))
        reference = {
            "text": text,
            "image": image,
            "text_logits": text_logits,
            "image_logits": image_logits,
            "greedy": draw_greedily(prior, text, places),
            "pixels": (vqgan.decode_code(image.view(3, grid, grid)) * 0.5 + 0.5).clamp(0, 1),
        }
    save_file({name: tensor.contiguous() for name, tensor in reference.items()}, place / "reference.safetensors")


def main(folder, clone, captions, cases):
    classes = import_original(clone)
    for name, case in cases.items():
        (folder / name).mkdir()
        save_case(case, captions, folder / name, classes)


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))

"""Run where rudalle is installed: a random checkpoint a case in the files of the published ones, and what it computes.

With models.json, the sizes and forms of the published ones as its code has them.
Usage: FOLDER OPTIONS, JSON {"captions": [...], "cases": {name: {"model": {...}, "vqgan": {...}, "has_masks": ...}}}.
"""

import json
import sys
from pathlib import Path

import originals_setup  # noqa: F401
import torch
import youtokentome
from omegaconf import OmegaConf
from rudalle.dalle import MODELS
from rudalle.dalle.model import DalleModel
from rudalle.tokenizer import YTTMTokenizerWrapper
from rudalle.vae.model import VQGanGumbelVAE
from safetensors.torch import save_file


def randomize(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if "layernorm" in name or name.startswith("to_logits.0"):
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * (1.0 if "embeddings" in name else 2.0 / parameter.shape[-1] ** 0.5))


def train_tokenizer(captions, vocab_size, path):
    corpus = path.with_suffix(".txt")
    corpus.write_text("\n".join(captions * 3), encoding="utf-8")
    youtokentome.BPE.train(data=str(corpus), model=str(path), vocab_size=vocab_size, coverage=0.98, n_threads=1)
    corpus.unlink()
    return YTTMTokenizerWrapper(youtokentome.BPE(model=str(path)))


def draw_greedily(model, text, mask):
    out = text
    for _ in range(model.image_seq_length):
        logits, _ = model(out, mask)
        out = torch.cat([out, logits[:, -1, model.vocab_size :].argmax(dim=1)[:, None]], dim=1)
    return out[:, model.text_seq_length :]


def save_case(case, captions, place):
    torch.manual_seed(0)
    text_length, model_options = case["model"]["text_seq_length"], dict(case["model"])
    tokenizer = train_tokenizer(captions, model_options["vocab_size"] - text_length, place / "bpe.model")
    dropouts = {f"{kind}_dropout_prob": 0.1 for kind in ("embedding", "attention", "output")}
    model = DalleModel("cpu", **dropouts, **model_options, cogview_pb_relax=True).eval()
    randomize(model)
    vae = VQGanGumbelVAE(OmegaConf.create({"model": {"params": {**case["vqgan"], "kl_weight": 1e-8}}})).eval()
    weights = model.state_dict()
    if not case["has_masks"]:
        weights = {name: tensor for name, tensor in weights.items() if not name.endswith("_mask")}
    torch.save(weights, place / "pytorch_model.bin")
    torch.save({"state_dict": vae.model.state_dict()}, place / "vqgan.gumbelf8-sber.model.ckpt")
    # What its pipelines.generate_images does to a caption.
    ids = [tokenizer.encode_text(caption.lower().strip(), text_length) for caption in captions]
    (place / "reference.json").write_text(json.dumps([row.tolist() for row in ids]))
    text = torch.stack([row for row in ids if 3 < (row != 0).sum() < text_length][:3])
    image = torch.randint(model_options["image_vocab_size"], (3, model.image_seq_length))
    mask = torch.ones(3, 1, model.total_seq_length, model.total_seq_length).tril()
    with torch.no_grad():
        reference = {
            "text": text,
            "image": image,
            "logits": model(torch.cat([text, image], dim=1), mask)[0],
            "loss": model(torch.cat([text, image], dim=1), mask, return_loss=True)[0],
            "greedy": draw_greedily(model, text, mask),
            "pixels": vae.decode(image),
        }
    save_file({name: tensor.contiguous() for name, tensor in reference.items()}, place / "reference.safetensors")


def main(folder, captions, cases):
    models = {name: {"form": model["hf_version"], **model["model_params"]} for name, model in MODELS.items()}
    (folder / "models.json").write_text(json.dumps(models))
    for name, case in cases.items():
        (folder / name).mkdir()
        save_case(case, captions, folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))

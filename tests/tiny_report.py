"""A report made up in the shape that `evaluate.py` writes, no figure like another, and what renders it as a card."""

from pathlib import Path

import render_card

from hf_dalle.model_card import render_model_card


ROOT = Path(__file__).parents[1]
CARDS = ROOT / "model_cards"


def figure(value):
    return {"value": value, "low": value - 0.04, "high": value + 0.04}


def make_rows(start):
    """Three rows of figures, none like another."""
    return {
        row: {name: figure(start + 0.1 * i + 0.03 * j) for j, name in enumerate(("recall@1", "recall@5", "style"))}
        for i, row in enumerate(("drawn", "reconstructions", "real"))
    }


def make_split(start, num_pictures):
    return {
        "num_pictures": num_pictures,
        "seed": 7,
        "sides": {"32": make_rows(start), "64": make_rows(start + 0.011)},
        "num_concepts": num_pictures * 5,
        "image_loss": 3 + start,
        "copies": {
            "share": start / 9,
            "share_real": start / 8,
            "threshold": start / 7,
            "num_pictures": num_pictures - 1,
        },
    }


def make_report():
    prior = {"num_hidden_layers": 6, "hidden_size": 192, "num_attention_heads": 3, "text_length": 24}
    prior |= {"image_grid_size": 12, "image_vocab_size": 777, "text_vocab_size": 1999}
    prior |= {"attention_types": ["full", "row", "row", "full", "conv", "full"]}
    dvae = {"quantizer": "gumbel", "sample_size": 96, "vocab_size": 777, "patch_size": 2, "layers_per_block": 3}
    dvae |= {"encoder_block_out_channels": [61, 122], "decoder_block_out_channels": [123, 62]}
    captions = ["a noto style emoji of kite", 'a flat fluent style emoji of "TOP" arrow']
    dvae_settings = {"stage": "dvae", "output_dir": "/home/someone/runs/x", "learning_rate": 0.00213, "seed": 5}
    prior_settings = {"stage": "prior", "dvae": "/home/someone/runs/x", "train_batch_size": 48, "hub_token": "hf_x"}
    runs = {
        "dvae": {"settings": dvae_settings, "updates": 4321, "pictures": 138272, "hours": 0.61},
        "prior": {"settings": prior_settings, "updates": 9876, "pictures": 474048, "hours": 5.83},
    }
    runs["dvae"]["final"] = {"loss": -1.37, "train_perplexity": 401.3, "validation_psnr": 21.7}
    runs["prior"]["final"] = {"image_loss": 2.51, "loss": 2.29, "validation_image_loss": 2.77}
    return {
        "name": "emoji-mini",
        "evaluated": "2031-02-03",
        "model": {
            "num_parameters": {"prior": 6543210, "dvae": 2345678},
            "size_in_bytes": 17654321,
            "prior": prior,
            "dvae": dvae,
            "generation": {"guidance_scale": 2.5, "temperature": 0.93, "top_k": 17, "top_p": 0.98},
        },
        "samples": {"prompts": captions, "num_images": 6, "seed": 3},
        "training": runs,
        "data": {"splits": {"train": 7559, "validation": 69, "test_style": 302, "test_compose": 124}},
        "judge": {"name": "SomeNet, weights of some-net 0.1.0", "sides": [32, 64]},
        "dvae": {
            split: {"num_pictures": n, "psnr": figure(20 + n / 100), "perplexity": 300.0 + n, "vocab_size": 777}
            for split, n in (("validation", 69), ("test_style", 302), ("test_compose", 124))
        },
        "splits": {
            "train": make_split(0.313, 301),
            "test_style": make_split(0.227, 302),
            "test_compose": make_split(0.171, 124),
        },
        "runs": [
            {"date": "2031-01-01", "checkpoint": "0123456789ab", "splits": ["test_style"], "seed": 11},
            {"date": "2031-02-03", "checkpoint": "ba9876543210", "splits": ["test_style", "test_compose"], "seed": 13},
        ],
        "pictures": {
            **{name: f"{name}.png" for name in ("samples", "reconstructions", "nearest", "train", "test_style")},
            "curve": "training.png",
        },
    }


def make_facts():
    facts = render_card.read_facts(CARDS / "emoji-mini" / "facts.yaml")
    facts.pop("evaluations")  # reports beside the real card's
    facts["experiments"] = {"text": "On validation.", "columns": ["tried", "found"], "rows": [["a | b", "worse"]]}
    return facts


def render(report, facts=None, **kwargs):
    return render_model_card(report, render_card.TEMPLATE, facts, **kwargs)

"""The dVAE study's settings and its page: measures what the runs left, renders tables and pictures by a template.

No figure of the page is typed. Which runs there are, and how they are run, is `dvae_study.py`'s; the bounds by which
dVAEs of other quantizers and losses are compared are `hf_dalle.evidence_lower_bound`'s.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from describe_run import describe_run
from draw_gallery import Block, compose
from evaluation.elb import summarize
from evaluation.pictures import make_generator, make_seed, read_captions
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment
from PIL import Image
from report_parts import save_png, spread
from settings_file import read_yaml

from hf_dalle import DalleDVAE, DalleImageProcessor, DALLEPipeline, encode_captions
from hf_dalle.data import load_rows, open_picture
from hf_dalle.evidence_lower_bound import evidence_lower_bound, logit_errors
from hf_dalle.metrics import bootstrap, codes_used, perplexity, psnr


BATCH_SIZE = 32
LOSSES = {"pixel_l1_weight": "L1", "pixel_l2_weight": "L2"}


@dataclass
class StudyArguments:
    """The settings of the study."""

    config_dir: str = field(default="", metadata={"help": "Folder with NAME.yaml of each dVAE and prior."})
    runs_dir: str = field(default="", metadata={"help": "Folder of all that the runs write."})
    data_dir: str = field(default="", metadata={"help": "Folder with train.parquet and validation.parquet."})
    page: str = field(default="", metadata={"help": "The Markdown file that `write` makes, its pictures beside it."})
    template: str | None = field(default=None, metadata={"help": "Of the page; none: PAGE with _template.md."})
    do: Literal["status", "next", "all", "write"] = field(
        default="status", metadata={"help": "Say what is done; run the next; run all that is left; write the page."}
    )
    dvaes: list[str] = field(default_factory=list, metadata={"help": "Names; the first is what others differ from."})
    priors: list[str] = field(default_factory=list, metadata={"help": "Names; the first is what others differ from."})
    caption_column: str = "captions"
    text_vocab_size: int = field(default=2048, metadata={"help": "Of the tokenizer."})
    text_length: int = field(default=24, metadata={"help": "Of the tokenizer."})
    num_samples: int = field(default=8, metadata={"help": "Samples of each picture's tokens, for the bounds."})
    num_fit_pictures: int = field(default=256, metadata={"help": "Of `train`, that each scale is fitted to."})
    num_shown: int = field(default=10, metadata={"help": "Pictures a row."})
    prompts: list[str] = field(default_factory=list, metadata={"help": "Captions that the priors draw."})
    seed: int = 0

    def __post_init__(self):
        for name in ("config_dir", "runs_dir", "data_dir", "page", "dvaes"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is missing.")
        for name, lowest in (("num_samples", 2), ("num_fit_pictures", 1), ("num_shown", 1), ("seed", 0)):
            if getattr(self, name) < lowest:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected a number from {lowest}.")
        names = [*self.dvaes, *self.priors]
        if len(set(names)) < len(names):
            raise ValueError(f"`dvaes` and `priors` are {names}; expected different names.")

    def config(self, name: str) -> Path:
        return Path(self.config_dir) / f"{name}.yaml"

    def run(self, name: str) -> Path:
        return Path(self.runs_dir) / name


@torch.no_grad()
def write_page(args: StudyArguments, done: list[str], left: list[str]) -> None:
    """
    Measures the finished runs and writes the page, its figures (.json) and its pictures beside it.

    Args:
        args ([`StudyArguments`]): the study's settings.
        done, left (`list[str]`): names of runs; those left are named on the page.

    Raises:
        ValueError: if no dVAE is done, or the template asks for what is not measured.
        OSError: if there is no template.
    """
    page = Path(args.page)
    template = Path(args.template or page.with_name(f"{page.stem}_template.md"))
    text = template.read_text(encoding="utf-8")
    names = [name for name in args.dvaes if name in done]
    if not names:
        raise ValueError(f"No dVAE of the study is done yet: {', '.join(args.dvaes)}.")
    captions, pictures = read_rows(args, "validation")
    page.parent.mkdir(parents=True, exist_ok=True)
    dvaes, blocks = {}, []
    for name in names:
        dvaes[name], reconstructions = measure_dvae(args, name, pictures)
        blocks.append(Block([reconstructions], describe_choices(dvaes[name])))
    image_processor = DalleImageProcessor.from_pretrained(args.run(names[0]))
    chosen = [pictures[place] for place in spread(len(pictures), args.num_shown)]
    originals = image_processor.postprocess(image_processor.preprocess(chosen)["pixel_values"], output_type="pil")
    shown = {"reconstructions": compose([Block([originals], "pictures of `validation`"), *blocks], 1)}
    priors, blocks = {}, []
    for name in args.priors:
        if name in done:
            priors[name], drawn = measure_prior(args, name, dvaes, pictures, captions)
            blocks.append(Block(drawn, name))
    if blocks and args.prompts:
        shown["samples"] = compose(blocks, 1)
    files = {name: f"{page.stem}_{name}.png" for name in shown}
    for name, image in shown.items():
        save_png(image, page.with_name(files[name]))
    figures = {"dvaes": dvaes, "priors": priors, "left": left, "pictures": files, "num_pictures": len(pictures)}
    figures |= {"settings": {name: getattr(args, name) for name in ("num_samples", "num_fit_pictures", "prompts")}}
    page.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    page.write_text(render(text, figures), encoding="utf-8")


def read_rows(args: StudyArguments, split: str) -> tuple[list[str], list[Image.Image]]:
    """First captions and pictures of a split; of `train` a sample by the seed."""
    data = load_rows(args.data_dir, split=split)
    chosen = range(len(data))
    if split == "train":
        order = np.random.default_rng(make_seed(args.seed, "scale")).permutation(len(data))
        chosen = sorted(order[: args.num_fit_pictures].tolist())
    captions = read_captions(data, args.caption_column)
    return [captions[row][0] for row in chosen], [open_picture(data[row]["image"]) for row in chosen]


def measure_dvae(args: StudyArguments, name: str, pictures: list[Image.Image]) -> tuple[dict, list[Image.Image]]:
    """Its figures on these pictures, and what it makes of those that are shown."""
    dvae = DalleDVAE.from_pretrained(args.run(name)).eval()
    image_processor = DalleImageProcessor.from_pretrained(args.run(name))
    settings, config = read_yaml(args.config(name)), dvae.config
    pixel_values = image_processor.preprocess(pictures)["pixel_values"]
    decibels, counts, decoded = [], torch.zeros(config.vocab_size), []
    for batch in pixel_values.split(BATCH_SIZE):
        tokens = dvae.encode(batch).tokens
        decoded.append(dvae.decode(tokens).sample)
        decibels.append(psnr(batch, decoded[-1]))
        counts += torch.bincount(tokens.flatten(), minlength=len(counts))
    log_b = fit_scale(args, dvae, image_processor)
    loss = next((words for key, words in LOSSES.items() if settings.get(key)), "logit-Laplace")
    run = describe_run(settings, args.run(name) / "metrics.jsonl")
    figures = {
        **{"name": name, "quantizer": config.quantizer, "loss": loss, "kl_weight": settings.get("kl_weight")},
        **{"updates": run["updates"], "pictures": run["pictures"], "minutes": 60 * run["hours"]},
        "psnr": bootstrap(torch.cat(decibels), args.seed),
        "perplexity": perplexity(counts),
        "codes_used": codes_used(counts),
        "vocab_size": config.vocab_size,
        "num_tokens": dvae.image_grid_size**2,
        "log_b": log_b,
        "fitted": measure_bound(args, dvae, None, pixel_values, log_b=log_b),
        "own": None,
    }
    if loss == "logit-Laplace":
        figures["own"] = measure_bound(args, dvae, None, pixel_values, min_log_b=settings.get("min_log_b"))
    figures["entropy_per_token"] = figures["fitted"]["parts"]["entropy"] / figures["num_tokens"]
    figures["kl_per_token"] = math.log(config.vocab_size) - figures["entropy_per_token"]
    reconstructions = torch.cat(decoded)[spread(len(pictures), args.num_shown)]
    return figures, image_processor.postprocess(reconstructions, output_type="pil")


def fit_scale(args: StudyArguments, dvae: DalleDVAE, image_processor: DalleImageProcessor) -> float:
    """The likeliest constant ln b for pictures of `train`."""
    _, pictures = read_rows(args, "train")
    pixel_values = image_processor.preprocess(pictures)["pixel_values"]
    return torch.cat([logit_errors(dvae, batch) for batch in pixel_values.split(BATCH_SIZE)]).mean().log().item()


def measure_bound(args: StudyArguments, dvae, prior, pixel_values: torch.Tensor, text=(), **scale) -> dict:
    """The bound with its parts, as [`summarize`] gives them."""
    generators = [make_generator(args.seed, "study", row) for row in range(len(pixel_values))]
    settings = {"generator": generators, "num_samples": args.num_samples, **scale}
    return summarize(evidence_lower_bound(dvae, prior, pixel_values, *text, **settings))


def measure_prior(
    args: StudyArguments, name: str, dvaes: dict, pictures: list[Image.Image], captions: list[str]
) -> tuple[dict, list[list[Image.Image]]]:
    """The joint bound of a prior with its dVAE, and pictures of the prompts, a row each."""
    pipe = DALLEPipeline.from_pretrained(args.run(name))
    pipe.set_progress_bar_config(disable=True)
    settings = read_yaml(args.config(name))
    dvae = dvaes[Path(settings["dvae"]).name]
    pixel_values = pipe.image_processor.preprocess(pictures)["pixel_values"]
    encoded = encode_captions(pipe.tokenizer, captions, pipe.prior.config.text_length)
    text = (encoded["input_ids"], encoded["attention_mask"])
    run = describe_run(settings, args.run(name) / "metrics.jsonl")
    figures = {
        **{"name": name, "dvae": dvae["name"], "attention_types": pipe.prior.config.attention_types},
        **{"updates": run["updates"], "pictures": run["pictures"], "minutes": 60 * run["hours"]},
        **{"num_tokens": dvae["num_tokens"], "loss_curve": read_curve(args.run(name) / "metrics.jsonl")},
        "fitted": measure_bound(args, pipe.dvae, pipe.prior, pixel_values, text, log_b=dvae["log_b"]),
    }
    # of the tokens that are stored and drawn, the argmax, as validation_image_loss has it
    figures["image_loss"] = -figures["fitted"]["argmax_parts"]["tokens"] / dvae["num_tokens"]
    drawn = []
    for prompt in args.prompts:
        generators = [make_generator(args.seed, prompt, number) for number in range(args.num_shown)]
        drawn.append(pipe(prompt, num_images_per_prompt=args.num_shown, generator=generators).images)
    return figures, drawn


def read_curve(metrics: Path) -> list[tuple[int, float]]:
    """Updates and validation image loss of a prior's run."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    name = "validation_image_loss"
    return [(row["step"], row[name]) for row in rows if name in row]


# -------------------------------------------------------------------------------------------------------------- words


def describe_choices(figures: dict) -> str:
    """A dVAE in words, as "nearest, L2" or "gumbel, logit-Laplace, KL x 6.6"."""
    words = [figures["quantizer"], figures["loss"]]
    if figures["quantizer"] == "gumbel":
        words.append(f"KL x {figures['kl_weight']:g}" if figures["kl_weight"] else "no KL")
    return ", ".join(words)


def describe_attention(attention_types: list[str]) -> str:
    """Layers in words, as "8 full" or "5 row, 2 column, 1 conv"."""
    return ", ".join(f"{attention_types.count(kind)} {kind}" for kind in dict.fromkeys(attention_types))


def compare(value: float, other: float) -> str:
    """In words how a figure stands to another."""
    return "higher than" if value > other else "lower than" if value < other else "equal to"


def render(template: str, figures: dict) -> str:
    """The page; a `ValueError` where the template asks for what is not there."""
    environment = SandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"choices": describe_choices, "attention": describe_attention}
    environment.globals |= {"compare": compare, "abs": abs}
    try:
        return environment.from_string(template).render(**figures)
    except (TemplateError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"The page cannot be rendered: {error}.") from error

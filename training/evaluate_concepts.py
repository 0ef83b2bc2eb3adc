"""`evaluation: concepts`: does a network recognise concepts and styles of what a checkpoint reconstructs and draws?

What is measured on which pictures, and in which order, is here; the judging network in `judge.py`, the maths in
`hf_dalle.metrics`, tables and pictures in `report.py`. A run that touches a test split is logged before it measures.
The entry is `evaluate.py`; what is measured of any model's pictures lives in `evaluation/`.
"""

import csv
import datetime
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import torch
from arguments import STAGES
from copies import measure_copies
from describe_run import describe_model, describe_stage
from evaluation_log import check_log, digest_checkpoint, log_run
from judge import Judge, extract_features, load_judge, name_judge, reference_features
from PIL import Image
from report import ROWS, write_report
from settings_file import check_names, parse_settings
from tqdm.auto import tqdm

from hf_dalle import DALLEPipeline
from hf_dalle.data import load_rows, open_picture
from hf_dalle.metrics import bootstrap, perplexity, psnr
from hf_dalle.sampling import resolve_settings
from hf_dalle.tokenization_dalle import encode_captions


SIDES = (32, 64)


@dataclass
class ConceptArguments:
    """The settings of `evaluation: concepts`."""

    evaluation: Literal["concepts"] = "concepts"
    name: str = field(default="", metadata={"help": "Of the model, in the report."})
    checkpoint: str = field(default="", metadata={"help": "Folder of the DALLEPipeline."})
    data_dir: str = field(default="", metadata={"help": "Folder with train.parquet and the splits."})
    output_dir: str = field(default="", metadata={"help": "report.json, report.md and the pictures go here."})
    splits: list[str] = field(
        default_factory=lambda: ["validation"],
        metadata={"help": "To measure; `train` is a sample. A test split only on purpose: the run is logged."},
    )
    fold_file: str | None = field(
        default=None,
        metadata={"help": "CSV of hexcode,style: rows of train that trained nothing, to measure as split `fold`."},
    )
    evaluation_log: str | None = field(
        default=None, metadata={"help": "JSON lines, one for each run that touched a split named test..."}
    )
    num_train_pictures: int = field(default=302, metadata={"help": "Sample of train, the same at each run."})
    seed: int = field(default=0, metadata={"help": "Of the sample, the drawings and the intervals."})
    batch_size: int = field(default=32, metadata={"help": "Pictures drawn or reconstructed at a time."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "For the features of training pictures; none: data_dir/.judge."}
    )
    sample_prompts: list[str] | None = field(default=None, metadata={"help": "Captions of samples.png, a row each."})
    num_sample_images: int = field(default=6, metadata={"help": "Pictures a row."})
    dvae_run: str | None = field(default=None, metadata={"help": "output_dir of stage 1, for hours and curve."})
    dvae_config: str | None = field(default=None, metadata={"help": "YAML of stage 1."})
    prior_run: str | None = field(default=None, metadata={"help": "output_dir of stage 2, for hours and curve."})
    prior_config: str | None = field(default=None, metadata={"help": "YAML of stage 2."})
    reranker_run: str | None = field(default=None, metadata={"help": "output_dir of the reranker's training."})
    reranker_config: str | None = field(default=None, metadata={"help": "YAML of the reranker's training."})
    num_processes: dict = field(
        default_factory=dict, metadata={"help": "How many trained a stage together, by its name; else 1."}
    )

    def __post_init__(self):
        for name in ("name", "checkpoint", "data_dir", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is missing.")
        for name in ("num_train_pictures", "batch_size", "num_sample_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected a number from 1.")
        if len(set(self.splits)) < len(self.splits) or "fold" in self.splits:
            raise ValueError(f"`splits` is {self.splits}; expected different ones, and `fold_file` for a fold.")
        if not self.splits and self.fold_file is None:
            raise ValueError("`splits` is empty and there is no `fold_file`: there is nothing to measure.")
        check_log(self.splits, self.evaluation_log)
        check_names(self.num_processes, STAGES, "`num_processes`")
        if any(not isinstance(number, int) or number < 1 for number in self.num_processes.values()):
            raise ValueError(f"`num_processes` is {self.num_processes}; expected whole numbers from 1.")
        for stage in STAGES:
            if getattr(self, f"{stage}_run") and not getattr(self, f"{stage}_config"):
                raise ValueError(f"`{stage}_run` needs `{stage}_config`, which says how many pictures an update has.")


@dataclass
class Split:
    """Rows of one split, in memory; `own` is each row's place in train where it is one of the judge's references."""

    name: str
    pictures: list[Image.Image]
    captions: list[str]
    concepts: list[str]
    styles: list[str]
    own: list[int]

    def __len__(self) -> int:
        return len(self.pictures)


@dataclass
class Made:
    """What a checkpoint makes of a split: B x 3 x H x W in [0, 1] each, and B x N tokens."""

    pixel_values: torch.Tensor
    tokens: torch.Tensor
    reconstructions: torch.Tensor
    drawn: torch.Tensor


def main(argv: list[str]) -> None:
    args = parse_settings(argv, ConceptArguments, "evaluate.py")
    # What can be wrong is found before the run is logged, and logged before a test picture is measured.
    network = load_judge()
    pipe = load_pipeline(args.checkpoint)
    network.to(pipe.device)
    training = describe_stages(args)
    train = load_rows(args.data_dir)
    check_columns(train, "train")
    fold = read_fold(args.fold_file, train) if args.fold_file else []
    sample = choose_sample(train, args.num_train_pictures, args.seed, left_out=fold)
    sources = {name: train if name == "train" else load_rows(args.data_dir, split=name) for name in args.splits}
    for name, rows in sources.items():
        check_columns(rows, name)
    cache_dir = Path(args.cache_dir) if args.cache_dir else Path(args.data_dir) / ".judge"
    references = {side: reference_features(network, train, side, cache_dir) for side in SIDES}
    concepts, styles = train["hexcode"][:], train["style"][:]
    judges = {side: Judge(references[side], concepts, styles, fold, without_probe=sample) for side in SIDES}
    named = {name: rows.select(sample) if name == "train" else rows for name, rows in sources.items()}
    check_judgeable(judges[SIDES[0]], {**named, "fold": train.select(fold)} if fold else named, {"train": sample})
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.output_dir).close()  # a folder that takes no files is found now
    runs = log_run(args.evaluation_log, args.splits, [digest_checkpoint(Path(args.checkpoint))], seed=args.seed)

    splits = {name: read_split(name, rows, sample if name == "train" else None) for name, rows in sources.items()}
    if fold:
        splits["fold"] = read_split("fold", train, fold)
    made = {name: make_pictures(args, pipe, split) for name, split in splits.items()}
    report = {
        "name": args.name,
        "evaluated": datetime.date.today().isoformat(),
        "model": {
            **describe_model(Path(args.checkpoint)),
            "generation": resolve_settings(pipe.prior.generation_config),
        },
        "training": training,
        "data": {"splits": {"train": len(train)} | {name: len(rows) for name, rows in sources.items()}},
        "judge": {"name": name_judge(), "sides": list(SIDES)},
        "dvae": {name: measure_dvae(pipe, made[name], args.seed) for name in splits},
        "splits": {name: measure_split(args, network, judges, pipe, splits[name], made[name]) for name in splits},
        "runs": runs,
    }
    copies, pairs = measure_copies(pipe, train, fold, sample, splits, made, args.batch_size)
    for name, figures in copies.items():
        report["splits"][name]["copies"] = figures
    if args.sample_prompts:
        report["samples"] = {"prompts": args.sample_prompts, "num_images": args.num_sample_images, "seed": args.seed}
    samples = draw(args, pipe, args.sample_prompts or [], args.num_sample_images)
    metrics = {stage: Path(getattr(args, f"{stage}_run")) / "metrics.jsonl" for stage in find_runs(args)}
    write_report(Path(args.output_dir), report, splits, made, pairs, samples, metrics)
    print(f"Written to {args.output_dir}.")


def load_pipeline(checkpoint: str) -> DALLEPipeline:
    """The pipeline, silent, on an accelerator where there is one."""
    if not Path(checkpoint).is_dir():
        raise OSError(f"`checkpoint` is {checkpoint}, which is not a folder: train one, or name another.")
    pipe = DALLEPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def find_runs(args: ConceptArguments) -> list[str]:
    return [stage for stage in STAGES if getattr(args, f"{stage}_run")]


def describe_stages(args: ConceptArguments) -> dict:
    """The report's "training": of each stage what its YAML and its log tell."""
    stages = {}
    for stage in STAGES:
        config = getattr(args, f"{stage}_config")
        if config is not None:
            run = getattr(args, f"{stage}_run")
            run, number = Path(run) if run else None, args.num_processes.get(stage, 1)
            stages[stage] = describe_stage(stage, Path(config), run, f"`{stage}_config`", number)
    return stages


def check_columns(rows: datasets.Dataset, split: str) -> None:
    """Refuses a split without pictures, captions, concepts and styles."""
    for column in ("image", "captions", "hexcode", "style"):
        if column not in rows.column_names:
            raise ValueError(f"Split {split!r} has no column {column!r}; it has {sorted(rows.column_names)}.")


def check_judgeable(judge: Judge, splits: dict[str, datasets.Dataset], own: dict[str, Sequence[int]]) -> None:
    """Refuses a split with a concept or style that the judge has nothing to tell by: it judges blank features."""
    for name, rows in splits.items():
        blank = torch.zeros(len(rows), len(judge.mean))
        try:
            judge.judge(blank, rows["hexcode"][:], rows["style"][:], own=own.get(name), real=blank)
        except ValueError as error:
            raise ValueError(f"Split {name!r} cannot be judged: {error}") from error


def read_fold(path: str, train: datasets.Dataset) -> list[int]:
    """Rows of `train` that a CSV file with the columns hexcode and style names."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if not {"hexcode", "style"} <= {*(reader.fieldnames or ())}:
            raise ValueError(f"`fold_file` {path} starts with {reader.fieldnames}; expected a header hexcode,style.")
        wanted = [(line["hexcode"], line["style"]) for line in reader]
    places = {pair: row for row, pair in enumerate(zip(train["hexcode"][:], train["style"][:], strict=True))}
    unknown = [pair for pair in wanted if pair not in places]
    if unknown or not wanted:
        raise ValueError(f"`fold_file` {path} has {len(wanted)} rows, {len(unknown)} not in train: {unknown[:3]}.")
    return sorted({places[pair] for pair in wanted})


def choose_sample(train: datasets.Dataset, num_pictures: int, seed: int, left_out: Sequence[int] = ()) -> list[int]:
    """Rows of `train`, the same for a seed, of concepts that are shown by another row too."""
    concepts, left_out = np.array(train["hexcode"][:]), set(left_out)
    kept = np.array([row for row in range(len(train)) if row not in left_out])
    names, sizes = np.unique(concepts[kept], return_counts=True)
    rows = kept[np.isin(concepts[kept], names[sizes > 1])]
    if not len(rows):
        raise ValueError("No two training pictures show the same concept (`hexcode`): there is nothing to judge by.")
    chosen = np.random.default_rng(seed).permutation(rows)[:num_pictures]
    return sorted(chosen.tolist())


def read_split(name: str, rows: datasets.Dataset, chosen: Sequence[int] | None) -> Split:
    """The `chosen` rows, or all; of captions the first form."""
    table = rows if chosen is None else rows.select(chosen)
    captions = [caption if isinstance(caption, str) else caption[0] for caption in table["captions"]]
    pictures = [open_picture(image) for image in table["image"]]
    own = list(chosen) if name == "train" else [-1] * len(pictures)
    return Split(name, pictures, captions, table["hexcode"][:], table["style"][:], own)


def batches(items: Sequence, size: int, words: str) -> Iterator[Sequence]:
    """Slices, with a progress bar."""
    for first in tqdm(range(0, len(items), size), desc=words, unit="batch"):
        yield items[first : first + size]


@torch.no_grad()
def make_pictures(args: ConceptArguments, pipe: DALLEPipeline, split: Split) -> Made:
    """Tokens and reconstructions of a split's pictures, and pictures drawn from its captions, one each."""
    pixel_values, tokens, reconstructions = [], [], []
    for pictures in batches(split.pictures, args.batch_size, f"{split.name}: reconstructing"):
        pixel_values.append(pipe.image_processor.preprocess(pictures)["pixel_values"])
        tokens.append(pipe.dvae.encode(pixel_values[-1].to(pipe.device)).tokens.flatten(1))
        reconstructions.append(pipe.decode_tokens(tokens[-1]).clamp(0, 1).cpu())
    drawn = draw(args, pipe, split.captions, words=f"{split.name}: drawing")
    return Made(torch.cat(pixel_values), torch.cat(tokens).cpu(), torch.cat(reconstructions), drawn)


def draw(
    args: ConceptArguments, pipe: DALLEPipeline, captions: list[str], num_images: int = 1, words: str = "samples"
) -> torch.Tensor:
    """B * n x 3 x H x W by the pipeline's default arguments; the seed's pictures whatever the batch size."""
    generator = torch.Generator().manual_seed(args.seed)
    drawn = [torch.empty(0)]
    for batch in batches(captions, max(1, args.batch_size // num_images), words):
        output = pipe(batch, num_images_per_prompt=num_images, generator=generator, output_type="pt")
        drawn.append(output.images.cpu())
    return torch.cat(drawn[1:] or drawn)


def measure_dvae(pipe: DALLEPipeline, made: Made, seed: int) -> dict:
    vocab_size = pipe.dvae.config.vocab_size
    return {
        "num_pictures": len(made.tokens),
        "psnr": bootstrap(psnr(made.pixel_values, made.reconstructions), seed),
        "perplexity": perplexity(torch.bincount(made.tokens.flatten(), minlength=vocab_size)),
        "vocab_size": vocab_size,
    }


def measure_split(args, network, judges: dict[int, Judge], pipe, split: Split, made: Made) -> dict:
    """The judge's figures of a split's three rows at each side, and the prior's loss."""
    pictures = {"real": split.pictures, "reconstructions": made.reconstructions, "drawn": made.drawn}
    sides, concepts = {}, {*next(iter(judges.values())).concepts, *split.concepts}
    for side, judge in judges.items():
        features = {}
        for row in ROWS:
            parts = batches(pictures[row], 64, f"{split.name}: judging {row} at {side} x {side}")
            features[row] = torch.cat([extract_features(network, part, side) for part in parts])
        wanted = (split.concepts, split.styles, split.own, features["real"])
        sides[str(side)] = {row: judge.score(features[row], *wanted, seed=args.seed) for row in ROWS}
    return {
        "num_pictures": len(split),
        "num_concepts": len(concepts),
        "seed": args.seed,
        "sides": sides,
        "image_loss": measure_image_loss(pipe, split, made, args.batch_size),
    }


@torch.no_grad()
def measure_image_loss(pipe: DALLEPipeline, split: Split, made: Made, batch_size: int) -> float:
    """Cross-entropy of the pictures' tokens given their captions, in nats a token."""
    total = 0.0
    for first in range(0, len(split), batch_size):
        tokens = made.tokens[first : first + batch_size].to(pipe.device)
        captions = split.captions[first : first + batch_size]
        text = encode_captions(pipe.tokenizer, captions, pipe.prior.config.text_length).to(pipe.device)
        input_ids = pipe.prior.join_stream(text["input_ids"], text["attention_mask"], tokens)["input_ids"]
        total += pipe.prior(input_ids=input_ids, labels=input_ids).image_loss.item() * len(tokens)
    return total / len(split)

"""What the training loop costs beside the bare step, and how many pictures a worker of the loader decodes a second.

`python benchmarks/train_loop.py --num_threads 1`. Stage 2 on stored tokens runs as `training/train.py` runs it: EMA,
clipping, loader, log. At each of its updates the bare step (forward, backward, AdamW, on a model of its own) takes its
turn with the same batch. How ratios are made lives in `timing.py`.
"""

import argparse
import contextlib
import io
import json
import runpy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import Figure, add_timing_arguments, format_figures, median_ratio, set_threads

from hf_dalle import DallePriorForCausalLM
from hf_dalle.data import CaptionImageDataset, RandomCrop, load_rows


ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "checkpoints" / "emoji-mini"
GOAL = 1.03
ROUND = 10  # updates a round, one row of the log among them


def parse_arguments(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=24, help="pictures an update")
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument(
        "--use_cpu_time", action="store_true", help="of this process, where others keep the cores busy"
    )
    add_timing_arguments(parser)
    args = parser.parse_args(args)
    if args.batch_size < 1 or args.num_rounds < 1:
        parser.error("--batch_size and --num_rounds start at 1.")
    return args


# ---------------------------------------------------------------------------------------------------------- data


def write_pictures(folder: Path, num_pictures: int, size: int, ending: str) -> Path:
    """Smooth noise, which compresses about as photographs do, with captions."""
    rng, rows = np.random.default_rng(0), []
    (folder / "train").mkdir(parents=True)
    for index in range(num_pictures):
        noise = Image.fromarray(rng.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8))
        noise.resize((size, size), Image.Resampling.BICUBIC).save(folder / "train" / f"{index:04d}.{ending}")
        rows.append({"file_name": f"{index:04d}.{ending}", "captions": f"a noto style emoji of thing {index}"})
    (folder / "train" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_store(folder: Path, num_pictures: int) -> Path:
    """A store of tokens of the demo's dVAE, as training reads it."""
    data = write_pictures(folder / "pictures", num_pictures, 96, "png")
    options = ["--dvae", CHECKPOINT / "dvae", "--train_data_dir", data, "--output_dir", folder / "tokens"]
    run_script("precompute_image_tokens")["main"]([str(option) for option in options])
    return folder / "tokens"


def run_script(name: str) -> dict:
    """The names of a script in training/, as it has them when it runs."""
    if str(ROOT / "training") not in sys.path:
        sys.path.insert(0, str(ROOT / "training"))
    return runpy.run_path(str(ROOT / "training" / f"{name}.py"))


# ------------------------------------------------------------------------------------------------------- the loop


def make_timed(kind: type, seconds: dict[str, list[float]], args: argparse.Namespace) -> type:
    """The stage, which lets a bare step take its turn at each update and notes how long both took."""

    read_clock = time.process_time if args.use_cpu_time else time.perf_counter

    class Timed(kind):
        bare: Callable | None = None
        started = 0.0

        def compute_loss(self, model, batch, step):
            now = read_clock()
            if self.bare is None:
                self.bare = make_bare_step(self.model, args.mixed_precision)
            elif self.started:
                seconds["loop"].append(now - self.started)
            stream = self.model.join_stream(batch["input_ids"], batch["attention_mask"], batch["image_tokens"])
            now = read_clock()
            self.bare(stream["input_ids"])
            seconds["bare"].append(read_clock() - now)
            self.started = read_clock()
            return super().compute_loss(model, batch, step)

    return Timed


def make_bare_step(prior: DallePriorForCausalLM, mixed_precision: str) -> Callable[[torch.Tensor], None]:
    """Forward, backward and AdamW, on a copy of `prior`."""
    copy = DallePriorForCausalLM(prior.config)
    copy.load_state_dict(prior.state_dict())
    copy.set_attn_implementation(prior.config._attn_implementation)
    optimizer = torch.optim.AdamW(copy.train().parameters(), lr=1e-4)

    def step(input_ids: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16"):
            loss = copy(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_loop(args: argparse.Namespace, folder: Path, **settings) -> dict[str, list[float]]:
    """Seconds of rounds of updates, in the loop and bare, without the first round."""
    train = run_script("train")
    stages = train["train_prior"]
    original, seconds = stages.PriorStage, {"loop": [], "bare": []}
    settings = {
        "stage": "prior",
        "output_dir": str(folder / f"run-{len(list(folder.glob('run-*')))}"),
        "train_data_dir": str(folder / "tokens"),
        "tokens_column": "image_tokens",
        "dvae": str(CHECKPOINT / "dvae"),
        "tokenizer": str(CHECKPOINT / "tokenizer"),
        "model": {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4},
        "train_batch_size": args.batch_size,
        "max_train_steps": ROUND * (args.num_rounds + 1) + 1,
        "checkpointing_steps": 10**6,
        "validation_steps": 10**6,
        "logging_steps": ROUND,
        "mixed_precision": args.mixed_precision,
        **settings,
    }
    if args.quick:
        settings["model"] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    path = folder / "settings.yaml"
    path.write_text(json.dumps(settings))  # which is YAML too
    stages.PriorStage = make_timed(original, seconds, args)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            train["main"]([str(path)])
    finally:
        stages.PriorStage = original
    rounds = {
        name: [sum(values[first : first + ROUND]) for first in range(ROUND, ROUND * (args.num_rounds + 1), ROUND)]
        for name, values in seconds.items()
    }
    return rounds


def compare(args: argparse.Namespace, folder: Path) -> list[Figure]:
    figures = []
    for words, settings in (
        ("as recipes run it", {}),
        ("without EMA and clipping", {"use_ema": False, "max_grad_norm": None}),
    ):
        rounds = time_loop(args, folder, **settings)
        step = statistics.median(rounds["bare"]) / ROUND
        words = f"the loop, {words} / bare step of {step:.3f} s"
        figures.append(Figure(words, median_ratio(rounds["loop"], rounds["bare"]), GOAL, "1: the step itself"))
    return figures


# --------------------------------------------------------------------------------------------------- the pictures


def measure_reading(args: argparse.Namespace, folder: Path) -> list[Figure]:
    """Rows a second that one worker reads: decoding, the paper's augmentation, a tensor; and stored tokens."""
    num_pictures, size, figures = (8, 64, []) if args.quick else (100, 512, [])
    data = write_pictures(folder / "photographs", num_pictures, size, "jpg")
    choices = {"augmentation": RandomCrop(size // 2, (9 / 8, 12 / 8), do_flip=True)}
    sources = {
        f"{size} x {size} JPEG to {size // 2} x {size // 2}, a second a worker": (data, choices),
        "rows of stored tokens, a second a worker": (folder / "tokens", {"tokens_column": "image_tokens"}),
    }
    for words, (source, options) in sources.items():
        dataset = CaptionImageDataset(load_rows(str(source), None, "train", "image"), **options)
        dataset.read_row(0)
        read_clock = time.process_time if args.use_cpu_time else time.perf_counter
        started = read_clock()
        for row in range(len(dataset)):
            dataset.read_row(row)
        figures.append(Figure(words, f"{len(dataset) / (read_clock() - started):.0f}"))
    return figures


def main(args: list[str] | None = None) -> None:
    """Prints the table; see `--help`."""
    args = parse_arguments(args)
    num_threads = set_threads(args.num_threads)
    print(f"emoji-mini's sizes, {args.batch_size} pictures an update, {args.mixed_precision}, {num_threads} threads\n")
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            write_store(Path(folder), 4 if args.quick else 64)
        figures = [*compare(args, Path(folder)), *measure_reading(args, Path(folder))]
    print(format_figures(figures))


if __name__ == "__main__":
    main()

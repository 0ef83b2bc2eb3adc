"""The dVAE study, piece by piece: `python training/dvae_study.py CONFIG.yaml --do status|next|all|write`.

Which runs there are and which is next is here: dVAEs, the tokenizer, tokens, priors, each a script of its own in a
process of its own, which goes on where it was stopped. What is measured and written is `dvae_study_page.py`'s.
"""

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from arguments import parse_arguments, read_yaml
from dvae_study_page import write_page


SCRIPTS = Path(__file__).parent


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


@dataclass
class Run:
    """One piece of the study: a script with its options, done once its mark is there; `after`: what it reads."""

    name: str
    script: str
    options: list[str]
    config: Path | None = None
    after: "tuple[Run, ...]" = ()

    def command(self) -> list[str]:
        config = [] if self.config is None else [str(self.config)]
        return [sys.executable, str(SCRIPTS / self.script), *config, *self.options]

    def fingerprint(self) -> str:
        """Of script, options and the content of the YAML file; not of what it reads."""
        content = "" if self.config is None else self.config.read_text(encoding="utf-8")
        return hashlib.sha256(json.dumps([self.script, self.options, content]).encode()).hexdigest()


def main(argv: list[str]) -> None:
    args = parse_arguments(argv, StudyArguments, "dvae_study.py")
    runs = list_runs(args)
    if args.do == "write":
        done = [run.name for run in runs if is_done(args, run)]
        write_page(args, done, [run.name for run in runs if run.name not in done])
        print(f"Written to {args.page}.")
        return
    left = [run for run in runs if not is_done(args, run)]
    if args.do == "status":
        for run in runs:
            print(f"{'done' if run not in left else 'left'}  {run.name}")
        return
    for run in left[:1] if args.do == "next" else left:
        print(f"{run.name}: {' '.join(run.command())}", flush=True)
        code = subprocess.run(run.command(), check=False).returncode
        if code:
            raise ValueError(f"{run.name} ended with exit code {code}; the same command goes on with it.")
        mark_done(args, run)
    num_left = max(0, len(left) - 1) if args.do == "next" else 0
    print(f"{num_left} of {len(runs)} runs are left." if num_left else "Nothing is left to run: `--do write`.")


def list_runs(args: StudyArguments) -> list[Run]:
    """All runs in their order: what one reads, an earlier one writes."""
    for name in (*args.dvaes, *args.priors):
        if not args.config(name).is_file():
            raise OSError(f"There is no {args.config(name)}, the settings of {name}.")
    data = ["--train_data_dir", args.data_dir]
    runs = [
        Run(name, "train.py", ["--output_dir", str(args.run(name)), *data], args.config(name)) for name in args.dvaes
    ]
    if not args.priors:
        return runs
    options = ["--train_data", f"{args.data_dir}/train.parquet", "--caption_column", args.caption_column]
    options += ["--vocab_size", str(args.text_vocab_size), "--text_length", str(args.text_length)]
    runs.append(Run("tokenizer", "train_tokenizer.py", [*options, "--output_dir", str(args.run("tokenizer"))]))
    dvaes, of = {name: find_dvae(args, name) for name in args.priors}, {run.name: run for run in runs}
    for dvae in dict.fromkeys(dvaes.values()):
        options = ["--dvae", str(args.run(dvae)), *data, "--splits", "train", "validation"]
        options += ["--output_dir", str(args.run(f"tokens_{dvae}"))]
        of[f"tokens_{dvae}"] = Run(f"tokens_{dvae}", "precompute_image_tokens.py", options, after=(of[dvae],))
        runs.append(of[f"tokens_{dvae}"])
    for name, dvae in dvaes.items():
        options = ["--output_dir", str(args.run(name)), "--train_data_dir", str(args.run(f"tokens_{dvae}"))]
        options += ["--dvae", str(args.run(dvae)), "--tokenizer", str(args.run("tokenizer"))]
        after = (of["tokenizer"], of[dvae], of[f"tokens_{dvae}"])
        runs.append(Run(name, "train.py", options, args.config(name), after))
    return runs


def find_dvae(args: StudyArguments, prior: str) -> str:
    """The dVAE of the study whose tokens a prior is over: the last part of its settings' `dvae`."""
    name = Path(str(read_yaml(args.config(prior)).get("dvae"))).name
    if name not in args.dvaes:
        raise ValueError(f"{args.config(prior)} has `dvae` {name}, which is none of the study's: {args.dvaes}.")
    return name


def find_mark(args: StudyArguments, run: Run) -> Path:
    return args.run("done") / f"{run.name}.json"


def is_done(args: StudyArguments, run: Run) -> bool:
    """Whether a run has ended, by the settings that it and what it reads have now."""
    path = find_mark(args, run)
    if not path.is_file():
        return False
    mark, after = json.loads(path.read_text(encoding="utf-8")), list_fingerprints(run)
    changed = [run.name] if mark["fingerprint"] != run.fingerprint() else []
    changed += [name for name, before in mark.get("after", {}).items() if before != after.get(name)]
    if changed:
        raise ValueError(
            f"{run.name} was run by other settings than there are now, of {', '.join(changed)}. Delete {path} and"
            f" {args.run(run.name)} to run it again."
        )
    return True


def list_fingerprints(run: Run) -> dict[str, str]:
    """Of what a run reads."""
    return {one.name: one.fingerprint() for one in run.after}


def mark_done(args: StudyArguments, run: Run) -> None:
    path = find_mark(args, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    mark = {"fingerprint": run.fingerprint(), "after": list_fingerprints(run), "command": run.command()[1:]}
    beside.write_text(json.dumps(mark), encoding="utf-8")
    beside.replace(path)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"dvae_study.py: {error}")

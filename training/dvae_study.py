"""The dVAE study, piece by piece: `python training/dvae_study.py CONFIG.yaml --do status|next|all|write`.

Which runs there are and which is next is here: dVAEs, the tokenizer, tokens, priors, each a script of its own in a
process of its own, which goes on where it was stopped. What is measured and written is `dvae_study_page.py`'s.
"""

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dvae_study_page import StudyArguments, write_page
from evaluation.pictures import write_whole
from settings_file import parse_settings, read_yaml


SCRIPTS = Path(__file__).parent


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
    args = parse_settings(argv, StudyArguments, "dvae_study.py")
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
    mark = {"fingerprint": run.fingerprint(), "after": list_fingerprints(run), "command": run.command()[1:]}
    write_whole(path, json.dumps(mark))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"dvae_study.py: {error}")

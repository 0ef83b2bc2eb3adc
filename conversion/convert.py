"""`python -m conversion.convert FAMILY SOURCE OUTPUT`: a public checkpoint of the DALL-E family into a folder that
`from_pretrained` loads.

The order of a conversion: read, check, write beside, verify, rename. What a family's checkpoint means lives in
`families/`, reading it safely in `safe_load.py`.
"""

import argparse
import importlib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from .cards import list_dropped, write_card
from .folders import MAX_SHARD_BYTES, write_folder


FAMILIES = {
    "openai-dvae": "openai_dvae",
    "vqgan": "vqgan",
    "dalle-pytorch": "dalle_pytorch",
    "rudalle": "rudalle",
    "mindalle": "mindalle",
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def find_family(name: str) -> ModuleType:
    """The module of a family, with `read_source` and `verify`."""
    return importlib.import_module(f".families.{FAMILIES[name]}", __package__)


def convert(
    family: str,
    source: str | Path,
    output: str | Path,
    do_verify: bool = False,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    form: str | None = None,
) -> list[str]:
    """
    Converts one checkpoint. Nothing is left at `output` unless all of it went well.

    Args:
        family (`str`): one of [`FAMILIES`].
        source (`str` or `Path`): a file or a folder, as the table in README.md says.
        output (`str` or `Path`): a folder that is not there yet, or empty.
        do_verify (`bool`): compare the written folder with the original, or with itself.
        dtype (`str`, *optional*): of all weights; by default as they are stored.
        max_shard_bytes (`int`): of one file of weights.
        form (`str`, *optional*): which form of its family a checkpoint is of, where its files do not tell.

    Returns:
        `list[str]`: what was inferred, left out and measured, a line each.

    Raises:
        OSError: for what cannot be read or written.
        ValueError: for what is refused, does not fit, or is not equal to the original.
    """
    source, output = Path(source), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OSError(f"{output} is there already: name a folder that is not, or empty it.")
    module = find_family(family)
    forms = getattr(module, "FORMS", ())
    if form is not None and form not in forms:
        raise ValueError(f"`--form {form}` is none of {family}, which has {', '.join(forms) or 'one form only'}.")
    conversion = module.read_source(source, form) if forms else module.read_source(source)
    conversion.check()
    conversion.dtype = DTYPES[dtype] if dtype else None
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, so that the last step is a rename: whoever finds the folder finds all of it.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as place:
        folder = Path(place) / output.name
        folder.mkdir()
        write_folder(folder, conversion, max_shard_bytes)
        verification = module.verify(folder, conversion) if do_verify else None
        write_card(folder, conversion, verification)
        if verification is not None:
            verification.raise_for_faults()
        if output.exists():
            output.rmdir()
        shutil.move(folder, output)
    report = [f"inferred: {line}" for line in conversion.inferred]
    for part in conversion.parts.values():
        report += [f"left out: {line}" for line in list_dropped(part.keys)]
    for check in verification.checks if verification is not None else ():
        report.append(f"verified against {verification.against}: {check.what}: {check.value:.3g}")
    return report


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m conversion.convert", description=__doc__.split("\n\n")[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("source", type=Path, help="file or folder of the checkpoint, see conversion/README.md")
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--verify", action="store_true", help="compare with the original's code, or with itself")
    parser.add_argument("--dtype", choices=DTYPES, help="of all weights; by default as they are stored")
    parser.add_argument("--max_shard_bytes", type=int, default=MAX_SHARD_BYTES, help="of one file of weights")
    parser.add_argument("--form", help="of a ruDALL-E prior whose file does not tell it")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the exit code."""
    options = parse_arguments(arguments)
    try:
        report = convert(
            options.family,
            options.source,
            options.output,
            options.verify,
            options.dtype,
            options.max_shard_bytes,
            options.form,
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join([*report, f"{options.output} is written."]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The card of a converted folder: where it comes from, whose terms hold, what was converted, how exact it is.

Every figure in it is measured or counted by the conversion that writes it.
"""

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import ModelCard, ModelCardData

import hf_dalle

from .folders import Conversion
from .key_map import KeyMap


RECORD_FILE = "conversion.json"
_CARD_TAGS = ["dall-e", "dalle", "hf_dalle", "converted"]
_MOST_NAMES = 8


class Check(NamedTuple):
    """
    A figure of `--verify`.

    Args:
        what (`str`): what is compared.
        value (`float`): the largest difference found, or how many differ.
        limit (`float`): what it may be.
    """

    what: str
    value: float
    limit: float


class Verification(NamedTuple):
    """
    What `--verify` found.

    Args:
        against (`str`): "DALL-E 0.1", or what a self-check compares.
        checks (`list[Check]`): the figures.
    """

    against: str
    checks: list[Check]

    def raise_for_faults(self) -> None:
        """Raises `ValueError` naming each figure beyond its limit."""
        # not `>`: a figure may be NaN
        faults = [check for check in self.checks if not check.value <= check.limit]
        if faults:
            words = "; ".join(f"{check.what}: {check.value:g}, at most {check.limit:g}" for check in faults)
            raise ValueError(f"The converted model is not equal to {self.against}: {words}.")


def write_card(folder: Path, conversion: Conversion, verification: Verification | None) -> None:
    """
    Writes README.md and conversion.json.

    Args:
        folder (`Path`): with its parts written.
        conversion ([`Conversion`]): what was converted.
        verification ([`Verification`], *optional*): of the files in `folder`.
    """
    is_pipeline = "" not in conversion.parts
    facts = conversion.facts
    record = make_record(conversion, verification)
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    data = ModelCardData(
        license=facts.license,
        license_name=facts.license_name,
        license_link=facts.license_link,
        language=facts.language,
        library_name="diffusers",
        pipeline_tag="text-to-image" if is_pipeline else None,
        tags=_CARD_TAGS,
    )
    sources = [f"- `{file['name']}`, {file['bytes']:,} bytes, SHA-256 `{file['sha256']}`" for file in record["files"]]
    name = "DALLEPipeline" if is_pipeline else type(conversion.parts[""].content).__name__
    loaded = f'from hf_dalle import {name}\n\nmodel = {name}.from_pretrained("path/to/this/folder")'
    dropped = [line for part in conversion.parts.values() for line in list_dropped(part.keys)]
    sections = [
        f"# {facts.title}, for Hugging Face",
        f"{facts.origin} Converted by hf-dalle {hf_dalle.__version__}; nothing was trained.",
        "## Licence",
        facts.license_words,
        "## Use",
        f"```py\n{loaded}\n```",
        "## What was converted",
        "\n".join(sources),
        "\n".join(_describe_parts(record)),
        *_list_section("What was left out", dropped),
        *_list_section("What no file says, and how it was found", conversion.inferred),
        *_list_section("What differs from the original", facts.notes),
        "## Parity",
        _describe_parity(verification),
    ]
    text = "\n\n".join(sections)
    (folder / "README.md").write_text(str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")), encoding="utf-8")


def make_record(conversion: Conversion, verification: Verification | None) -> dict:
    """Everything that a card says or sums up, for programs."""
    parts = {}
    for name, part in conversion.parts.items():
        parts[name or "model"] = {"class": type(part.content).__name__}
        if part.keys is not None:
            shapes = part.keys.target.values()
            parts[name or "model"] |= {
                "parameters": sum(shape.numel() for shape in shapes),
                "dtype": str(conversion.find_dtype(name)).removeprefix("torch."),
                "used_keys": len({source for rule in part.keys.rules for source in rule.sources}),
                "dropped_keys": part.keys.dropped,
            }
            if part.keys.beside:
                parts[name or "model"]["dropped_beside"] = part.keys.beside
    return {
        "converted_by": f"hf-dalle {hf_dalle.__version__}",
        "files": [
            {"name": path.name, "bytes": path.stat().st_size, "sha256": hash_file(path)} for path in conversion.files
        ],
        "parts": parts,
        "inferred": conversion.inferred,
        "verification": None if verification is None else _record_verification(verification),
    }


def hash_file(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def list_dropped(keys: KeyMap | None) -> list[str]:
    """What was left out, a line for each reason."""
    names = defaultdict(list)
    for name, reason in (*keys.dropped.items(), *keys.beside.items()) if keys is not None else ():
        names[reason].append(f"`{name}`")
    return [
        f"{reason}: {', '.join(dropped[:_MOST_NAMES])}"
        + (f" and {len(dropped) - _MOST_NAMES} more, which {RECORD_FILE} lists" if len(dropped) > _MOST_NAMES else "")
        for reason, dropped in names.items()
    ]


def _describe_parts(record: dict) -> list[str]:
    lines = ["| part | class | parameters | weights | keys used | left out |", "|---|---|---|---|---|---|"]
    for name, part in record["parts"].items():
        figures = ["", "", "", ""]
        if "dtype" in part:
            figures = [f"{part['parameters']:,}", part["dtype"], part["used_keys"], len(part["dropped_keys"])]
        lines.append(f"| {name} | `{part['class']}` | {' | '.join(map(str, figures))} |")
    return lines


def _list_section(title: str, lines: list[str]) -> list[str]:
    return [f"### {title}", "\n".join(f"- {line}" for line in lines)] if lines else []


def _describe_parity(verification: Verification | None) -> str:
    if verification is None:
        return (
            "Not measured on this checkpoint: convert with `--verify`. `make test-parity` holds the converter against"
            " the original's code under random weights."
        )
    lines = [f"Measured on this checkpoint against {verification.against}.", ""]
    lines += ["| | found | at most |", "|---|---|---|"]
    lines += [f"| {check.what} | {check.value:.3g} | {check.limit:.3g} |" for check in verification.checks]
    return "\n".join(lines)


def _record_verification(verification: Verification) -> dict:
    checks = [check._asdict() for check in verification.checks]
    return {"against": verification.against, "checks": checks}

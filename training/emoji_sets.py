"""The open emoji sets that emoji-mini learns from, whom to credit, and how they and the emoji's names are fetched.

npm packages of exact versions, kept as .tgz. How pictures are drawn from them lives in `emoji_drawings.py`, which of
them train and which measure in `prepare_emoji.py`.
"""

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple


NAMES_PACKAGE = ("emojibase-data", "17.0.0")
# Groups of emojibase that hold no concept: bare skin tones and hair, and flags. Regional indicators have no group.
DROPPED_GROUPS = ("component", "flags")


class EmojiSet(NamedTuple):
    """One open emoji set: where it comes from, how captions name its style, whom to credit."""

    style: str
    package: str
    version: str
    phrase: str
    phrase_ko: str
    credit: str
    license: str


# Those that measurements know; after them those that only add to training.
EMOJI_SETS = (
    EmojiSet(
        "noto", "@iconify-json/noto", "1.2.9", "a noto", "노토",
        "[Noto Emoji](https://github.com/googlefonts/noto-emoji) by Google",
        "[Apache-2.0](https://github.com/googlefonts/noto-emoji/blob/main/LICENSE)",
    ),
    EmojiSet(
        "twemoji", "@iconify-json/twemoji", "1.2.5", "a twemoji", "트위모지",
        "[Twemoji](https://github.com/jdecked/twemoji) by Twitter, Inc. and other contributors",
        "[CC-BY-4.0](https://creativecommons.org/licenses/by/4.0/)",
    ),
    EmojiSet(
        "openmoji", "@iconify-json/openmoji", "1.2.29", "an outlined openmoji", "외곽선 오픈모지",
        "[OpenMoji](https://openmoji.org), the open-source emoji and icon project",
        "[CC-BY-SA-4.0](https://creativecommons.org/licenses/by-sa/4.0/)",
    ),
    EmojiSet(
        "fluent-flat", "@iconify-json/fluent-emoji-flat", "1.2.6", "a flat fluent", "플랫 플루언트",
        "[Fluent Emoji](https://github.com/microsoft/fluentui-emoji) by Microsoft",
        "[MIT](https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE)",
    ),
    EmojiSet(
        "fluent-3d", "@lobehub/fluent-emoji-3d", "1.1.0", "a glossy 3d", "반짝이는 3d",
        "[Fluent Emoji](https://github.com/microsoft/fluentui-emoji) by Microsoft, "
        "packed by [LobeHub](https://github.com/lobehub/fluent-emoji)",
        "[MIT](https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE)",
    ),
)  # fmt: skip
MORE_EMOJI_SETS = (
    EmojiSet(
        "noto-v1", "@iconify-json/noto-v1", "1.2.5", "a blob noto", "블롭 노토",
        "[Noto Emoji](https://github.com/googlefonts/noto-emoji) by Google, its first version",
        "[Apache-2.0](https://github.com/googlefonts/noto-emoji/blob/main/svg/LICENSE)",
    ),
    EmojiSet(
        "emojione", "@iconify-json/emojione", "1.2.3", "an emojione", "이모지원",
        "[EmojiTwo](https://github.com/EmojiTwo/emojitwo), EmojiOne 2.3 by Emoji One",
        "[CC-BY-4.0](https://creativecommons.org/licenses/by/4.0/)",
    ),
    EmojiSet(
        "emojione-v1", "@iconify-json/emojione-v1", "1.2.3", "an early emojione", "초기 이모지원",
        "[EmojiOne](https://github.com/joypixels/emojione-legacy) 1.5 by Emoji One",
        "[CC-BY-SA-4.0](https://creativecommons.org/licenses/by-sa/4.0/)",
    ),
    EmojiSet(
        "fxemoji", "@iconify-json/fxemoji", "1.2.2", "a firefox", "파이어폭스",
        "[Firefox OS Emoji](https://github.com/mozilla/fxemoji) by Mozilla",
        "[Apache-2.0](https://mozilla.github.io/fxemoji/LICENSE.md)",
    ),
    EmojiSet(
        "streamline", "@iconify-json/streamline-emojis", "1.2.4", "a streamline", "스트림라인",
        "[Streamline Emojis](https://github.com/webalys-hq/streamline-vectors) by Streamline",
        "[CC-BY-4.0](https://creativecommons.org/licenses/by/4.0/)",
    ),
)  # fmt: skip


# How a README credits what is written about emoji.
NAMES_CREDIT = f"""`{NAMES_PACKAGE[0]}` {NAMES_PACKAGE[1]} by Miles Johnson
([MIT](https://github.com/milesj/emojibase/blob/master/LICENSE)), from [Unicode CLDR](https://cldr.unicode.org)
([Unicode-3.0](https://www.unicode.org/license.txt))."""


class Concept(NamedTuple):
    """What an emoji shows, whoever draws it; `hexcode` as emojibase writes it."""

    hexcode: str
    name_ko: str
    tags: tuple[str, ...]
    group: str


def fetch_package(package: str, package_version: str, cache_dir: Path) -> dict[str, bytes]:
    """Reads an npm package, from `cache_dir` or else by `npm pack`.

    Args:
        package: Name in the npm registry.
        package_version: The exact version.
        cache_dir: Folder of the .tgz files.

    Returns:
        The contents of its .json and .webp files by their path inside the package.

    Raises:
        ValueError: The .tgz is damaged or is another package or version.
        OSError: npm is missing or cannot fetch it.
    """
    path = cache_dir / f"{package.removeprefix('@').replace('/', '-')}-{package_version}.tgz"
    if not path.is_file():
        pack_package(f"{package}@{package_version}", path)
    try:
        with tarfile.open(path, "r:gz") as archive:
            files = {
                member.name.partition("/")[2]: archive.extractfile(member).read()
                for member in archive
                if member.isfile() and member.name.endswith((".json", ".webp"))
            }
        manifest = json.loads(files["package.json"])
    except (tarfile.TarError, EOFError, KeyError, OSError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} is no whole npm package ({error}): delete it and run again") from error
    found = (manifest.get("name"), manifest.get("version"))
    if found != (package, package_version):
        wanted = f"{package} {package_version}"
        raise ValueError(f"{path} holds {found[0]} {found[1]}, expected {wanted}: delete it and run again to fetch it")
    return files


def pack_package(spec: str, path: Path) -> None:
    """Fetches one package (`name@version`) with npm to `path`; a broken fetch leaves nothing there."""
    npm = shutil.which("npm")
    by_hand = f"make it on another machine by `npm pack {spec}` and copy the .tgz to {path}"
    if npm is None:
        raise OSError(f"npm, which fetches {spec}, was not found: install Node.js (https://nodejs.org), or {by_hand}")
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {spec}", flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [npm, "pack", spec, "--pack-destination", folder]
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        packed = list(Path(folder).glob("*.tgz"))
        if result.returncode or len(packed) != 1:
            reason = "\n".join(result.stderr.strip().splitlines()[-8:])
            raise OSError(f"npm could not fetch {spec}:\n{reason}\nCheck the network and run again, or {by_hand}")
        os.replace(packed[0], path)


def read_concepts(files: dict[str, bytes]) -> list[Concept]:
    """Reads emojibase-data: every emoji without a skin tone that is no flag or component, in Unicode's order."""
    groups = json.loads(files["meta/groups.json"])["groups"]
    names_ko = {entry["hexcode"]: entry["label"] for entry in json.loads(files["ko/data.json"])}
    concepts = []
    # Skin tones are listed inside their emoji ("skins"), so the top level is free of them.
    for entry in json.loads(files["en/data.json"]):
        group = groups.get(str(entry.get("group")))
        if group is not None and group not in DROPPED_GROUPS:
            tags = tuple(entry.get("tags", ()))
            concepts.append((entry["order"], Concept(entry["hexcode"], names_ko[entry["hexcode"]], tags, group)))
    return [concept for _, concept in sorted(concepts, key=lambda pair: pair[0])]


def normalize_hexcode(hexcode: str) -> str:
    """Drops what sets spell differently: case, variation selectors (FE0F) and zero-width joiners (200D)."""
    return "-".join(part for part in hexcode.upper().split("-") if part not in ("FE0F", "200D"))

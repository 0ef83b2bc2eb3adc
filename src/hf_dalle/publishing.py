"""A saved pipeline as a folder, and its way to the Hub: whether it is whole, its card, one commit for all of it.

How a card is rendered from measured figures lives in `model_card.py`; what each part saves is its own.
"""

import fnmatch
import json
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    hf_hub_download,
)
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import httpx
from safetensors import SafetensorError, safe_open


PROCESSOR_FILE = "processor_config.json"  # at a repository's root: what `AutoProcessor` looks for
CODE_MODULE = "dalle_code"
CARD_TAGS = ["dall-e", "dalle", "vq-vae", "hf_dalle"]
_NEEDED_FILES = {
    "prior": ["config.json", "*.safetensors"],
    "dvae": ["config.json", "*.safetensors"],
    "tokenizer": ["tokenizer.json", "tokenizer_config.json"],
    "image_processor": ["preprocessor_config.json"],
}
_HUB_ARGUMENTS = ("repo_id", "commit_message", "private", "token", "create_pr")


class DallePublishingMixin:
    """What a pipeline of parts saves beside them, and how it is published. [`DALLEPipeline`] inherits from it."""

    # what the mixin stands on; the pipeline's other bases have it
    image_processor: Any
    config: Any
    components: dict[str, Any]
    _check_no_adapters: Callable[[], None]

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        safe_serialization: bool = True,
        push_to_hub: bool = False,
        do_save_code: bool = False,
        **kwargs,
    ) -> None:
        """
        As [`DiffusionPipeline.save_pretrained`], with a file that lets `AutoProcessor` load the folder.

        Args:
            save_directory (`str` or `Path`): the folder; it is made if it is not there.
            safe_serialization (`bool`, *optional*, defaults to `True`): weights as safetensors; there is no other way.
            do_save_code (`bool`, *optional*, defaults to `False`):
                Save this package's code with it: `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` then
                loads it where the package is not installed. It is needed where the package is, too.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                Publish the folder too, under `repo_id` (by default the folder's name) and with the other arguments of
                [`~DallePublishingMixin.push_to_hub`].

        Raises:
            OSError: if the Hub refuses; of a refused token nothing is saved.
            ValueError: if `safe_serialization` is `False`, or there are adapters; nothing is saved or made then.
        """
        _check_format(safe_serialization)
        hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
        folder = Path(save_directory)
        if push_to_hub:
            repo_id = hub.pop("repo_id", folder.resolve().name)
            access = {name: hub[name] for name in ("token", "private", "create_pr") if name in hub}
            repo_id = prepare_repository(repo_id, **access)
        super().save_pretrained(save_directory, safe_serialization=True, **kwargs)  # type: ignore[misc]  # a mixin's
        self.save_processor_config(folder)
        if do_save_code:
            self._save_code(folder)
        if push_to_hub:
            hub.pop("private", None)
            self._publish(folder, repo_id, **hub)

    def save_processor_config(self, save_directory: str | Path) -> None:
        """Saves what `AutoProcessor` looks for at a repository's root; `save_pretrained` does."""
        image_processor = {"image_processor": self.image_processor.to_dict(), "processor_class": "DalleProcessor"}
        text = json.dumps(image_processor, indent=2, sort_keys=True) + "\n"
        (Path(save_directory) / PROCESSOR_FILE).write_text(text, encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        do_save_code: bool = False,
    ) -> CommitInfo:
        """
        Publishes the pipeline, in one commit: nobody downloads half of it, and a push that was cut is made whole by
        the next one, which sends only what is missing.

        Its card is that of the folder or repository that the pipeline was loaded from, with the pictures it shows. If
        that has none, the card that `repo_id` has stays, and a repository without one gets a plain one.

        Args:
            repo_id (`str`): as "me/emoji-mini", or "emoji-mini" in your own namespace; made if it is not there.
            commit_message (`str`, *optional*, defaults to `"Upload DALLEPipeline"`): of the commit.
            private (`bool`, *optional*): whether a new repository is private; an old one stays as it is.
            token (`str`, *optional*): of the Hub, by default the one that `hf auth login` or HF_TOKEN set.
            create_pr (`bool`, *optional*, defaults to `False`): open a pull request instead.
            safe_serialization (`bool`, *optional*, defaults to `True`): weights as safetensors; there is no other way.
            variant (`str`, *optional*): in the names of the weights, as "fp16", beside those without.
            max_shard_size (`int` or `str`, *optional*): of one file of weights, as "5GB".
            do_save_code (`bool`, *optional*, defaults to `False`): see [`~DallePublishingMixin.save_pretrained`].

        Returns:
            `CommitInfo`: a string, the commit's address; `pr_url` is the pull request's.

        Raises:
            OSError: if the token is refused (nothing is written then), or the upload is cut.
            ValueError:
                If `safe_serialization` is `False`, or there are adapters (no repository is made then), or the Hub does
                not take the card's metadata.
        """
        _check_format(safe_serialization)
        self._check_no_adapters()  # saving will, too late: `DalleLoraLoaderMixin` has it
        repo_id = prepare_repository(repo_id, token=token, private=private, create_pr=create_pr)
        with tempfile.TemporaryDirectory(prefix="hf-dalle-") as folder:
            self.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size, do_save_code=do_save_code)
            return self._publish(Path(folder), repo_id, commit_message, token, create_pr)

    def register_to_config(self, **kwargs) -> None:
        """As [`ConfigMixin.register_to_config`]; a folder loaded from stays that one wherever the process goes."""
        source = kwargs.get("_name_or_path")
        if source is not None and Path(source).is_dir():
            kwargs["_name_or_path"] = str(Path(source).resolve())
        super().register_to_config(**kwargs)  # type: ignore[misc]  # a mixin's

    def _save_code(self, folder: Path) -> None:
        # Diffusers runs one file, having copied it and what it imports itself into one flat package,
        # `diffusers_modules.local`. So the package's `__init__` gets to import every module; a component's file, of
        # which diffusers downloads no other, finds its class in what is there by then.
        sources = {path.stem: path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py")}
        needed, found = ["__init__"], set()
        while needed:
            if (name := needed.pop()) not in found:
                found.add(name)
                needed += re.findall(r"^from \.(\w+) import", sources[name], re.MULTILINE)
        modules = sorted(found - {"__init__"})
        texts = {f"{name}.py": sources[name] for name in modules}
        all_of_them = "".join(f"from .{name} import __name__ as _{name}  # noqa\n" for name in modules)
        texts[f"{CODE_MODULE}.py"] = f"{sources['__init__']}\n{all_of_them}"
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        index["_class_name"] = [CODE_MODULE, index["_class_name"]]
        for name, part in self.components.items():
            package, _, module = type(part).__module__.rpartition(".")
            if package == __package__ and index[name][0] is not None:  # a safety checker is not saved
                index[name] = [f"dalle_{name}", type(part).__name__]
                line = f"from diffusers_modules.local.{module} import {type(part).__name__}  # noqa\n"
                texts[f"{name}/dalle_{name}.py"] = line
        texts["model_index.json"] = json.dumps(index, indent=2, sort_keys=True) + "\n"
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")

    def _publish(
        self,
        folder: Path,
        repo_id: str,
        commit_message: str | None = None,
        token: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        files: dict[str, Path | bytes] = {**list_files(folder)}
        if "README.md" not in files:
            files.update(self._find_card(repo_id, token))
        message = commit_message or f"Upload {type(self).__name__}"
        return push_files(files, repo_id, message, token=token, create_pr=create_pr)

    def _find_card(self, repo_id: str, token: str | None) -> dict[str, Path | bytes]:
        """The card and its pictures as files of the repository; nothing where that has a card that stays."""
        source = self.config.get("_name_or_path")
        # A folder that is gone is none, or a stranger's card would come along.
        is_repository = source is not None and not Path(source).is_absolute() and not Path(source).exists()
        if is_repository or (source is not None and Path(source).is_dir()):
            files = read_card(source, repo_id, token)
            if files:
                return {**files}
        with in_one_line(repo_id):
            if HfApi().file_exists(repo_id, "README.md", token=token):
                return {}
        base_model = str(source) if is_repository and source != repo_id else None
        return {"README.md": str(make_plain_card(self, repo_id, base_model)).encode()}


def _check_format(safe_serialization: bool) -> None:
    if not safe_serialization:  # transformers would save safetensors all the same, diffusers would not
        raise ValueError(
            "`safe_serialization=False` would save pickles, which no `DALLEPipeline` loads: leave it out."
        )


# ---------------------------------------------------------------------------------------------------------- the folder


def check_folder(folder: Path, given: Collection[str]) -> None:
    """Raises an `OSError` that names the file where a saved pipeline lacks one, or one is cut short."""
    needed = [f"{part}/{name}" for part, names in _NEEDED_FILES.items() if part not in given for name in names]
    for name in ["model_index.json", *needed]:
        if not any(folder.glob(name)):
            raise OSError(f"{folder / name} is missing: {folder} is not a whole `DALLEPipeline`.")
    for path in folder.glob("*/*"):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass  # opening compares the header with the file's length
        except (ValueError, SafetensorError) as error:
            raise OSError(f"{path} is damaged or cut short ({error}). Copy or download it again.") from error


def list_files(folder: Path, ignore: Collection[str] = ()) -> dict[str, Path]:
    """
    The files of a folder under their paths in a repository, hidden ones left out.

    Args:
        folder (`Path`): the folder.
        ignore (`Collection[str]`): patterns of paths that are left out too, as "logs/*".
    """
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: path
        for name, path in paths.items()
        if not any(part.startswith(".") for part in name.split("/"))
        and not any(fnmatch.fnmatch(name, pattern) for pattern in ignore)
    }


# ------------------------------------------------------------------------------------------------------------ the card


def read_card(source: str | Path, repo_id: str, token: str | None = None) -> dict[str, bytes]:
    """
    The card of a folder or repository, and the pictures it shows, for publishing as `repo_id`.

    Args:
        source (`str` or `Path`): a folder, or the name of a repository.
        repo_id (`str`): what the card's code shall load.
        token (`str`, *optional*): of the Hub.

    Returns:
        `dict[str, bytes]`: the content of each file; empty if `source` has no card, or cannot be reached.

    Raises:
        ValueError: if the card is not UTF-8.
    """
    card = _read_file(source, "README.md", token)
    if card is None:
        return {}
    try:
        text = card.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"The README.md of {source} is not UTF-8 ({error}): save it as such.") from error
    if "load_lora_weights" not in text:  # there the pipeline is another one, which the adapter belongs to
        call = r'(\b(?:DALLE|Diffusion)Pipeline\.from_pretrained\()"[^"]*"'
        text = re.sub(call, rf'\g<1>"{repo_id}"', text, count=1)
    shown = re.findall(r"!\[[^\]]*\]\(([\w./-]+)\)|^\s*(?:-\s+)?url:\s*['\"]?([\w./-]+)", text, re.MULTILINE)
    pictures = {name: _read_file(source, name, token) for pair in shown for name in pair if name}
    return {"README.md": text.encode(), **{name: data for name, data in pictures.items() if data is not None}}


def _read_file(source: str | Path, name: str, token: str | None) -> bytes | None:
    if Path(source).is_dir():
        path = Path(source, name)
        return path.read_bytes() if path.is_file() and path.resolve().is_relative_to(Path(source).resolve()) else None
    try:
        return Path(hf_hub_download(str(source), name, token=token)).read_bytes()
    except (OSError, ValueError, httpx.HTTPError):  # not there, no repository, or not reached
        return None


def make_plain_card(pipe: Any, repo_id: str, base_model: str | None = None) -> ModelCard:
    """
    A card without figures, for a pipeline that came without one: what it is, how it is used, its sizes.

    Args:
        pipe ([`DALLEPipeline`]): the pipeline.
        repo_id (`str`): where it is published.
        base_model (`str`, *optional*): the repository that it was loaded from.
    """
    data = ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=CARD_TAGS, base_model=base_model)
    prior, dvae = pipe.prior.config, pipe.dvae.config
    grid = f"{prior.image_grid_size} x {prior.image_grid_size}"
    lines = [
        f"# {repo_id.split('/')[-1]}",
        "A DALL-E ([Ramesh et al., 2021](https://arxiv.org/abs/2102.12092)), which draws pictures from captions with"
        " the library hf-dalle.",
        "```python\nfrom hf_dalle import DALLEPipeline\n\n"
        f'pipe = DALLEPipeline.from_pretrained("{repo_id}")\nimage = pipe("a caption").images[0]\n```',
        f"- dVAE: pictures of {dvae.sample_size} x {dvae.sample_size} to {grid} tokens out of {dvae.vocab_size:,};"
        f" {pipe.dvae.num_parameters():,} parameters.",
        f"- Prior: {prior.num_hidden_layers} layers, {prior.hidden_size} wide; {prior.text_length} text positions;"
        f" {pipe.prior.num_parameters():,} parameters.",
        "What it was trained on, its licence and its limits are still to be written here.",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(lines) + "\n")


# ------------------------------------------------------------------------------------------------------------- the Hub


def check_token(repo_id: str, token: str | None = None) -> None:
    """
    Asks the Hub whose token it is; nothing is made.

    Args:
        repo_id (`str`): what the errors name.
        token (`str`, *optional*): by default the one that `hf auth login` or HF_TOKEN set.

    Raises:
        OSError: if there is no token, it is refused, or the Hub is not reached.
    """
    with in_one_line(repo_id):
        try:
            HfApi().whoami(token=token)
        except LocalTokenNotFoundError as error:
            raise OSError(
                f"There is no token for {constants.ENDPOINT}, which {repo_id} would be published with: run"
                " `hf auth login`, set HF_TOKEN, or give one."
            ) from error


def prepare_repository(
    repo_id: str, token: str | None = None, private: bool | None = None, create_pr: bool = False
) -> str:
    """
    Makes the repository if it is not there, and asks whether the token may write to it: before work, not after.

    Args:
        repo_id (`str`): as "me/emoji-mini", or "emoji-mini" in the token's own namespace.
        token (`str`, *optional*): by default the one that `hf auth login` or HF_TOKEN set.
        private (`bool`, *optional*): whether a new repository is private.
        create_pr (`bool`): whether only a pull request will be made, to a repository that may be anybody's.

    Returns:
        `str`: the whole name.

    Raises:
        OSError: if there is no token, it is refused, may not write there, or the Hub is not reached.
        ValueError: if `repo_id` cannot be a name.
    """
    check_token(repo_id, token)
    api = HfApi()
    with in_one_line(repo_id):
        repo_id = api.create_repo(repo_id, token=token, private=private, exist_ok=True).repo_id
        if not create_pr:
            api.auth_check(repo_id, token=token, write=True)
    return repo_id


def push_files(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    commit_message: str,
    token: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """
    Publishes files in one commit, which takes away weights that those of the same name and variant replace.

    Args:
        files (`Mapping[str, Path | bytes]`): a file or its content for each path in the repository.
        repo_id (`str`): the whole name, from [`prepare_repository`].
        commit_message (`str`): of the commit.
        token (`str`, *optional*): of the Hub.
        create_pr (`bool`): open a pull request instead.

    Returns:
        `CommitInfo`: a string, the commit's address.

    Raises:
        OSError: if the upload is refused or cut: it is visible as a whole or not at all, and pushed again completed.
        ValueError: if the Hub does not take the metadata of a README.md among the files.
    """
    api = HfApi()
    with in_one_line(repo_id):
        # A shard that an earlier push left would be loaded in place of a new single file, or the other way round.
        kinds = {_kind_of_weights(name) for name in files} - {None}
        old = [name for name in api.list_repo_files(repo_id, token=token) if name not in files]
        operations = [CommitOperationDelete(name) for name in old if _kind_of_weights(name) in kinds]
        operations += [CommitOperationAdd(name, file) for name, file in files.items()]
        # Not upload_folder: it commits a slow upload in pieces, and the first is downloaded as if it were all.
        return api.create_commit(repo_id, operations, commit_message=commit_message, token=token, create_pr=create_pr)


def _kind_of_weights(name: str) -> str | None:
    """The name without the number of a shard; None of what holds no weights."""
    if match := re.fullmatch(r"(.+)\.safetensors\.index(\.\w+)?\.json", name):
        return f"{match.group(1)}{match.group(2) or ''}"
    match = re.fullmatch(r"(.+?)(-\d{5}-of-\d{5})?\.safetensors", name)
    return match.group(1) if match else None


@contextmanager
def in_one_line(repo_id: str) -> Iterator[None]:
    """Turns what the Hub's client raises inside the block into one line that says what to do."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = " ".join((error.server_message or str(error)).split())
        if status == 401:
            advice = "the token is wrong or expired: make one at https://huggingface.co/settings/tokens"
        elif status == 403:
            advice = "the token may not write there: it needs the permission, and you the namespace"
        elif status == 404:
            advice = "there is no such repository, or the token may not see it"
        elif 400 <= status < 500 and status not in (408, 409, 429):
            advice = "the Hub does not take it as it is"
        else:
            advice = "it is visible as a whole or not at all; the same push completes it"
        raise OSError(f"{constants.ENDPOINT} refused {repo_id} ({status}: {said}): {advice}.") from error
    except (httpx.HTTPError, RuntimeError) as error:
        cause = error.__cause__ or error  # an upload's thread wraps what happened to its file
        reason = " ".join(f"{error} {cause if cause is not error else ''}".split()) or type(error).__name__
        raise OSError(
            f"{constants.ENDPOINT} was not reached, or was cut off, for {repo_id} ({reason}): it is visible as"
            " a whole or not at all; the same push completes it."
        ) from error
    except ValueError as error:  # of a name, or of a card's metadata: a list of faults, one a line
        raise ValueError(" ".join(str(error).split())) from error

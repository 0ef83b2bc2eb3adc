"""Publishing to a real server: what a push brings, what a cut one leaves, what is refused; `train.py --push_to_hub`.

One process is killed in the middle of its upload, then another one pushes all that the tests of the first part look
at, and completes it.
"""

import json
import subprocess
import sys

import pytest
from hub_server import Cut, HubServer, client_environment, run_client, start_client
from huggingface_hub import ModelCard
from PIL import Image
from tiny import build_pipeline
from tiny_training import (
    ROOT,
    VALIDATION,
    build_home,
    build_prior_settings,
    dvae_settings,
    run,
    write_data,
    write_settings,
)

from hf_dalle import DalleDVAE, DALLEPipeline
from hf_dalle.publishing import list_files


CARD = """---
license: cc-by-sa-4.0
library_name: diffusers
widget:
- text: a red fox
  output:
    url: grids/widget.png
---

# emoji-mini

![Drawn](samples.png) ![Not there](missing.png) ![Elsewhere](../secret.png) ![Of the web](https://example.com/a.png)

```python
pipe = DALLEPipeline.from_pretrained("checkpoints/emoji-mini")
```
"""
CLIENT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from huggingface_hub import HfApi
from tiny import build_pipeline
from hf_dalle import DALLEPipeline

def refusal(call):
    try:
        return str(call())
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
"""
PUSHES = """
import os, pathlib, shutil
from diffusers import DiffusionPipeline

folder, scratch, killed, broken = sys.argv[2:]
pipe, other = build_pipeline(), build_pipeline(seed=1)
with_card = DALLEPipeline.from_pretrained(folder)
seen = {
    "wrong token": refusal(lambda: pipe.push_to_hub("me/refused", token="hf_wrong")),
    "read token": refusal(lambda: pipe.push_to_hub("me/emoji-mini", token="hf_read")),
    "pickles": refusal(lambda: pipe.push_to_hub("me/refused", safe_serialization=False)),
    "stranger": refusal(lambda: pipe.push_to_hub("stranger/emoji")),
    "bad name": refusal(lambda: pipe.push_to_hub("me/emoji mini")),
    "plain": str(pipe.push_to_hub("plain")),
    "card": str(with_card.push_to_hub("me/emoji-mini", private=True, commit_message="First")),
    "twice": str(with_card.push_to_hub("me/emoji-mini", commit_message="Again")),
    "variant": str(other.push_to_hub("me/emoji-mini", variant="fp16", commit_message="Halves")),
    "request": with_card.push_to_hub("me/plain", create_pr=True).pr_url,
    "request to others": other.push_to_hub("stranger/theirs", create_pr=True).pr_url,
    "broken card": refusal(lambda: DALLEPipeline.from_pretrained(broken).push_to_hub("me/broken")),
}
HfApi().upload_file(path_or_fileobj=b"# Mine", path_in_repo="README.md", repo_id="me/plain")
pipe.push_to_hub("me/plain", max_shard_size="100KB")
other.save_pretrained(f"{scratch}/saved", push_to_hub=True, repo_id="me/saved", token="hf_write")
refused = {"push_to_hub": True, "repo_id": "me/saved"}
seen["only read"] = refusal(lambda: pipe.save_pretrained(f"{scratch}/refused", token="hf_read", **refused))
pickles = {**refused, "safe_serialization": False}
seen["saved pickles"] = refusal(lambda: pipe.save_pretrained(f"{scratch}/refused", **pickles))
token = os.environ.pop("HF_TOKEN")
seen["no token"] = refusal(lambda: pipe.save_pretrained(f"{scratch}/refused", **refused))
os.environ["HF_TOKEN"] = token
seen["refused is saved"] = pathlib.Path(f"{scratch}/refused").exists()
shutil.copytree(folder, f"{scratch}/stranger/theirs")
os.chdir(scratch)
gone = DiffusionPipeline.from_pretrained("stranger/theirs")
os.chdir(folder)
shutil.rmtree(f"{scratch}/stranger")
gone.push_to_hub("me/gone")
other.push_to_hub("me/cut", commit_message="Before")
seen["cut"] = refusal(lambda: pipe.push_to_hub("me/cut", commit_message="Cut"))
seen["cut again"] = pipe.push_to_hub("me/cut", commit_message="Completed")
DALLEPipeline.from_pretrained(killed).push_to_hub("me/killed")
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def hub():
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline's folder with a card and pictures; beside it a file that is nobody's business."""
    folder = tmp_path_factory.mktemp("checkpoints") / "emoji-mini"
    build_pipeline().save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "grids").mkdir()
    for name in ("samples.png", "grids/widget.png", "unshown.png", "../secret.png"):
        Image.new("RGB", (4, 4), "red").save(folder / name)
    return folder


@pytest.fixture(scope="module")
def killed(hub, tmp_path_factory):
    """
    A push whose process is killed when half of the prior's weights have gone and the dVAE's have arrived. Gives the
    folder, the names of both weights, and what had arrived and was visible by then.
    """
    scratch = tmp_path_factory.mktemp("killed")
    folder = scratch / "saved"
    build_pipeline(seed=5).save_pretrained(folder)
    names = ("prior/model.safetensors", "dvae/diffusion_pytorch_model.safetensors")
    oid, whole = (hub.name_of((folder / name).read_bytes()) for name in names)
    hub.has_stored.clear()
    cut = Cut("PUT", oid, is_held=True)
    hub.cuts.append(cut)
    push = CLIENT + "DALLEPipeline.from_pretrained(sys.argv[2]).push_to_hub('me/killed')"
    environment = client_environment(hub, scratch / "home", HF_HUB_DISABLE_XET="1")
    process = start_client(push, environment, ROOT / "tests", folder)
    assert cut.reached.wait(900) and hub.has_stored.wait(900), process.communicate()
    process.kill()
    process.communicate()
    cut.release.set()
    return folder, oid, whole, set(hub.lfs_objects), set(hub.files("me/killed"))


@pytest.fixture(scope="module")
def seen(hub, folder, killed, tmp_path_factory):
    """The pushes of the first part; one commit is dropped."""
    scratch = tmp_path_factory.mktemp("push")
    hub.add_folder("stranger/theirs", folder)
    broken = scratch / "broken"
    build_pipeline().save_pretrained(broken)
    (broken / "README.md").write_text("---\ntags: [a, b\nlicense: : mit\n---\n# Words\n")
    hub.cuts.append(Cut("POST", "/me/cut/commit/", num_passed=1))
    environment = client_environment(hub, scratch / "home", HF_HUB_DISABLE_XET="1")
    return json.loads(run_client(CLIENT + PUSHES, environment, ROOT / "tests", folder, scratch, killed[0], broken))


def load(hub, name, folder, revision="main", **kwargs):
    """The pipeline that a repository's files make."""
    for path, content in hub.files(name, revision).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return DALLEPipeline.from_pretrained(folder, **kwargs)


# ------------------------------------------------------------------------------------------------ what is pushed


def test_a_push_is_one_commit_that_loads(hub, seen, tmp_path):
    assert set(seen["plain"].split("/")[3:5]) == {"me", "plain"}
    commits = [commit["message"] for commit in hub.repositories["me/plain"].commits.values()]
    assert commits[:2] == ["initial commit", "Upload DALLEPipeline"]
    first = seen["plain"].split("/")[-1]
    weights = load(hub, "me/plain", tmp_path, first).prior.state_dict()
    expected = build_pipeline().prior.state_dict()
    assert all(weights[name].equal(value) for name, value in expected.items())
    assert set(hub.files("me/plain", first)) == {
        ".gitattributes",
        *("README.md", "model_index.json", "processor_config.json"),
        *("prior/config.json", "prior/generation_config.json", "prior/model.safetensors"),
        *("dvae/config.json", "dvae/diffusion_pytorch_model.safetensors"),
        *("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "image_processor/preprocessor_config.json"),
    }


def test_a_pipeline_without_a_card_gets_a_plain_one_that_then_is_yours(hub, seen):
    card = ModelCard(hub.files("me/plain", seen["plain"].split("/")[-1])["README.md"].decode())
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    assert 'DALLEPipeline.from_pretrained("me/plain")' in card.text and "# plain\n" in card.text
    assert "16 x 16 to 4 x 4 tokens out of 16" in card.text and "72,576 parameters" in card.text
    assert hub.files("me/plain")["README.md"] == b"# Mine", "a later push leaves what was written there since"


def test_the_card_comes_along_with_the_pictures_it_shows(hub, seen, folder):
    files = hub.files("me/emoji-mini")
    assert files["README.md"].decode() == CARD.replace("checkpoints/emoji-mini", "me/emoji-mini")
    assert {name for name in files if name.endswith(".png")} == {"samples.png", "grids/widget.png"}
    assert files["samples.png"] == (folder / "samples.png").read_bytes()
    assert not any(b"secret" in name.encode() for name in files)


def test_a_folder_that_is_gone_is_no_repository(hub, seen):
    """A relative path looks like the name of a repository; here there is one, with a card."""
    files = hub.files("me/gone")
    card = ModelCard(files["README.md"].decode())
    assert "# gone\n" in card.text and card.data.base_model is None and "samples.png" not in files


def test_arguments_of_the_push(hub, seen):
    assert hub.repositories["me/emoji-mini"].private and not hub.repositories["me/plain"].private
    messages = [commit["message"] for commit in hub.repositories["me/emoji-mini"].commits.values()]
    assert messages == ["initial commit", "First", "Halves"], "a second push that changes nothing is no commit"
    assert seen["twice"] == seen["card"]
    assert seen["request"].endswith("/me/plain/discussions/1")
    assert "samples.png" in hub.files("me/plain", "refs/pr/1") and "samples.png" not in hub.files("me/plain")


def test_a_pull_request_to_somebody_elses_repository(hub, seen, folder):
    assert seen["request to others"].endswith("/stranger/theirs/discussions/1")
    assert hub.files("stranger/theirs") == {name: path.read_bytes() for name, path in list_files(folder).items()}
    weights = hub.files("stranger/theirs", "refs/pr/1")["prior/model.safetensors"]
    assert weights == hub.files("me/saved")["prior/model.safetensors"]


def test_a_variant_stands_beside_the_other_weights(hub, seen, tmp_path):
    names = set(hub.files("me/emoji-mini"))
    assert {"prior/model.safetensors", "prior/model.fp16.safetensors"} <= names
    assert load(hub, "me/emoji-mini", tmp_path, variant="fp16").prior.config.hidden_size == 32


def test_shards_take_the_place_of_the_file_that_they_replace(hub, seen, tmp_path):
    """Loaders would take the old file that lay beside them, and say nothing."""
    names = {name for name in hub.files("me/plain") if name.endswith((".safetensors", ".index.json"))}
    assert "prior/model.safetensors" not in names and "prior/model.safetensors.index.json" in names
    assert sum(name.startswith("prior/model-0") for name in names) > 1
    weights = load(hub, "me/plain", tmp_path).prior.state_dict()
    assert all(weights[name].equal(value) for name, value in build_pipeline().prior.state_dict().items())


def test_saving_can_push_too(hub, seen, tmp_path):
    weights = load(hub, "me/saved", tmp_path).prior.state_dict()
    assert all(weights[name].equal(value) for name, value in build_pipeline(seed=1).prior.state_dict().items())


# ------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("wrong token", "(401: Invalid user token.): the token is wrong or expired"),
        ("no token", "OSError: There is no token for http"),
        ("read token", "(403: You don't have the rights to write"),
        ("only read", "refused me/saved (403: You don't have the rights to write"),
        ("pickles", "ValueError: `safe_serialization=False` would save pickles"),
        ("saved pickles", "ValueError: `safe_serialization=False` would save pickles"),
        ("broken card", "ValueError: Invalid metadata in README.md."),
        ("stranger", "refused stranger/emoji (403: "),
        ("bad name", "me/emoji mini"),
    ],
)
def test_a_refusal_is_one_line(hub, seen, case, words):
    assert words in seen[case] and "\n" not in seen[case]
    assert "hf_w" not in seen[case] and "hf_r" not in seen[case]
    assert "me/refused" not in hub.repositories and "stranger/emoji" not in hub.repositories
    assert not seen["refused is saved"], "a token that may only read is refused before anything is saved"


def test_a_commit_that_is_cut_off_changes_nothing_and_the_next_push_completes_it(hub, seen, tmp_path):
    assert seen["cut"].startswith("OSError: ") and "\n" not in seen["cut"]
    assert "me/cut" in seen["cut"] and "the same push completes it" in seen["cut"]
    messages = [commit["message"] for commit in hub.repositories["me/cut"].commits.values()]
    assert messages == ["initial commit", "Before", "Completed"]
    weights = load(hub, "me/cut", tmp_path).prior.state_dict()
    assert all(weights[name].equal(value) for name, value in build_pipeline().prior.state_dict().items())


def test_an_upload_that_is_killed_is_completed_by_the_next_push(hub, killed, seen, tmp_path):
    folder, oid, whole, arrived, visible = killed
    assert visible == {".gitattributes"} and oid not in arrived and whole in arrived
    sent = [path.removeprefix("/lfs/") for method, path, _ in hub.requests if method == "PUT"]
    assert sent.count(oid) == 2 and sent.count(whole) == 1, "what had arrived is not sent again"
    loaded, saved = load(hub, "me/killed", tmp_path), DALLEPipeline.from_pretrained(folder)
    weights = loaded.prior.state_dict()
    assert all(weights[name].equal(value) for name, value in saved.prior.state_dict().items())


# ------------------------------------------------------------------------------------------------------- training


TRAIN = """
import runpy, sys

script, *lines = sys.argv[1:]
sys.path.insert(0, script.rpartition("/")[0])
for line in lines:
    sys.argv = [script, *line.split()]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as exit:
        print(f"exit: {exit.code}")
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("train") / "data")


def test_train_pushes_what_it_trained_and_asks_before_it_does(hub, data, tmp_path):
    """Over Xet, which is the client's default; the other tests push over LFS, where a request can be cut."""
    settings = dvae_settings(data, tmp_path / "my-dvae", **{**VALIDATION, "max_train_steps": 2})
    path = write_settings({**settings, "report_to": "tensorboard"})
    options = f"{path} --push_to_hub --hub_token"
    lines = [f"{options} hf_wrong", f"{options} hf_write --train_data_dir {tmp_path} --hub_model_id me/no-data"]
    lines.append(f"{options} hf_write --hub_private_repo")
    output = run_client(
        TRAIN, client_environment(hub, tmp_path / "home", token=None), ROOT / "training" / "train.py", *lines
    )
    refused, no_data, published = output.strip().splitlines()
    assert refused.startswith("exit: train.py: ") and "the token is wrong or expired" in refused
    assert no_data.startswith("exit: train.py: ") and str(tmp_path) in no_data
    assert "me/no-data" not in hub.repositories, "without data there is nothing to publish"
    assert any("/me/my-dvae/xet-write-token/" in path for _, path, _ in hub.requests)
    assert published.startswith(f"Published: {hub.endpoint}/me/my-dvae/commit/")
    files = hub.files("me/my-dvae")
    names = {"config.json", "diffusion_pytorch_model.safetensors", "preprocessor_config.json", "reconstructions.png"}
    assert set(files) == {*names, "README.md", ".gitattributes"} and hub.repositories["me/my-dvae"].private
    assert "](reconstructions.png)" in files["README.md"].decode() and '"me/my-dvae"' in files["README.md"].decode()
    for path in (tmp_path / "my-dvae").rglob("*"):
        assert path.is_dir() or b"hf_write" not in path.read_bytes(), f"the token is in {path}"
    for name in names - {"reconstructions.png"}:
        (tmp_path / "loaded" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "loaded" / name).write_bytes(files[name])
    assert DalleDVAE.from_pretrained(tmp_path / "loaded").config.sample_size == 16


@pytest.mark.slow
def test_train_pushes_a_pipeline_with_its_samples(hub, tmp_path):
    home = build_home(tmp_path / "stage1")
    prompts = {"validation_prompts": ["red and blue"], "max_train_steps": 4, "checkpointing_steps": 2}
    settings = build_prior_settings(home, tmp_path / "my-prior", **VALIDATION, **prompts)
    settings |= {"push_to_hub": True, "hub_model_id": "me/other-name"}
    script = ROOT / "training" / "train.py"
    run_client(TRAIN, client_environment(hub, tmp_path / "home"), script, str(write_settings(settings)))
    files = hub.files("me/other-name")
    assert files["samples.png"] == sorted((tmp_path / "my-prior" / "validation").glob("*.png"))[-1].read_bytes()
    assert not [name for name in files if name.startswith(("checkpoint-", "logs/", "validation/"))]
    card = ModelCard(files["README.md"].decode())
    assert 'DALLEPipeline.from_pretrained("me/other-name")' in card.text and str(tmp_path) not in card.content
    assert load(hub, "me/other-name", tmp_path / "loaded")("red and blue", output_type="latent").images.shape


@pytest.mark.slow
def test_a_lost_server_is_one_line_and_the_model_is_on_disk(hub, data, tmp_path):
    """The connection is lost for good: the client tries again for half a minute, then says so."""
    settings = dvae_settings(data, tmp_path / "lost", max_train_steps=2, seed=7)  # other weights than were sent before
    hub.cuts.append(Cut("PUT", "/lfs/", times=99))
    path = write_settings({**settings, "push_to_hub": True})
    environment = client_environment(hub, tmp_path / "home", HF_HUB_DISABLE_XET="1")
    command = [sys.executable, str(ROOT / "training" / "train.py"), str(path)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    hub.cuts.clear()
    assert process.returncode == 1 and "Traceback" not in process.stderr
    said = [line for line in process.stderr.splitlines() if "the same push completes it" in line]
    assert len(said) == 1 and "train.py: " in said[0]
    assert (tmp_path / "lost" / "diffusion_pytorch_model.safetensors").is_file()
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and "Published: " in again.stdout, again.stderr
    assert "diffusion_pytorch_model.safetensors" in hub.files("me/lost")


@pytest.mark.parametrize("setting", ["hub_model_id", "hub_token"])
def test_settings_of_a_push_without_one_are_refused(data, tmp_path, setting):
    with pytest.raises(ValueError, match="do nothing without `push_to_hub`"):
        run(dvae_settings(data, tmp_path / "x", **{setting: "me/x"}))

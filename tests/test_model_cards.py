"""Model cards: whole, parsed back by huggingface_hub, and without a figure that the report does not have.

The report is that of `tiny_report.py`.
"""

import copy
import json
import re

import pytest
import render_card
import yaml
from arguments import parse_arguments
from describe_run import describe_model, describe_run, describe_training
from emoji_sets import EMOJI_SETS
from hub_metadata import find_faults
from hub_server import HubServer, client_environment, run_client
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from PIL import Image
from safetensors.torch import load_file
from tiny import build_dvae, build_pipeline
from tiny_report import CARDS, make_facts, make_report, make_split, render
from tiny_training import VALIDATION, dvae_settings, prior_settings, run, write_data, write_settings

from hf_dalle import DalleDVAE
from hf_dalle.model_card import publish_settings


SECTIONS = [
    *("How to use", "What it draws well, and what not", "Parts", "How it was trained", "Figures"),
    *("How much is copied", "Every evaluation on test pictures", "Experiments", "Intended use", "Limits", "Biases"),
    *("Licence and credit", "How to cite"),
]


def list_headings(card):
    return re.findall(r"^## (.+)$", card.text, flags=re.MULTILINE)


def list_numbers(value, path=()):
    """Where in a report its numbers stand."""
    if isinstance(value, dict):
        return [found for key, part in value.items() for found in list_numbers(part, (*path, key))]
    if isinstance(value, list):
        return [found for key, part in enumerate(value) for found in list_numbers(part, (*path, key))]
    return [path] if isinstance(value, int | float) and not isinstance(value, bool) else []


def change_number(report, path):
    *where, last = path
    for key in where:
        report = report[key]
    report[last] = report[last] * 2 + 1


def run_python(card, namespace):
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    exec(compile(code, "card", "exec"), namespace)
    return namespace


# ------------------------------------------------------------------------------------------------- a published model


def test_the_card_is_whole():
    card = render(make_report(), make_facts())
    assert list_headings(card) == SECTIONS
    assert not re.findall(r"\{\{|\}\}|\{%|%\}|\{#|None|Undefined", str(card))
    assert card.text.count("```") % 2 == 0 and "\n\n\n" not in card.text
    # a table's rows have the cells that its head has
    for table in re.findall(r"(?:^\|.*\|\n)+", card.text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    assert render_card.list_pictures(card) == [
        *("samples.png", "training.png", "reconstructions.png", "train.png", "test_style.png", "nearest.png")
    ]


def test_huggingface_hub_reads_it_back(tmp_path):
    card = render(make_report(), make_facts())
    card.save(tmp_path / "README.md")
    back = ModelCard.load(tmp_path / "README.md")
    assert str(back) == str(card) and back.data.to_dict() == card.data.to_dict()
    data = back.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("cc-by-sa-4.0", "diffusers", "text-to-image")
    assert data.language == "en" and {"dall-e", "dalle", "vq-vae", "emoji", "hf_dalle"} <= set(data.tags)
    assert data.widget[0] == {"text": "a noto style emoji of kite"}
    assert {"recall", "accuracy", "psnr", "perplexity"} <= set(data.metrics)


def test_the_model_index_holds_what_was_measured_and_goes_round():
    report = make_report()
    data = render(report, make_facts()).data
    assert data.model_name == "emoji-mini"
    index = eval_results_to_model_index(data.model_name, data.eval_results)
    assert model_index_to_eval_results(index) == (data.model_name, data.eval_results)
    values = {(result.dataset_split, result.metric_name): result.metric_value for result in data.eval_results}
    drawn = report["splits"]["test_style"]["sides"]["32"]["drawn"]
    assert values["test_style", "recall@5 of drawn pictures at 32 x 32"] == drawn["recall@5"]["value"]
    assert values["test_compose", "PSNR, dB"] == report["dvae"]["test_compose"]["psnr"]["value"]
    assert values["test_style", "image loss, nats a token"] == report["splits"]["test_style"]["image_loss"]
    assert {result.dataset_split for result in data.eval_results} == {"validation", "test_style", "test_compose"}


def test_every_number_of_the_report_is_in_the_card():
    """A card that stays as it was, though a figure changed, would not have shown that figure."""
    report = make_report()
    for part in ("splits", "dvae"):
        report[part] = {"test_style": report[part]["test_style"]}
    del report["splits"]["test_style"]["sides"]["64"], report["judge"]["sides"], report["samples"]["num_images"]
    before, paths, hidden = render(report).text, list_numbers(report), []
    assert len(paths) > 80
    for path in paths:
        change_number(changed := copy.deepcopy(report), path)
        if render(changed).text == before:
            hidden.append(path)
    assert hidden == []


def test_every_split_has_three_rows_at_both_sides():
    text = render(make_report()).text
    for words in ("real pictures", "their reconstructions", "drawn from the captions"):
        for side in (32, 64):
            assert len(re.findall(rf"^\| {words} \| {side} \|", text, flags=re.MULTILINE)) == 3


def test_no_figure_is_written_by_hand():
    """Neither the template nor the words of a published card have numbers, but of licences, versions and the paper."""
    template = render_card.TEMPLATE.read_text()
    words = re.sub(r"\{#.*?#\}|\{%.*?%\}|\{\{.*?\}\}|```bibtex.*?```", "", template, flags=re.DOTALL)
    words = re.sub(r"recall@[15]|95 %|num_images_per_prompt=4|manual_seed\(0\)|images\[0\]", "", words)
    assert re.findall(r".*\d.*", words) == []
    for path in CARDS.glob("*/facts.yaml"):
        facts = yaml.safe_load(path.read_text())
        for key in (
            "license",
            "license_note",
            "data_sets",
            "data_set",
            "model_id",
            "base_model",
            "experiments",
            "evaluations",
        ):
            facts.pop(key, None)
        words = re.sub(r"\{%.*?%\}|\{\{.*?\}\}|\b3d\b|\b3D\b", "", json.dumps(facts))
        assert re.findall(r".{0,30}\d.{0,30}", words) == [], path


GONE = {"model": "Parts", "splits": "How much is copied", "runs": "Every evaluation on test pictures"}


@pytest.mark.parametrize("part", sorted(set(make_report()) - {"name"}))
def test_a_part_that_is_missing_leaves_nothing(part):
    report, facts = make_report(), make_facts()
    del report[part]
    facts["summary"] = "Words."  # those of emoji-mini quote the model
    card = render(report, facts)
    assert list_headings(card) == [heading for heading in SECTIONS if heading != GONE.get(part)]
    assert_no_empty_headings(card)


def assert_no_empty_headings(card):
    lines = [line for line in card.text.splitlines() if line.strip()]
    for line, following in zip(lines, [*lines[1:], "# end"], strict=True):
        depth = len(line) - len(line.lstrip("#"))
        next_depth = len(following) - len(following.lstrip("#"))
        assert not (depth and next_depth and next_depth <= depth), f"nothing stands under {line}"


def test_a_report_without_test_pictures_or_one_side():
    report = make_report()
    report["splits"] = {"validation": make_split(0.4, 69)}
    del report["splits"]["validation"]["sides"]["64"], report["splits"]["validation"]["copies"]
    del report["splits"]["validation"]["sides"]["32"]["real"], report["runs"], report["dvae"]
    card = render(report, make_facts())
    assert "How much is copied" not in list_headings(card) and "drawn from the captions" in card.text
    assert "real pictures | 32" not in card.text
    assert {result.dataset_split for result in card.data.eval_results} == {"validation"}


def test_all_five_sets_have_their_licence_and_credit():
    facts, card = make_facts(), render(make_report(), make_facts())
    rows = {row["use"]: row for row in facts["data_sets"]}
    for emoji_set in EMOJI_SETS:
        row = rows[f"pictures of the style {emoji_set.style} (`{emoji_set.package}` {emoji_set.version})"]
        assert f"[{row['license']}]({row['license_url']})" == emoji_set.license
        assert row["url"] in emoji_set.credit
        (line,) = (line for line in card.text.splitlines() if row["use"] in line)
        assert row["url"] in line and row["by"] in line and emoji_set.license in line


def test_the_python_of_a_card_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build_pipeline().save_pretrained("pipe")
    names = run_python(render(make_report(), make_facts(), model_id="pipe"), {})
    assert len(names["images"]) == 4 and Image.open("drawn.png").size == (16, 16)


def test_widget_pictures_stand_beside_their_captions():
    report = make_report()
    report["pictures"]["widget"] = ["one.png", "two.png"]
    card = render(report, make_facts())
    assert card.data.widget[1] == {"text": report["samples"]["prompts"][1], "output": {"url": "two.png"}}
    assert {"one.png", "two.png"} <= set(render_card.list_pictures(card))


def test_words_may_quote_the_report_but_only_what_it_has():
    facts = {"summary": "Trained on {{ report.data.splits.train | number }} pictures."}
    assert "Trained on 7,559 pictures." in render(make_report(), facts).text
    with pytest.raises(ValueError, match="has no attribute 'nothing'"):
        render(make_report(), {"summary": "{{ report.nothing.here }}"})


# -------------------------------------------------------------------------------------------------- a run of train.py


def test_settings_tell_no_folder_no_token_and_no_repository():
    report = make_report()
    report["training"]["prior"]["settings"] |= {
        "hub_model_id": "me/secret",
        "tokenizer": "C:\\Users\\me\\tok",
        "dvae": "~/d",
    }
    text = str(render(report, make_facts()))
    assert not re.findall(r"/home|someone|hf_x|secret|Users|output_dir|~/", text)
    assert "tokenizer: tok" in text and "learning_rate: 0.00213" in text


def test_a_run_of_the_dvae_gets_a_card_of_a_dvae(tmp_path, monkeypatch):
    settings = dvae_settings(write_data(tmp_path / "data"), tmp_path / "mine", max_train_steps=6, **VALIDATION)
    args = parse_arguments([str(write_settings(settings))])
    log = run(settings)
    card = render({**describe_training(args), "name": "my-dvae"}, model_id="me/my-dvae")
    assert list_headings(card) == ["How to use", "Parts", "How it was trained", "How to cite"]
    assert_no_empty_headings(card)
    assert card.text.startswith("\n# my-dvae\n") and card.data.pipeline_tag is None and card.data.license is None
    assert card.data.eval_results is None and str(ModelCard(str(card))) == str(card)
    assert f"| validation: PSNR of reconstructions, dB | {log[-1]['validation_psnr']:.2f} |" in card.text
    assert "6 updates, 96 pictures seen, 1 minute." in card.text and str(tmp_path) not in str(card)
    assert render_card.list_pictures(card) == ["validation/reconstructions-0000006.png"]
    assert all((tmp_path / "mine" / name).is_file() for name in render_card.list_pictures(card))
    dvae = DalleDVAE.from_pretrained(tmp_path / "mine")
    assert describe_model(tmp_path / "mine")["num_parameters"] == {"dvae": dvae.num_parameters()}
    monkeypatch.chdir(tmp_path)  # where the name leads to the model
    (tmp_path / "me").mkdir()
    (tmp_path / "mine").rename(tmp_path / "me" / "my-dvae")
    Image.new("RGB", (16, 16), "red").save("picture.png")
    assert run_python(card, {})["pictures"][0].size == (16, 16)


def test_a_run_of_the_prior_gets_a_card_of_a_pipeline(tmp_path):
    """Read back from what a run leaves: a saved pipeline and a log."""
    settings = prior_settings(tmp_path, tmp_path, tmp_path, tmp_path / "out", gradient_accumulation_steps=2)
    args = parse_arguments([str(write_settings({**settings, "validation_prompts": ["red and green"]}))])
    folder = tmp_path / "out"
    pipe = build_pipeline()
    pipe.save_pretrained(folder)
    (folder / "validation").mkdir()
    for step in (20, 100):
        Image.new("RGB", (4, 4)).save(folder / "validation" / f"samples-{step:07}.png")
    log = [
        {"step": 10, "loss": 3.0, "pictures_per_second": 4.0},
        {"step": 60, "loss": 2.0, "pictures_per_second": 8.0, "grad_norm": 1.0},
        {"step": 60, "validation_image_loss": 1.5},
    ]
    with pytest.raises(OSError, match=r"There is no .*metrics\.jsonl"):
        describe_training(args)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    report = describe_training(args, num_processes=2)
    described = report["training"]["prior"]
    # 8 pictures x 2 accumulated x 2 processes an update: 10 updates at 4 pictures a second, 50 at 8
    assert (described["updates"], described["pictures"]) == (60, 60 * 32)
    assert described["hours"] == pytest.approx((10 * 32 / 4 + 50 * 32 / 8) / 3600)
    assert described["final"] == {"loss": 2.0, "validation_image_loss": 1.5}
    assert "ema_decay" in described["settings"] and "adam_beta1" not in described["settings"]
    sizes = {"prior": pipe.prior.num_parameters(), "dvae": pipe.dvae.num_parameters()}
    assert report["model"]["num_parameters"] == sizes
    card = render({**report, "name": "mine"}, model_id="me/mine")
    assert list_headings(card) == ["How to use", "Parts", "How it was trained", "How to cite"]
    assert 'DALLEPipeline.from_pretrained("me/mine")' in card.text and '"red and green"' in card.text
    assert render_card.list_pictures(card) == ["validation/samples-0000100.png"]
    assert card.data.pipeline_tag == "text-to-image" and card.data.widget == [{"text": "red and green"}]


def test_a_run_that_trained_adapters_says_what_they_belong_to():
    settings = {"init_from": "me/emoji-mini", "lora_rank": 8, "dataset_name": "me/drawings"}
    card = render({"training": {"prior": {"settings": settings, "updates": 5}}}, model_id="me/style")
    assert 'from_pretrained("me/emoji-mini")\npipe.load_lora_weights("me/style")' in card.text
    assert card.data.base_model == "me/emoji-mini"
    assert "lora" in card.data.tags and card.data.datasets == ["me/drawings"]
    assert list_headings(card) == ["How to use", "How it was trained", "How to cite"]
    assert "From `me/emoji-mini`, low-rank adapters alone." in card.text


def test_a_start_in_a_folder_is_no_repository(tmp_path, monkeypatch):
    """A relative path is told as it is, an absolute one not at all; its last part alone would name a repository."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "emoji").mkdir(parents=True)
    for start in ("mine/emoji", str(tmp_path / "mine" / "emoji"), "C:\\models\\emoji", "~/emoji"):
        settings = publish_settings({"init_from": start, "lora_rank": 8})
        card = render({"training": {"prior": {"settings": settings}}}, model_id="me/style")
        is_told = start == "mine/emoji"
        assert card.data.base_model is None and str(tmp_path) not in str(card)
        code = "mine/emoji" if is_told else "the checkpoint it was trained from"
        assert f'DALLEPipeline.from_pretrained("{code}")\npipe.load_lora_weights' in card.text
        assert f"From {'`mine/emoji`' if is_told else 'a checkpoint in a folder'}, low-rank adapters" in card.text


def test_parameters_are_counted_once_and_with_the_codes(tmp_path):
    dvae = build_dvae(quantizer="nearest", codebook_dim=4)
    dvae.save_pretrained(tmp_path)
    assert any("ema_" in name for name in load_file(tmp_path / "diffusion_pytorch_model.safetensors"))
    expected = {"dvae": dvae.num_parameters() + dvae.codebook.codes.numel()}
    assert describe_model(tmp_path)["num_parameters"] == expected
    size = describe_model(tmp_path)["size_in_bytes"]
    dvae.half().save_pretrained(tmp_path, variant="fp16")
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    described = describe_model(tmp_path)
    assert described["num_parameters"] == expected
    assert described["size_in_bytes"] == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) > size


def test_a_report_has_no_token_and_no_folder_of_the_machine(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n')
    settings = {"stage": "prior", "hub_token": "hf_secret", "hub_model_id": "me/x", "dvae": str(tmp_path / "dvae")}
    settings |= {"output_dir": "runs/x", "train_batch_size": 4, "tokenizer": "runs/tokenizer"}
    described = describe_run(settings, tmp_path / "metrics.jsonl")
    shown = {"stage": "prior", "dvae": "dvae", "train_batch_size": 4, "tokenizer": "runs/tokenizer"}
    assert described["settings"] == shown and described["pictures"] == 12


@pytest.mark.slow
def test_the_hub_takes_the_metadata_of_the_card(tmp_path):
    (tmp_path / "README.md").write_text(str(render(make_report(), make_facts())))
    with HubServer() as hub:
        script = "import sys; from huggingface_hub import ModelCard; ModelCard.load(sys.argv[1]).validate()"
        run_client(script, client_environment(hub, tmp_path / "home"), tmp_path / "README.md")


def test_metadata_that_the_hub_would_not_take_is_found():
    data = yaml.safe_load(render(make_report(), make_facts()).data.to_yaml())
    assert find_faults(yaml.safe_dump(data)) == []
    wrong = {"license": "mine", "base_model": "/home/x/y", "datasets": ["a b"], "tags": "emoji", "pipeline_tag": "art"}
    for name, value in wrong.items():
        (fault,) = find_faults(yaml.safe_dump({**data, name: value}))
        assert f'"{name}"' in fault
    for place, name in (("task", "type"), ("dataset", "name")):
        changed = copy.deepcopy(data)
        del changed["model-index"][0]["results"][0][place][name]
        assert len(find_faults(yaml.safe_dump(changed))) == 1
    del (changed := copy.deepcopy(data))["model-index"][0]["results"][0]["metrics"][0]["value"]
    assert len(find_faults(yaml.safe_dump(changed))) == 1

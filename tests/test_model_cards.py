"""Model cards: whole, parsed back by huggingface_hub, and without a figure that the report does not have.

The report here is made up, in the shape that `evaluate.py` writes.
"""

import copy
import json
import re
from pathlib import Path

import pytest
import render_card
import yaml
from arguments import parse_arguments
from describe_run import describe_model, describe_training
from hub_server import HubServer, client_environment, run_client
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from PIL import Image
from prepare_emoji import EMOJI_SETS
from tiny import build_pipeline
from tiny_training import VALIDATION, dvae_settings, prior_settings, run, write_data, write_settings

from hf_dalle import DalleDVAE
from hf_dalle.hub import render_model_card


ROOT = Path(__file__).parents[1]
CARDS = ROOT / "model_cards"
SECTIONS = [
    *("How to use", "What it draws well, and what not", "Parts", "How it was trained", "Figures"),
    *("How much is copied", "Every evaluation on test pictures", "Experiments", "Intended use", "Limits", "Biases"),
    *("Licence and credit", "How to cite"),
]


def figure(value):
    return {"value": value, "low": value - 0.04, "high": value + 0.04}


def make_rows(start):
    """Three rows of figures, none like another."""
    return {
        row: {name: figure(start + 0.1 * i + 0.03 * j) for j, name in enumerate(("recall@1", "recall@5", "style"))}
        for i, row in enumerate(("drawn", "reconstructions", "real"))
    }


def make_split(start, num_pictures):
    return {
        "num_pictures": num_pictures,
        "seed": 7,
        "sides": {"32": make_rows(start), "64": make_rows(start + 0.011)},
        "num_concepts": num_pictures * 5,
        "image_loss": 3 + start,
        "copies": {
            "share": start / 9,
            "share_real": start / 8,
            "threshold": start / 7,
            "num_pictures": num_pictures - 1,
        },
    }


def make_report():
    prior = {"num_hidden_layers": 6, "hidden_size": 192, "num_attention_heads": 3, "text_length": 24}
    prior |= {"image_grid_size": 12, "image_vocab_size": 777, "text_vocab_size": 1999}
    prior |= {"attention_types": ["full", "row", "row", "full", "conv", "full"]}
    dvae = {"quantizer": "gumbel", "sample_size": 96, "vocab_size": 777, "patch_size": 2, "layers_per_block": 3}
    dvae |= {"encoder_block_out_channels": [61, 122], "decoder_block_out_channels": [123, 62]}
    captions = ["a noto style emoji of kite", 'a flat fluent style emoji of "TOP" arrow']
    dvae_settings = {"stage": "dvae", "output_dir": "/home/someone/runs/x", "learning_rate": 0.00213, "seed": 5}
    prior_settings = {"stage": "prior", "dvae": "/home/someone/runs/x", "train_batch_size": 48, "hub_token": "hf_x"}
    runs = {
        "dvae": {"settings": dvae_settings, "updates": 4321, "pictures": 138272, "hours": 0.61},
        "prior": {"settings": prior_settings, "updates": 9876, "pictures": 474048, "hours": 5.83},
    }
    runs["dvae"]["final"] = {"loss": -1.37, "train_perplexity": 401.3, "validation_psnr": 21.7}
    runs["prior"]["final"] = {"image_loss": 2.51, "loss": 2.29, "validation_image_loss": 2.77}
    return {
        "name": "emoji-mini",
        "evaluated": "2031-02-03",
        "model": {
            "num_parameters": {"prior": 6543210, "dvae": 2345678},
            "size_in_bytes": 17654321,
            "prior": prior,
            "dvae": dvae,
            "generation": {"guidance_scale": 2.5, "temperature": 0.93, "top_k": 17, "top_p": 0.98},
        },
        "samples": {"prompts": captions, "num_images": 6, "seed": 3},
        "training": runs,
        "data": {"splits": {"train": 7559, "validation": 69, "test_style": 302, "test_compose": 124}},
        "judge": {"name": "SomeNet, weights of some-net 0.1.0", "sides": [32, 64]},
        "dvae": {
            split: {"num_pictures": n, "psnr": figure(20 + n / 100), "perplexity": 300.0 + n, "vocab_size": 777}
            for split, n in (("validation", 69), ("test_style", 302), ("test_compose", 124))
        },
        "splits": {
            "train": make_split(0.313, 301),
            "test_style": make_split(0.227, 302),
            "test_compose": make_split(0.171, 124),
        },
        "runs": [
            {"date": "2031-01-01", "checkpoint": "0123456789ab", "splits": ["test_style"], "seed": 11},
            {"date": "2031-02-03", "checkpoint": "ba9876543210", "splits": ["test_style", "test_compose"], "seed": 13},
        ],
        "pictures": {
            **{name: f"{name}.png" for name in ("samples", "reconstructions", "nearest", "train", "test_style")},
            "curve": "training.png",
        },
    }


def make_facts():
    facts = render_card.read_facts(CARDS / "emoji-mini" / "facts.yaml")
    facts["experiments"] = {"text": "On validation.", "columns": ["tried", "found"], "rows": [["a | b", "worse"]]}
    return facts


def render(report, facts=None, **kwargs):
    return render_model_card(report, render_card.TEMPLATE, facts, **kwargs)


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
        for key in ("license", "license_note", "data_sets", "data_set", "model_id", "base_model", "experiments"):
            facts.pop(key, None)
        words = re.sub(r"\{\{.*?\}\}|\b3d\b|\b3D\b", "", json.dumps(facts))
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
    assert "6 updates, 96 pictures seen, 1 minutes" in card.text and str(tmp_path) not in str(card)
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
    assert "lora" in card.data.tags and card.data.datasets == ["me/drawings"]
    assert list_headings(card) == ["How to use", "How it was trained", "How to cite"]
    assert "From `me/emoji-mini`, low-rank adapters alone." in card.text


@pytest.mark.slow
def test_the_hub_takes_the_card(tmp_path):
    (tmp_path / "README.md").write_text(str(render(make_report(), make_facts())))
    with HubServer() as hub:
        script = "import sys; from huggingface_hub import ModelCard; ModelCard.load(sys.argv[1]).validate()"
        run_client(script, client_environment(hub, tmp_path / "home"), tmp_path / "README.md")


# ------------------------------------------------------------------------------------------------------ the command


def write_folder(folder):
    folder.mkdir(parents=True)
    report = make_report()
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "facts.yaml").write_text(yaml.safe_dump(make_facts()))
    for name in report["pictures"].values():
        Image.new("RGB", (4, 4)).save(folder / name)
    return folder


def test_the_command_writes_the_card_beside_the_report_and_into_the_checkpoint(tmp_path):
    folder, checkpoint = write_folder(tmp_path / "card"), tmp_path / "checkpoint"
    checkpoint.mkdir()
    render_card.main([str(folder), "--checkpoint", str(checkpoint)])
    assert (folder / "README.md").read_text() == str(render(make_report(), make_facts()))
    for name in ("README.md", *make_report()["pictures"].values()):
        assert (checkpoint / name).read_bytes() == (folder / name).read_bytes()
    before = (folder / "README.md").read_bytes()
    render_card.main([str(folder)])
    assert (folder / "README.md").read_bytes() == before


def test_the_command_says_what_is_missing_before_it_writes(tmp_path):
    folder = write_folder(tmp_path / "card")
    (folder / "nearest.png").unlink()
    with pytest.raises(OSError, match=r"shows nearest\.png, which is not in .* run evaluate\.py"):
        render_card.main([str(folder)])
    (folder / "report.json").write_text("{")
    with pytest.raises(ValueError, match=r"report\.json is not valid JSON"):
        render_card.main([str(folder)])
    (folder / "report.json").unlink()
    with pytest.raises(OSError, match=r"There is no .*report\.json: make it with evaluate\.py"):
        render_card.main([str(folder)])
    with pytest.raises(OSError, match="--checkpoint .* is not a folder"):
        render_card.main([str(folder), "--checkpoint", str(tmp_path / "none")])
    assert not (folder / "README.md").exists()


def test_facts_that_lack_something_are_refused_by_name(tmp_path):
    path, facts = tmp_path / "facts.yaml", make_facts()
    with pytest.raises(OSError, match=r"There is no .*facts\.yaml: write it after model_cards/emoji-mini/facts\.yaml"):
        render_card.read_facts(path)
    del facts["biases"], facts["data_sets"][1]["license_url"]
    facts["limits"] = []
    facts["experiments"]["rows"].append(["one cell"])
    path.write_text(yaml.safe_dump(facts))
    with pytest.raises(ValueError, match="is not complete") as caught:
        render_card.read_facts(path)
    told = ("`biases`", "`limits`", "`license_url` of data set 2 (Twemoji)", "2 cells in row 2")
    assert all(words in str(caught.value) for words in told)
    for text in ("- a list", "a: [", "words"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"facts\.yaml (is not valid YAML|must hold)"):
            render_card.read_facts(path)


def test_every_committed_card_is_what_rendering_gives():
    assert (folders := [path for path in CARDS.iterdir() if path.is_dir()])
    for folder in folders:
        facts = render_card.read_facts(folder / "facts.yaml")
        if not (folder / "report.json").is_file():
            assert not (folder / "README.md").exists(), f"{folder} has a card, but no report that it comes from"
            continue
        card = render_card.render_folder(folder)
        assert (folder / "README.md").read_text() == str(card), f"run training/render_card.py {folder} again"
        for name in ("README.md", *render_card.list_pictures(card)):
            assert (ROOT / facts["model_id"] / name).read_bytes() == (folder / name).read_bytes(), name

"""The dVAE study: each of its recipes runs at tiny sizes, piece by piece, and its page holds what was measured."""

import json
import re
import shutil

import dvae_study
import dvae_study_page
import precompute_image_tokens
import pytest
import torch
import train
import train_tokenizer
import yaml
from accelerate.state import AcceleratorState, GradientState
from dvae_study import StudyArguments, is_done, list_runs, mark_done
from evaluation.pictures import make_generator
from PIL import Image
from tiny_training import MODEL, ROOT, read_log, write_data

from hf_dalle import DalleDVAE, DALLEPipeline
from hf_dalle.data import load_rows, open_picture
from hf_dalle.evidence_lower_bound import evidence_lower_bound
from hf_dalle.metrics import psnr


CONFIGS = ROOT / "training" / "configs" / "study"
TEMPLATE = ROOT / "docs" / "dvae_study_template.md"
SMALL = {"max_train_steps": 2, "train_batch_size": 4, "checkpointing_steps": 2, "validation_steps": 2}
SMALL |= {"logging_steps": 1, "mixed_precision": "no", "report_to": "none", "lr_warmup_steps": 1}
PRIOR = {"hidden_size": 32, "num_attention_heads": 2}


def read(name):
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def shrink(name):
    """A recipe with all that it says of losses and quantizers, small."""
    settings = {**read(name), **SMALL}
    if settings["stage"] == "dvae":
        kept = {key: settings["model"][key] for key in ("quantizer", "codebook_dim") if key in settings["model"]}
        settings["model"] = {**MODEL, **kept}
        settings["initial_kl_per_token"] = 1.0
    else:
        settings["model"] = {**settings["model"], **PRIOR}
    return settings


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The study's settings and configs, small, on the tiny data."""
    home = tmp_path_factory.mktemp("study")
    settings = read("study")
    (home / "configs").mkdir()
    for name in settings["dvaes"] + settings["priors"]:
        (home / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(shrink(name)))
    settings |= {"config_dir": str(home / "configs"), "runs_dir": str(home / "runs")}
    settings |= {"data_dir": str(write_data(home / "data")), "page": str(home / "docs" / "page.md")}
    settings |= {"text_vocab_size": 300, "text_length": 8, "num_samples": 2, "num_fit_pictures": 6, "num_shown": 3}
    settings |= {"prompts": ["red and blue"], "template": str(TEMPLATE)}
    path = home / "study.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def read_args(study):
    return StudyArguments(**yaml.safe_load(study.read_text()))


def test_recipes_differ_from_the_first_in_what_their_names_say():
    settings = read("study")
    base = read(settings["dvaes"][0])
    differing = {}
    for name in settings["dvaes"][1:]:
        other = read(name)
        flat, flat_base = ({**one, **one["model"], "model": None} for one in (other, base))
        keys = {key for key in flat | flat_base if flat.get(key) != flat_base.get(key)}
        differing[name] = keys - {"output_dir"}
    nearest = {"quantizer", "codebook_dim", "codebook_decay", "codebook_revival_share"}
    only_gumbel = {"temperature_anneal_steps", "kl_weight", "kl_weight_warmup_steps"}
    assert differing == {
        "dvae_nearest": nearest | only_gumbel,
        "dvae_gumbel_l1": {"pixel_l1_weight", "min_log_b"},
        "dvae_gumbel_l2": {"pixel_l2_weight", "min_log_b"},
        "dvae_gumbel_no_kl": {"kl_weight"},
        "dvae_nearest_l2": nearest | only_gumbel | {"pixel_l2_weight", "min_log_b"},
    }
    full, nearest, paper = map(read, settings["priors"])
    assert {key for key in full if full[key] != nearest[key]} == {"output_dir", "train_data_dir", "dvae"}
    assert {key for key in full if full[key] != paper[key]} == {"output_dir", "model"}
    assert {key for key in full["model"] if full["model"][key] != paper["model"][key]} == {"attention_types"}
    for name in settings["dvaes"] + settings["priors"]:
        assert read(name)["output_dir"] == f"{settings['runs_dir']}/{name}"
    for prior in (full, nearest, paper):
        assert prior["train_data_dir"] == f"{settings['runs_dir']}/tokens_{prior['dvae'].rpartition('/')[2]}"


def test_every_run_one_at_a_time_and_the_page(study, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    args = read_args(study)
    runs = list_runs(args)
    assert [run.name for run in runs] == [
        *args.dvaes,
        *("tokenizer", "tokens_dvae_gumbel", "tokens_dvae_nearest"),
        *args.priors,
    ]
    with pytest.raises(ValueError, match="No dVAE of the study is done yet"):
        dvae_study.main([str(study), "--do", "write"])
    # the first by a process of its own, as it is used; the rest by the same commands in this one
    dvae_study.main([str(study), "--do", "next"])
    assert "11 of 12 runs are left." in capfd.readouterr().out
    assert [run.name for run in runs if is_done(args, run)] == ["dvae_gumbel"]
    dvae_study.main([str(study), "--do", "write"])
    page = (study.parent / "docs" / "page.md").read_text()
    assert page.count("| gumbel, logit-Laplace, KL x 6.6 |") == 1 and "Not run yet: dvae_nearest," in page
    _run_the_rest(args, runs[1:])
    dvae_study.main([str(study), "--do", "all"])
    assert "Nothing is left to run" in capfd.readouterr().out
    dvae_study.main([str(study), "--do", "write"])
    _check_page(args, study.parent / "docs")


def _run_the_rest(args, runs):
    scripts = (train, train_tokenizer, precompute_image_tokens)
    mains = {f"{script.__name__}.py": script.main for script in scripts}
    for run in runs:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        with torch.random.fork_rng(devices=[]):
            mains[run.script](run.command()[2:])
        mark_done(args, run)
    assert {len(read_log(args.run(name))) for name in args.dvaes + args.priors} == {2}


@torch.no_grad()
def _check_page(args, folder):
    page, figures = (folder / "page.md").read_text(), json.loads((folder / "page.json").read_text())
    assert list(figures["dvaes"]) == args.dvaes and list(figures["priors"]) == args.priors and not figures["left"]
    rows = load_rows(args.data_dir, split="validation")
    pictures = [open_picture(row["image"]) for row in rows]
    pipe = DALLEPipeline.from_pretrained(args.run("prior_nearest"))
    pixels = pipe.image_processor(pictures)["pixel_values"]
    for name in args.dvaes:  # against each picture by itself
        dvae, found = DalleDVAE.from_pretrained(args.run(name)), figures["dvaes"][name]
        decoded = dvae.decode(dvae.encode(pixels).tokens).sample
        assert found["psnr"]["value"] == pytest.approx(psnr(pixels, decoded).mean().item(), rel=1e-4)
        assert f"{found['psnr']['value']:.2f} [" in page and f"{found['fitted']['bits_per_dim']:.3f}" in page
        assert (found["own"] is None) == ("_l1" in name or "_l2" in name)
    generators = [make_generator(args.seed, "study", row) for row in range(len(pictures))]
    text = pipe.tokenizer([row["captions"][0] for row in rows], padding="max_length", return_tensors="pt")
    log_b = figures["dvaes"]["dvae_nearest"]["log_b"]
    text = (text["input_ids"], text["attention_mask"])
    parts = evidence_lower_bound(pipe.dvae, pipe.prior, pixels, *text, generators, args.num_samples, log_b=log_b)
    found = figures["priors"]["prior_nearest"]
    assert found["fitted"]["bound"] == pytest.approx(parts.bound.mean().item(), rel=1e-6)
    last = read_log(args.run("prior_nearest"))[-1]["validation_image_loss"]
    assert found["image_loss"] == pytest.approx(last, rel=2e-3)  # that of the run's end, its tokens in float32 too
    assert "5 row, 2 column, 1 conv" in page and page.count("| 8 full |") == 2
    for name in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert Image.open(folder / name).width > 3 * 16
    assert "{{" not in page and "{%" not in page


def test_a_run_of_other_settings_is_not_taken_for_done(study, tmp_path):
    args = read_args(study)
    args.runs_dir, args.config_dir = str(tmp_path / "runs"), str(tmp_path / "configs")
    shutil.copytree(study.parent / "configs", args.config_dir)
    run = list_runs(args)[0]
    assert not is_done(args, run)
    mark_done(args, run)
    assert is_done(args, run)
    args.config(run.name).write_text(yaml.safe_dump({**shrink(run.name), "learning_rate": 1.0}))
    with pytest.raises(ValueError, match="dvae_gumbel was run by other settings than there are now, of dvae_gumbel"):
        is_done(args, list_runs(args)[0])


def test_a_run_whose_input_was_made_anew_is_not_taken_for_done(study, tmp_path):
    args = read_args(study)
    args.runs_dir, args.config_dir = str(tmp_path / "runs"), str(tmp_path / "configs")
    shutil.copytree(study.parent / "configs", args.config_dir)
    for run in list_runs(args):
        mark_done(args, run)
    assert all(is_done(args, run) for run in list_runs(args))
    args.config("dvae_nearest").write_text(yaml.safe_dump({**shrink("dvae_nearest"), "learning_rate": 1.0}))
    runs = {run.name: run for run in list_runs(args)}
    mark_done(args, runs["dvae_nearest"])  # as if run again
    for name, run in runs.items():
        if name in ("tokens_dvae_nearest", "prior_nearest"):
            with pytest.raises(ValueError, match=f"{name} was run by other settings .* of dvae_nearest"):
                is_done(args, run)
        else:
            assert is_done(args, run)


def test_a_run_that_fails_is_not_done(study, tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text("raise SystemExit(3)")  # a process that fails, without what train.py imports
    monkeypatch.setattr(dvae_study, "SCRIPTS", tmp_path)
    args = read_args(study)
    args.runs_dir = str(tmp_path / "runs")
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(vars(args)))
    with pytest.raises(ValueError, match="dvae_gumbel ended with exit code 3"):
        dvae_study.main([str(path), "--do", "next"])
    assert not is_done(args, list_runs(args)[0])


def test_studies_that_are_refused(study, tmp_path):
    args = read_args(study)
    with pytest.raises(ValueError, match="expected different names"):
        StudyArguments(**{**vars(args), "priors": args.dvaes[:1]})
    with pytest.raises(ValueError, match="`runs_dir` is missing"):
        StudyArguments(**{**vars(args), "runs_dir": ""})
    with pytest.raises(ValueError, match="none of the study's"):
        list_runs(StudyArguments(**{**vars(args), "dvaes": args.dvaes[1:]}))
    with pytest.raises(OSError, match="the settings of absent"):
        list_runs(StudyArguments(**{**vars(args), "dvaes": ["absent"]}))
    with pytest.raises(ValueError, match="cannot be rendered"):
        dvae_study_page.render("{{ dvaes.absent.psnr.value }}", {"dvaes": {}})

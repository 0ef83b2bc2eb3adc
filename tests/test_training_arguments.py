"""The settings of a training run: YAML, options over it, and what is refused with which words."""

from pathlib import Path

import pytest
import yaml
from arguments import STAGES, DVAEArguments, parse_arguments


CONFIGS = sorted(
    path
    for path in (Path(__file__).parent.parent / "training" / "configs").glob("*.yaml")
    if "stage" in yaml.safe_load(path.read_text())  # the others are read by the tests of what they are for
)
DVAE = {"stage": "dvae", "output_dir": "runs/a", "train_data_dir": "data"}
PRIOR = {**DVAE, "stage": "prior", "dvae": "runs/dvae", "tokenizer": "runs/tokenizer"}


@pytest.fixture
def parse(tmp_path):
    """Parses settings, a dict or the text of a file, with options."""

    def parse(settings, *options):
        path = tmp_path / "config.yaml"
        path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
        return parse_arguments([str(path), *options])

    return parse


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_settings_parse(path):
    values = yaml.safe_load(path.read_text())
    args = parse_arguments([str(path)])
    assert type(args) is STAGES[values.pop("stage")]
    for name, value in values.items():
        assert getattr(args, name) == value, name


def test_there_are_shipped_settings():
    assert {path.stem for path in CONFIGS} >= {"emoji_mini_dvae", "emoji_mini_prior"}


def test_options_override_the_file(parse):
    settings = {**DVAE, "learning_rate": 0.1, "seed": 3, "use_ema": True, "resize_range": [1.0, 1.1]}
    args = parse(settings, "--learning_rate", "1e-4", "--use_ema=False", "--resize_range", "1", "1.5", "--seed=7")
    assert (args.learning_rate, args.seed, args.use_ema, args.resize_range) == (1e-4, 7, False, [1.0, 1.5])
    assert args.train_batch_size == DVAEArguments(output_dir="a", train_data_dir="b").train_batch_size
    assert parse(settings, "--seed", "1", "--seed", "2").seed == 2
    assert parse(settings, "--min_log_b", "-1.5", "--do-random-flip").min_log_b == -1.5
    assert parse(settings, "--do-random-flip").do_random_flip is True


def test_numbers_of_yaml_become_the_settings_types(parse):
    # YAML 1.1 reads 1e-4, without a dot, as a string
    args = parse("stage: dvae\noutput_dir: a\ntrain_data_dir: b\nlearning_rate: 1e-4\nkl_weight: 2\nseed: '5'\n")
    assert args.learning_rate == 1e-4 and args.kl_weight == 2.0 and isinstance(args.kl_weight, float)
    assert args.seed == 5


@pytest.mark.parametrize(("text", "expected"), [("true", True), ("no", False), ("'False'", False), ("on", True)])
def test_booleans(parse, text, expected):
    assert parse(f"stage: dvae\noutput_dir: a\ntrain_data_dir: b\nuse_ema: {text}\n").use_ema is expected


def test_a_bare_no_is_no_mixed_precision(parse):
    args = parse("stage: dvae\noutput_dir: a\ntrain_data_dir: b\nmixed_precision: no\n")  # YAML reads false
    assert args.mixed_precision == "no"


def test_lists_and_dicts(parse):
    prompts = ["a red square", "two: dots, and commas"]
    settings = {**PRIOR, "model": {"hidden_size": 32, "attention_types": ["full", "row"]}, "generation": {"top_k": 5}}
    args = parse({**settings, "validation_prompts": prompts})
    assert args.validation_prompts == prompts and args.generation == {"top_k": 5}
    assert args.model == {"hidden_size": 32, "attention_types": ["full", "row"]}
    assert parse({**settings, "validation_prompts": "one"}).validation_prompts == ["one"]
    args = parse(settings, "--validation_prompts", *prompts, "--model", '{"hidden_size": 8}')
    assert args.validation_prompts == prompts and args.model == {"hidden_size": 8}


def test_none_is_a_value_where_a_setting_may_be_absent(parse):
    assert parse(PRIOR).max_grad_norm == 4.0
    assert parse({**PRIOR, "max_grad_norm": None}).max_grad_norm is None
    args = parse(PRIOR, "--max_grad_norm", "none", "--report_to=none", "--resume_from_checkpoint", "none")
    assert (args.max_grad_norm, args.report_to, args.resume_from_checkpoint) == (None, None, None)
    assert parse({**PRIOR, "checkpoints_total_limit": "none"}).checkpoints_total_limit is None
    with pytest.raises(ValueError, match="`seed` is None; expected int"):
        parse({**PRIOR, "seed": None})


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"learning_rat": 1}, [], "unknown key `learning_rat`. Did you mean `learning_rate`?"),
        ({"zzz": 1}, [], "unknown key `zzz`. Known are output_dir, "),
        ({"temperature_start": 1, "stage": "prior"}, [], "unknown key `temperature_start`"),
        ({}, ["--max_train_step", "5"], "unknown key `max_train_step`. Did you mean `max_train_steps`?"),
        ({}, ["5"], "Expected an option, `--name value`, but got '5'"),
        ({"max_train_steps": "ten"}, [], "`max_train_steps` is 'ten'; expected int"),
        ({"max_train_steps": 2.5}, [], "`max_train_steps` is 2.5; expected int"),
        ({"seed": [1]}, [], "`seed` is [1]; expected int"),
        ({}, ["--seed", "1", "2"], "`seed` is ['1', '2']; expected int"),
        ({}, ["--seed"], "`seed` is True; expected int"),
        ({"use_ema": 2}, [], "`use_ema` is 2; expected bool"),
        ({"learning_rate": True}, [], "`learning_rate` is True; expected float"),
        ({"max_grad_norm": "much"}, [], "`max_grad_norm` is 'much'; expected float or none"),
        ({"model": [1]}, [], "`model` is [1]; expected dict"),
        ({}, ["--model", "{oops"], "`model` is '{oops'; expected dict"),
        ({"resize_range": ["a", 1]}, [], "`resize_range` is ['a', 1]; expected list[float] or none"),
        ({"report_to": False}, [], "`report_to` is False; expected str or none"),
        ({"mixed_precision": "fp8"}, [], "`mixed_precision` is 'fp8'; expected Literal['no', 'bf16', 'fp16']"),
        ({"output_dir": ""}, [], "`output_dir` is missing"),
        ({"dataset_name": "a"}, [], "exactly one of `train_data_dir` and `dataset_name`"),
        ({"train_data_dir": None}, [], "exactly one of `train_data_dir` and `dataset_name`"),
        ({"stage": None}, [], "says `stage: None`; expected one of dvae, prior"),
        ({"stage": ["dvae"]}, [], "says `stage: ['dvae']`; expected one of dvae, prior"),
        ({"train_batch_size": 0}, [], "`train_batch_size` is 0; expected a number from 1"),
        ({"checkpoints_total_limit": 0}, [], "`checkpoints_total_limit` is 0; expected a number from 1"),
        ({"seed": -1}, [], "`seed` is -1; expected a number from 0"),
        ({"temperature_end": 0}, [], "`temperature_end` is 0.0; expected a number above 0"),
        ({"learning_rate": "nan"}, [], "`learning_rate` is nan; expected a number from 0"),
        ({"ema_decay": 1}, [], "`ema_decay` is 1.0; expected a number in [0, 1)"),
        ({"codebook_revival_steps": 0}, [], "`codebook_revival_steps` is 0; expected a number from 1"),
        ({"codebook_revival_share": 1}, [], "`codebook_revival_share` is 1.0; expected a number in [0, 1)"),
        ({"codebook_revival_share": -0.1}, [], "`codebook_revival_share` is -0.1; expected a number in [0, 1)"),
        ({"pixel_l1_weight": -1}, [], "`pixel_l1_weight` is -1.0; expected a number from 0"),
        ({"pixel_l2_weight": -1}, [], "`pixel_l2_weight` is -1.0; expected a number from 0"),
        ({"lr_min_ratio": 2}, [], "`lr_min_ratio` is 2.0; expected a number in [0, 1]"),
        ({"resize_range": [1]}, [], "`resize_range` is [1.0]; expected two numbers"),
        ({"do_random_flip": True}, [], "do nothing without `resize_range`"),
    ],
)
def test_what_is_wrong_is_named(parse, changes, options, words):
    with pytest.raises(ValueError) as caught:
        parse({**DVAE, **changes}, *options)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dvae": ""}, "`dvae` is missing"),
        ({"tokenizer": ""}, "`tokenizer` is missing"),
        ({"caption_dropout": 1}, "`caption_dropout` is 1.0; expected a number in [0, 1)"),
        ({"tokens_column": "tokens", "resize_range": [1, 1]}, "does nothing to stored tokens"),
        ({"caption_dropout": 0, "validation_prompts": ["a", " "]}, "needs a `caption_dropout` above 0"),
    ],
)
def test_what_is_wrong_with_the_prior_is_named(parse, changes, words):
    with pytest.raises(ValueError) as caught:
        parse({**PRIOR, **changes})
    assert words in str(caught.value)


def test_files_that_are_no_settings(parse, tmp_path):
    with pytest.raises(ValueError, match="not valid YAML"):
        parse("stage: [dvae")
    with pytest.raises(ValueError, match="must hold `key: value` lines; got list"):
        parse("- stage")
    with pytest.raises(ValueError, match="unknown key `True`"):
        parse("stage: dvae\non: 1\n")
    with pytest.raises(OSError, match="nowhere.yaml"):
        parse_arguments([str(tmp_path / "nowhere.yaml")])
    for argv in ([], ["--seed", "1"]):
        with pytest.raises(ValueError, match="no settings file. Usage"):
            parse_arguments(argv)


def test_help_lists_the_options(parse, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--help"])
    assert not caught.value.code and "Usage: train.py CONFIG.yaml" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse(PRIOR, "--help")
    text = capsys.readouterr().out
    assert "--caption_dropout (0.1): Share of captions emptied" in text
    assert "--model ({})" in text and "--temperature_start" not in text

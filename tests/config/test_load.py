from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from meditron_train.config.load import dump_config, load_config
from meditron_train.config.schema import Config, json_schema
from meditron_train.errors import UserError

BASE = """
model:
  from: base
data:
  tokenizer: base
  train:
    - {name: a, path: data/a}
"""


@pytest.fixture
def write(tmp_path):
    def write_config(text: str = BASE, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write_config


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    first, *listed = str(caught.value).splitlines()
    assert str(path) in first
    if not listed:
        return [first]
    return [line.removeprefix("  - ") for line in listed]


def test_defaults(write):
    config = load_config(write())
    assert config.model.from_ == Path("base")
    assert config.data.packing == "best_fit"
    assert config.data.train[0].weight == 1.0
    assert (config.optimizer.lr, config.optimizer.betas) == (3e-4, (0.9, 0.95))
    assert config.train.precision == "bf16"
    assert config.checkpoint.keep_every is None
    assert config.logging.run_dir == Path("runs/run")  # from the file's name


def test_frozen(write):
    config = load_config(write())
    with pytest.raises(ValidationError):
        config.train.steps = 5  # type: ignore[misc]


def test_overrides(write):
    config = load_config(
        write(),
        [
            "train.steps=7",
            "optimizer.lr=1e-4",
            "optimizer.betas=[0.9, 0.99]",
            "data.special_tokens=['[bib]', '[/bib]']",
            "data.train.0.path=elsewhere",
            "logging.run_dir=runs/a=b",
            "resilience.max_skipped_steps=3",
        ],
    )
    assert config.train.steps == 7
    assert config.optimizer.lr == 1e-4
    assert config.optimizer.betas == (0.9, 0.99)
    assert config.data.special_tokens == ("[bib]", "[/bib]")
    assert config.data.train[0].path == Path("elsewhere")
    assert config.logging.run_dir == Path("runs/a=b")
    assert config.resilience.max_skipped_steps == 3


def test_a_section_of_another_file(write):
    """Its keys replace those of the configuration, and later overrides replace them."""
    other = write(
        "data:\n  tokenizer: other\n  train: [{name: b, path: data/b}, {name: c, path: c}]\n", "data.yaml"
    )
    path = write(BASE + "  packing: concat\n")
    data = load_config(path, [f"data=@{other}", "data.train.1.path=elsewhere"]).data
    assert (data.tokenizer, data.packing) == (Path("other"), "concat")
    assert [(source.name, str(source.path)) for source in data.train] == [("b", "data/b"), ("c", "elsewhere")]
    assert "data.yaml has no section train" in problems(path, f"train=@{other}")[0]
    with pytest.raises(UserError, match=r"no configuration file nowhere\.yaml"):
        load_config(path, ["data=@nowhere.yaml"])


def test_overrides_reach_into_hf_config(write):
    text = BASE.replace("from: base", "init: random\n  hf_config: {hidden_size: 32, rope_scaling: null}")
    config = load_config(write(text), ["model.hf_config.hidden_size=64", "model.hf_config.rms_norm_eps=1e-6"])
    # null is a value for Hugging Face and stays
    assert config.model.hf_config == {"hidden_size": 64, "rope_scaling": None, "rms_norm_eps": 1e-6}


def test_null_means_the_default(write):
    text = BASE + "train: {steps: null, batch_ramp: null}\nresilience:\nvalidation: {}\n"
    config = load_config(write(text), ["optimizer.lr=null"])
    assert config.train.steps == 1000
    assert config.optimizer.lr == 3e-4


def test_interpolation(write, monkeypatch):
    monkeypatch.setenv("MODELS", "/models")
    monkeypatch.setenv("STEPS", "12")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("UNSET", raising=False)
    text = BASE.replace("from: base", "from: ${MODELS}/llama") + (
        "train: {steps: '${STEPS}', seq_len: '${EMPTY:-64}'}\n"
        "logging: {run_dir: '${UNSET:-runs}/$${literal}', wandb_project: '${UNSET:-}x'}\n"
    )
    config = load_config(write(text), ["data.tokenizer=${MODELS}/tokenizer"])
    assert config.model.from_ == Path("/models/llama")
    assert config.data.tokenizer == Path("/models/tokenizer")
    assert (config.train.steps, config.train.seq_len) == (12, 64)
    assert config.logging.run_dir == Path("runs/${literal}")
    assert config.logging.wandb_project == "x"


def test_undefined_variables_are_named_with_key_and_file(write, monkeypatch):
    monkeypatch.delenv("NOWHERE", raising=False)
    path = write(BASE.replace("tokenizer: base", "tokenizer: ${NOWHERE}/x"))
    (problem,) = problems(path)
    assert problem.startswith("data.tokenizer = '${NOWHERE}/x': the environment variable NOWHERE is not set")
    assert "${NOWHERE:-default}" in problem


@pytest.mark.parametrize("bad", ["${1X}", "${}", "${OPEN"])
def test_malformed_variables(write, bad):
    (problem,) = problems(write(BASE.replace("tokenizer: base", f"tokenizer: '{bad}'")))
    assert "write ${NAME} or ${NAME:-default}" in problem


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("train.stpes=3", "did you mean train.steps?"),
        ("data.seq_len=3", "did you mean train.seq_len?"),
        ("model.fron=x", "did you mean model.from?"),
        ("model.from_=x", "did you mean model.from?"),
        ("data.train.0.wieght=2", "did you mean data.train.0.weight?"),
        ("train.batch_ramp.increments=2", "did you mean train.batch_ramp.increment?"),
        ("parallel.learning=2", "valid keys in parallel: tensor, pipeline"),
    ],
)
def test_unknown_keys_name_the_nearest(write, override, suggestion):
    found = problems(write(), override)
    (unknown,) = [problem for problem in found if "unknown key" in problem]
    assert "from the command line" in unknown
    assert suggestion in unknown


def test_unknown_sections_name_the_nearest(write):
    assert problems(write(BASE + "trian: {steps: 3}")) == ["trian: unknown key; did you mean train?"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps=0", "train.steps (from the command line) = 0: expected greater than or equal to 1"),
        ("train.steps=true", "a number is wanted here"),
        ("train.steps=many", "expected a valid integer"),
        ("train.gpu=v100", "expected 'a100-40gb', 'a100-80gb', 'h100-80gb', 'h200-141gb' or 'cpu'"),
        ("train.precision=fp16", "expected 'bf16' or 'fp32'"),
        ("optimizer.lr=.nan", "expected a finite number"),
        ("optimizer.betas=[0.9]", "optimizer.betas.1"),
        ("data.train=[]", "data.train (from the command line): at least one entry is needed"),
        ("data.train.0.name=a/b", "expected"),
        ("data.train.0.token_budget=5", None),
        ("data.validation_fraction=1", "expected less than 1"),
        ("data.special_tokens=[x, x]", "special_tokens must be different"),
        ("checkpoint.interval=0", "expected greater than or equal to 1"),
        ("model.init=random", "init: random needs `hf_config"),
        ("model.hf_config={a: 1}", "hf_config is for init: random"),
        ("steps=3", "expected section.field=value"),
        ("train.steps", "expected section.field=value"),
        ("train..steps=3", "expected section.field=value"),
        ("train.steps=[", "not valid YAML"),
        ("data.train.3.path=x", "data.train has 1 entries, numbered from 0, and no entry '3'"),
        ("model.hf_config={a: &x [*x]}", "one of its aliases contains itself"),
        ("train.steps=" + "[" * 3000, "nested too deeply"),
        ("train.batch_ramp=5", "expected a section"),
        ("train.1=5", "unknown key"),
        ("model.from.x=3", "model.from is 'base' and has no key 'x'"),
    ],
)
def test_bad_overrides(write, override, said):
    if said is None:
        assert load_config(write(), [override]).data.train[0].weight is None
        return
    assert said in "\n".join(problems(write(), override))


@given(key=st.text(max_size=20), value=st.text(max_size=20))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_override_gives_a_config_or_a_user_error(write, key, value):
    for override in (
        f"{key}={value}",
        f"train.{key}={value}",
        f"train.seed={value}",
        f"model.hf_config={value}",
    ):
        with contextlib.suppress(UserError):
            load_config(write(), [override])


def test_sources_share_by_one_kind_and_have_different_names(write):
    both = BASE.replace("path: data/a", "path: data/a, weight: 1, token_budget: 5")
    assert "both weight and token_budget" in problems(write(both))[0]
    mixed = BASE + "    - {name: b, path: data/b, token_budget: 100}\n"
    assert "mix token_budget (b) and weight (a)" in problems(write(mixed))[0]
    twice = BASE + "    - {name: a, path: data/b}\n"
    assert "used twice: a" in problems(write(twice))[0]
    held_out = BASE + "  validation: [{name: a, path: x}]\n  validation_fraction: 0.1\n"
    assert "validation sources need different names; used twice: a" in problems(write(held_out))[0]


def test_all_mistakes_come_in_one_message(write, monkeypatch):
    monkeypatch.delenv("NOWHERE", raising=False)
    text = BASE.replace("from: base", "from: ${NOWHERE}\n  colour: red") + "train: {steps: -1, seq_len: x}\n"
    found = problems(write(text), "foo", "optimizer.clip=3")
    wanted = ["'foo'", "model.from", "model.colour", "train.steps", "train.seq_len", "optimizer.clip "]
    assert len(found) == len(wanted)
    for key in wanted:
        assert any(problem.startswith(key) for problem in found), key


def test_missing_keys(write):
    found = problems(write("train: {steps: 3}\n"))
    assert found == ["model: missing, and it has no default", "data: missing, and it has no default"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("- a\n", "is a list"),
        ("a: [", "not valid YAML"),
        ("model: {from: ${HOME}}", 'quotes around ${VAR}: "${VAR}"'),
        ("train: {steps: 1, steps: 2}", "key 'steps' is given twice"),
        ("? [a]\n: 1\n", "cannot be a key"),
        ("a: !!python/object:os.system {}", "not valid YAML"),
        ("a: 2001-99-99", "not valid YAML: a value cannot be read: month"),
        ("a: !!int x", "not valid YAML"),
        ("a: !!bool x", "not valid YAML"),
        ("a: !!map [x]", "not valid YAML"),
        ('a: "\\ud800"', "half of a surrogate pair"),
        ("a: " + "9" * 5000, "not valid YAML"),
    ],
)
def test_files_that_are_no_configuration(write, text, said):
    with pytest.raises(UserError) as caught:
        load_config(write(text))
    assert said in str(caught.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="there is no configuration file"):
        load_config(tmp_path / "nothing.yaml")
    with pytest.raises(UserError, match="is a directory; give the YAML file itself"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read"):
        load_config(tmp_path / "binary.yaml")


def test_dump_and_load_give_an_equal_config(write, tmp_path):
    text = BASE + (
        "    - {name: b, path: data/b, weight: 1.0e-7}\n"
        "  special_tokens: ['[bib]', '<|im_start|>', 'é', '${x}', '1']\n"
        "train: {batch_ramp: {start: 4, increment: 4, samples: 100}, gpu: a100-80gb}\n"
        "schedule: {warmup_fraction: 0.1}\n"
    ).replace("${x}", "$${x}")
    config = load_config(write(text), ["optimizer.lr=1e-5", "logging.run_dir=runs/1"])
    dumped = tmp_path / "deep" / "config.yaml"
    dump_config(config, dumped)
    assert load_config(dumped) == config
    assert yaml.safe_load(dumped.read_text())["model"]["from"] == "base"


def test_a_text_that_our_loader_would_take_for_a_number_is_dumped_as_a_text(write, tmp_path):
    path = write(
        BASE + "logging: {wandb_name: '3e-4', wandb_tags: ['1e5', '-2.E3', '1:30', '0x10', 'on', '7']}"
    )
    config = load_config(path)
    dump_config(config, tmp_path / "out.yaml")
    assert load_config(tmp_path / "out.yaml", ["logging.run_dir=runs/run"]) == config
    assert yaml.safe_load((tmp_path / "out.yaml").read_text())["logging"]["wandb_tags"][3] == "0x10"


def test_dump_and_load_of_a_random_model(write, tmp_path):
    text = BASE.replace(
        "from: base", "init: random\n  hf_config: {hidden_size: 32, rope_scaling: null, x: 1e-6}"
    )
    config = load_config(write(text))
    dump_config(config, tmp_path / "out.yaml")
    assert load_config(tmp_path / "out.yaml") == config


def test_warmup_and_decay_steps(write):
    def steps(*overrides: str) -> tuple[int, int]:
        config = load_config(write(), ["train.steps=200", *overrides])
        return config.warmup_steps, config.decay_steps

    assert steps() == (0, 200)
    assert steps("schedule.warmup_steps=5", "schedule.decay_steps=150") == (5, 150)
    assert steps("schedule.warmup_fraction=0.1") == (20, 200)
    assert steps("schedule.kind=wsd") == (0, 20)
    assert "keep one" in problems(write(), "schedule.warmup_steps=5", "schedule.warmup_fraction=0.1")[0]


def test_the_schema_states_limits_and_meanings():
    schema = json.loads(json_schema())
    steps = schema["$defs"]["TrainSection"]["properties"]["steps"]
    assert (steps["type"], steps["minimum"], steps["default"]) == ("integer", 1, 1000)
    assert steps["description"].startswith("Optimizer steps (default 1000")
    assert "from" in schema["$defs"]["ModelSection"]["properties"]
    assert schema["additionalProperties"] is False


def test_the_schema_file_is_current():
    file = Path(__file__).parents[2] / "configs" / "schema.json"
    assert file.read_text() == json_schema(), (
        "run: python -m meditron_train.config.schema > configs/schema.json"
    )


def test_a_source_is_named_after_its_path():
    values = {
        "model": {"from": "base"},
        "data": {
            "tokenizer": "base",
            "train": [{"path": "data/pubmed.v2"}, {"path": "data/pubmed.v2", "name": "other"}],
            "validation": [{"path": "data/held"}],
        },
    }
    data = Config.model_validate(values).data
    assert [source.name for source in (*data.train, *data.validation)] == ["pubmed.v2", "other", "held"]
    with pytest.raises(ValueError, match="name"):
        Config.model_validate({**values, "data": {"tokenizer": "b", "train": [{"path": "data/pub med"}]}})

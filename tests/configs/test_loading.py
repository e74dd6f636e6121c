import re
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, field_validator, model_validator

from boldforge.configs import ConfigError, StrictModel, load_config, recipe_names, recipe_path


class Optimizer(StrictModel):
    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)


class Training(StrictModel):
    out: Path
    steps: int = 10
    name: str | None = None
    optimizer: Optimizer = Field(default_factory=Optimizer)
    warmup: Optimizer | None = None

    @field_validator("steps")
    @classmethod
    def _even(cls, steps: int) -> int:
        if steps % 2:
            raise ValueError("must be even")
        return steps


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("out: runs/x\nsteps: 4\noptimizer: {lr: 0.01}\n")
    return path


def test_a_recipe_fills_the_model_and_the_rest_keeps_its_default(recipe):
    config = load_config(Training, recipe)
    assert (config.out, config.steps, config.optimizer.lr) == (Path("runs/x"), 4, 0.01)
    assert config.optimizer.betas == (0.9, 0.95)


def test_overrides_win_over_the_file_and_later_ones_over_earlier(recipe):
    config = load_config(Training, recipe, ["optimizer.lr=1", "steps=6", "optimizer.lr=2.5"])
    assert config.optimizer.lr == 2.5
    assert config.steps == 6


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("1E-4", 1e-4), ("2.5e3", 2500.0), ("3", 3.0)])
def test_numbers_may_be_written_as_scientists_write_them(recipe, text, value):
    assert load_config(Training, recipe, [f"optimizer.lr={text}"]).optimizer.lr == value


def test_values_are_yaml_lists_null_and_text(recipe):
    config = load_config(Training, recipe, ["optimizer.betas=[0.5, 0.6]", "name=null", "out=a folder/x=y"])
    assert config.optimizer.betas == (0.5, 0.6)
    assert config.name is None
    assert config.out == Path("a folder/x=y")


def test_an_override_can_open_a_section_that_the_file_does_not_have(recipe):
    assert load_config(Training, recipe, ["warmup.lr=0.5"]).warmup == Optimizer(lr=0.5)


def test_the_source_mapping_is_left_as_it_was():
    source = {"out": "x", "optimizer": {"lr": 0.1}}
    load_config(Training, source, ["optimizer.lr=0.2"])
    assert source == {"out": "x", "optimizer": {"lr": 0.1}}


def test_an_unknown_key_is_refused_with_the_nearest_name(recipe):
    with pytest.raises(ConfigError, match=r"unknown key 'optimizer\.betaz'; did you mean 'optimizer\.betas'\?"):
        load_config(Training, recipe, ["optimizer.betaz=[1, 1]"])


def test_an_unknown_key_unlike_any_other_gets_the_list(recipe):
    with pytest.raises(ConfigError, match=r"unknown key 'qqq'; valid keys are out, steps, name, optimizer, warmup"):
        load_config(Training, recipe, ["qqq=1"])


def test_the_nearest_name_is_found_inside_an_optional_section(recipe):
    with pytest.raises(ConfigError, match=r"'warmup\.l_r'; did you mean 'warmup\.lr'\?"):
        load_config(Training, recipe, ["warmup.l_r=1"])


def test_a_value_out_of_range_names_key_value_and_file(recipe):
    with pytest.raises(ConfigError, match=r"^the command line: key 'optimizer\.lr' is -1, but: .*greater than 0"):
        load_config(Training, recipe, ["optimizer.lr=-1"])


@pytest.mark.parametrize(
    ("written", "overrides", "blamed"),
    [
        ("out: x", ["trainng.steps=2"], "the command line: unknown key 'trainng'"),
        ("out: x", ["optimizer.l_r=2"], "the command line: unknown key 'optimizer.l_r'"),
        ("out: x", ["optimizer={lr: -1}"], "the command line: key 'optimizer.lr'"),
        ("out: x\nsteps: 3", ["optimizer.lr=0.1"], "recipe.yaml: key 'steps'"),
        ("out: x\nsteps: 3", ["steps=5"], "the command line: key 'steps'"),
        ("out: x\noptimizer: {lr: -1}", ["optimizer.betas=[0, 1]"], "recipe.yaml: key 'optimizer.lr'"),
        ("steps: 4", ["steps=2"], "recipe.yaml: key 'out' is missing"),
        ("out: x\nsteps: 9998", ["name=long"], "recipe.yaml with the command line's changes: a long run is named"),
        ("out: x\nsteps: 9998\nname: long", [], "recipe.yaml: a long run is named"),
    ],
)
def test_a_mistake_is_laid_at_the_door_of_who_made_it(recipe, written, overrides, blamed):
    class Named(Training):
        @model_validator(mode="after")
        def _long(self):
            if self.steps > 1000 and self.name == "long":
                raise ValueError("a long run is named otherwise")
            return self

    recipe.write_text(written)
    with pytest.raises(ConfigError) as refused:
        load_config(Named, recipe, overrides)
    assert str(refused.value).removeprefix(f"{recipe.parent}/").startswith(blamed)


def test_a_validators_own_words_reach_the_user_without_pydantics_prefix(recipe):
    with pytest.raises(ConfigError, match=r"key 'steps' is 5, but: must be even\.") as caught:
        load_config(Training, recipe, ["steps=5"])
    assert "Value error" not in str(caught.value)


def test_every_mistake_is_told_at_once(recipe):
    with pytest.raises(ConfigError) as caught:
        load_config(Training, recipe, ["steps=x", "optimizer.lr=-1"])
    assert "'steps'" in str(caught.value)
    assert "'optimizer.lr'" in str(caught.value)


def test_a_missing_key_says_how_to_set_it():
    with pytest.raises(ConfigError, match=r"key 'out' is missing; .*out=VALUE"):
        load_config(Training, None, ["steps=2"])


@pytest.mark.parametrize("override", ["steps", "=3", " =3"])
def test_an_override_without_key_or_value_is_refused(recipe, override):
    with pytest.raises(ConfigError, match="key=value"):
        load_config(Training, recipe, [override])


def test_an_override_below_a_single_value_is_refused(recipe):
    with pytest.raises(ConfigError, match=r"'steps' holds a single value, it has no key 'x'"):
        load_config(Training, recipe, ["steps.x=1"])


def test_an_override_that_is_not_yaml_is_refused(recipe):
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(Training, recipe, ["optimizer.betas=[1, 2"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"out: [1, 2\n", "is not valid YAML"),
        (b"\xff\xfe\x00\x01", "is not valid YAML"),
        (b"- a\n- b\n", "holds list, expected a mapping"),
        (b"", "holds NoneType, expected a mapping"),
        (b"out: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
    ],
    ids=["unclosed", "binary", "list", "empty", "code"],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(Training, path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_packaged_recipe_is_found_by_its_repository_path_and_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe_path("configs/pretrain/tiny.yaml") == recipe_path("pretrain/tiny.yaml")


def test_the_users_own_file_of_the_same_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "configs" / "pretrain" / "tiny.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("steps: 1\n")
    assert recipe_path("configs/pretrain/tiny.yaml").resolve() == own


@pytest.mark.parametrize("name", ["configs/pretrain/tinny.yaml", "/etc/passwd.yaml", "configs/../loading.py", ""])
def test_a_recipe_that_is_not_there_lists_those_that_are(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no such recipe; .*pretrain/tiny\.yaml"):
        recipe_path(name)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("configs/sweep/adhd-lora.yaml", "finetune/adhd_lora_sweep.yaml"),
        ("sweep/adhd-lora.yaml", "finetune/adhd_lora_sweep.yaml"),
        ("adhd_lora_sweep.yaml", "finetune/adhd_lora_sweep.yaml"),
        ("sweep/adhd-ranks.yaml", "sweep/adhd-rank.yaml"),
        ("configs/pretrian/tiny.yaml", "pretrain/tiny.yaml"),
        ("pretrain/large.yaml", "pretrain/boldforge-large.yaml"),
        ("finetune/haxby.yaml", None),
        ("mine.yaml", None),
        ("/etc/passwd.yaml", None),
    ],
)
def test_the_recipe_that_was_meant_is_named(name, meant):
    with pytest.raises(ConfigError) as refused:
        recipe_path(name)
    said = f"did you mean {meant}? Else give a YAML file" if meant else "no such recipe; give a YAML file"
    assert said in str(refused.value)


def test_recipe_names_can_all_be_loaded_by_name():
    names = recipe_names()
    assert {"pretrain/tiny.yaml", "pretrain/demo.yaml"} <= set(names)
    assert all(recipe_path(name).is_file() for name in names)


def test_a_rule_between_keys_is_told_without_the_whole_recipe():
    class Band(StrictModel):
        low: float = 0.0
        high: float = 1.0

        @model_validator(mode="after")
        def _ordered(self):
            if self.low >= self.high:
                raise ValueError("low must be below high")
            return self

    with pytest.raises(ConfigError) as refused:
        load_config(Band, overrides=["low=2"])
    assert str(refused.value) == "the command line: low must be below high."


class Span(StrictModel):
    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self):
        if self.low >= self.high:
            raise ValueError("low must be below high")
        return self


class Ladder(StrictModel):
    kind: Literal["ladder"]
    depth: int = 1


class Trunk(StrictModel):
    kind: Literal["trunk"]
    weights: Path


class Search(StrictModel):
    ranks: tuple[int, ...] = Field((2, 4), min_length=1)
    lr: tuple[float, ...] | Span | None = None
    span: Span | None = None
    network: Ladder | Trunk | Path = Path("here")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("ranks=2", "key 'ranks' is 2, but: it takes a list, such as [2]."),
        ("ranks=[]", "key 'ranks' is [], but: it takes at least 1 value."),
        ("lr={low: 2, high: 1}", "key 'lr': low must be below high."),
        ("lr={low: 2}", "key 'lr.high' is missing; set it in the file or on the command line as lr.high=VALUE."),
        ("lr={low: 2, hihg: 3, high: 4}", "unknown key 'lr.hihg'; did you mean 'lr.high'?"),
        ("lr=2", "key 'lr' is 2, but: it takes a list, such as [2], or it takes a section of keys (low, high)."),
        ("span=[1, 2]", "key 'span' is [1, 2], but: it takes a section of keys (low, high)."),
        ("network={kind: trunk}", "key 'network.weights' is missing; "),
        ("network={kind: tree}", "key 'network.kind' is 'tree', but: Input should be 'ladder', or "),
    ],
)
def test_a_value_of_several_kinds_is_told_in_one_sentence_and_in_the_users_words(override, said):
    with pytest.raises(ConfigError) as refused:
        load_config(Search, overrides=[override])
    assert str(refused.value).startswith(f"the command line: {said}")
    assert str(refused.value).count("the command line: ") == 1
    assert not re.search(r"tuple|Span|function-|dictionary|instance of", str(refused.value))


def test_what_the_file_alone_has_in_a_list_is_the_files(recipe):
    class Mixture(StrictModel):
        parts: tuple[Span, ...]
        seed: int = 0

    recipe.write_text("parts: [{low: 1}]")
    with pytest.raises(ConfigError, match=r"recipe\.yaml: key 'parts\.0\.high' is missing"):
        load_config(Mixture, recipe, ["seed=1"])

"""Read a YAML recipe into a validated pydantic model."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from boldforge.configs.errors import ConfigError

_PACKAGE_FOLDER = Path(__file__).parent
_ALIKE = 0.6
_COMMAND_LINE = "the command line"
# An address with a password or a signature, up to the end: either may hold any character.
_SECRET = re.compile(r"://.*[@?#].*", re.DOTALL)


class StrictModel(BaseModel):
    """A frozen config section that refuses unknown keys; its errors repeat no value, which may be a password."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


Config = TypeVar("Config", bound=BaseModel)


def recipe_names() -> list[str]:
    """Return the packaged recipes as ``folder/name.yaml``, sorted."""
    return sorted(str(path.relative_to(_PACKAGE_FOLDER)) for path in _PACKAGE_FOLDER.glob("*/*.yaml"))


def recipe_path(name: str | Path) -> Path:
    """Find a recipe: the user's own file first, then the packaged one.

    Parameters
    ----------
    name
        A path, or a packaged recipe with or without the ``configs/`` prefix, e.g. ``configs/pretrain/tiny.yaml``.

    Raises
    ------
    ConfigError
        If neither exists.
    """
    path = Path(name)
    if path.is_file():
        return path
    parts = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
    packaged = _PACKAGE_FOLDER.joinpath(*parts) if parts else _PACKAGE_FOLDER
    inside = packaged.resolve().is_relative_to(_PACKAGE_FOLDER.resolve())
    if inside and packaged.is_file() and packaged.suffix == ".yaml":
        return packaged
    nearest = _nearest_recipe(str(Path(*parts).with_suffix("")) if parts else "")
    hint = f"did you mean {nearest}? Else give" if nearest else "give"
    raise ConfigError(f"{name}: no such recipe; {hint} a YAML file, or one of: {', '.join(recipe_names())}.")


def _nearest_recipe(asked: str) -> str | None:
    """Return the packaged recipe that shares most words with a name, in any order, and is spelt most like it."""

    def likeness(recipe: str) -> float:
        theirs, ours = asked.lower(), recipe.removesuffix(".yaml")
        words, known = (set(re.findall(r"[a-z0-9]+", name)) for name in (theirs, ours))
        spellings = ((theirs, ours), (" ".join(sorted(words)), " ".join(sorted(known))))
        spelt = max(difflib.SequenceMatcher(None, *pair).ratio() for pair in spellings)
        return (len(words & known) / len(words | known) + spelt) / 2

    nearest = max(recipe_names(), key=likeness)
    return nearest if likeness(nearest) >= _ALIKE else None


def load_config(
    model: type[Config],
    source: str | Path | Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """Build a config from a recipe and overrides.

    Parameters
    ----------
    model
        The pydantic class that defines the keys.
    source
        A recipe (see `recipe_path`), a mapping, or None for the defaults.
    overrides
        ``section.key=value`` strings; values are read as YAML, so ``steps=100`` is a number.

    Raises
    ------
    ConfigError
        For a file that is not a YAML mapping, an unknown key (with the nearest valid name) or a wrong value.
    """
    path = None if source is None or isinstance(source, Mapping) else recipe_path(source)
    written = _read_yaml(path) if path is not None else {}
    content = dict(source) if isinstance(source, Mapping) else dict(written)
    given = [_apply_override(content, override) for override in overrides]
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ConfigError(" ".join(_sentences(error, model, content, _Origin(path, written, given)))) from None


class _Origin(NamedTuple):
    """Where a recipe's keys come from: a file and what is written in it, and the keys that the command line gives."""

    path: Path | None
    written: Mapping[str, Any]
    given: Sequence[tuple[str, ...]]

    def of(self, place: Sequence[Any]) -> str:
        """Say whose mistake one at this place is; () for a rule between keys."""
        keys = tuple(str(part) for part in place)
        if self.path is None or any(keys[: len(key)] == key for key in self.given):
            return _COMMAND_LINE
        if not any(key[: len(keys)] == keys for key in self.given):
            return str(self.path) if self._writes(place[:-1]) else _COMMAND_LINE
        return f"{self.path} with the command line's changes" if self._writes(place) else _COMMAND_LINE

    def _writes(self, place: Sequence[Any]) -> bool:
        here: Any = self.written
        for part in place:
            if not _holds(here, part):
                return False
            here = here[part]
        return True


def _holds(value: Any, part: Any) -> bool:
    """Whether a value of a recipe has this key, or this place in its list."""
    if isinstance(value, Mapping):
        return part in value
    return isinstance(value, list | tuple) and isinstance(part, int) and part < len(value)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not valid YAML ({_SECRET.sub('://…', ' '.join(str(error).split()))}).") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds {type(content).__name__}, expected a mapping of keys to values.")
    return content


def _apply_override(content: dict[str, Any], override: str) -> tuple[str, ...]:
    """Set a key and return its place."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{_shown(override)}: overrides are written key=value, for example optimizer.lr=1e-4.")
    *sections, last = key.strip().split(".")
    here = content
    for section in sections:
        below = here.setdefault(section, {})
        if not isinstance(below, dict):
            raise ConfigError(f"{_shown(override)}: {section!r} holds a single value, it has no key {last!r}.")
        here[section] = here = dict(below)
    try:
        here[last] = _number_or_yaml(text)
    except yaml.YAMLError:
        raise ConfigError(f"{_shown(override)}: the value is not valid YAML.") from None
    return (*sections, last)


def _number_or_yaml(text: str) -> Any:
    # YAML 1.1 reads 1e-4 (no dot) as a string; nobody who writes it means one.
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


class _Problem(NamedTuple):
    """One thing that is wrong: at which place, and what pydantic says of it."""

    place: tuple[Any, ...]
    found: Mapping[str, Any]
    alternative: tuple[tuple[Any, ...], Any] | None
    """Where a value may be of several kinds: that value's place, and the kind that was tried."""

    @property
    def another_kind(self) -> bool:
        """Whether the value is not even of the kind that was tried."""
        kind, at = self.found["type"], self.alternative[0] if self.alternative else None
        return (self.place == at and kind.endswith("_type")) or (
            at is not None and self.place == (*at, "kind") and kind == "literal_error"
        )


def _sentences(
    error: ValidationError, model: type[BaseModel], content: Mapping[str, Any], origin: _Origin
) -> Iterator[str]:
    for problems in _told(error, content):
        place, problem = problems[0].place, problems[0].found
        name = origin.of(place)
        key = ".".join(str(part) for part in place)
        valid = _valid_keys(model, place[:-1])
        if problem["type"] == "extra_forbidden":
            nearest = _nearest(str(place[-1]), valid)
            meant = ".".join([*(str(part) for part in place[:-1]), nearest or ""])
            hint = f"did you mean {meant!r}?" if nearest else f"valid keys are {', '.join(valid)}."
            yield f"{name}: unknown key {key!r}; {hint}"
        elif problem["type"] == "missing":
            yield f"{name}: key {key!r} is missing; set it in the file or on the command line as {key}=VALUE."
        elif not key:  # a rule between keys, whose message names them
            yield f"{name}: {_message(problem)}."
        elif problem["type"] == "value_error" and isinstance(problem["input"], Mapping | BaseModel):
            yield f"{name}: key {key!r}: {_message(problem)}."  # a rule between keys of a section
        else:
            said = ", or ".join(dict.fromkeys(_message(one.found, model, place) for one in problems))
            nearest = _nearest_choice(problem)
            end = f"; did you mean {nearest!r}?" if nearest else "."
            yield f"{name}: key {key!r} is {_shown(problem['input'])}, but: {said}{end}"


def _told(error: ValidationError, content: Mapping[str, Any]) -> list[list[_Problem]]:
    """Return what is worth telling; problems that are told in one sentence together.

    Where a value may be of several kinds, pydantic tells of each why it is not that. Only the kinds that it could have
    been meant as are kept, or else all of them as one.
    """
    problems = [_placed(found, content) for found in error.errors(include_url=False)]
    unlike = {problem.alternative for problem in problems if problem.another_kind}
    meant = {
        problem.alternative[0] for problem in problems if problem.alternative and problem.alternative not in unlike
    }
    # What is told of a value that is none of them: its kind where it names one, else what it should have been.
    deepest: dict[Any, int] = {}
    for problem in problems:
        if problem.alternative and problem.another_kind:
            at = problem.alternative[0]
            deepest[at] = max(deepest.get(at, 0), len(problem.place))
    told: dict[Any, list[_Problem]] = {}
    for number, problem in enumerate(problems):
        if problem.alternative is None or problem.alternative not in unlike:
            told[number] = [problem]
            continue
        at = problem.alternative[0]
        if at not in meant and problem.another_kind and len(problem.place) == deepest[at]:
            told.setdefault(problem.place, []).append(problem)
    return list(told.values())


def _placed(found: Mapping[str, Any], content: Mapping[str, Any]) -> _Problem:
    """Find the place in the content, without the names that pydantic gives to kinds of values."""
    here: Any = content
    place: tuple[Any, ...] = ()
    alternative = None
    for number, part in enumerate(found["loc"], start=1):
        if _holds(here, part):
            place, here = (*place, part), here[part]
        elif found["type"] == "missing" and number == len(found["loc"]):
            place = (*place, part)
        elif alternative is None:
            alternative = (place, part)
    return _Problem(place, found, alternative)


def _message(problem: Mapping[str, Any], model: type[BaseModel] | None = None, place: Sequence[Any] = ()) -> str:
    """Return what is wrong, in words that need no knowledge of Python."""
    kind, value = problem["type"], problem["input"]
    if kind in ("tuple_type", "list_type"):
        plain = value is None or isinstance(value, Mapping | str)
        return "it takes a list" if plain else f"it takes a list, such as {[value]}"
    if kind in ("model_type", "model_attributes_type") and model is not None:
        return f"it takes a section of keys ({', '.join(_valid_keys(model, place))})"
    if kind == "dict_type":
        return "it takes a section of keys and values"
    if kind == "path_type":
        return "it takes a path"
    if kind == "too_short":
        least = problem["ctx"]["min_length"]
        return f"it takes at least {least} value{'s' * (least != 1)}"
    return str(problem["msg"].removeprefix("Value error, "))


def _nearest_choice(problem: Mapping[str, Any]) -> str | None:
    """Return the choice that was probably meant where a key takes one of several words."""
    if problem["type"] != "literal_error" or not isinstance(problem["input"], str):
        return None
    return _nearest(problem["input"], re.findall(r"'([^']*)'", problem["ctx"]["expected"]))


def _shown(value: Any) -> str:
    """Return what a message shows of a value: addresses without their passwords and signatures."""
    return repr(_SECRET.sub("://…", value)) if isinstance(value, str) else _SECRET.sub("://…", repr(value))


def _nearest(name: str, names: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.5)), None)


def _valid_keys(model: type[BaseModel], place: Sequence[Any]) -> list[str]:
    """Return the keys of the section at a place such as ``("shards", 0)``, whose parts are keys and places in lists."""
    for part in place:
        # A number is a place in a list, whose entries' class the key before it has led to already; so is the name that
        # pydantic gives to one of several kinds that a value may be of.
        if (field := model.model_fields.get(str(part))) is not None:
            below = next(_sections(field.annotation), None)
            if below is None:
                return []
            model = below
    return list(model.model_fields)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """Find the sections in an annotation, also inside lists and alternatives."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)

"""Read a YAML recipe: base composition, `--set` overrides, validation that lists every problem at once."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError

from longspan.errors import ConfigError, Problem, UsageError

PACKAGED_CONFIGS = Path(__file__).resolve().parent.parent / "configs"
_MAX_BASE_DEPTH = 16

Model = TypeVar("Model", bound=BaseModel)


def find_recipe(path: str | Path) -> Path:
    """The recipe's file: as given, or among the packaged recipes when the path starts with `configs/`.

    Raises:
        UsageError: there is no such file; names the nearest recipes.
    """
    path = Path(path)
    if path.is_file():
        return path
    inside = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    if not path.is_absolute() and (PACKAGED_CONFIGS / inside).is_file():
        return PACKAGED_CONFIGS / inside
    if path.is_dir():
        raise UsageError(f"{path} is a folder, not a recipe. Name a YAML file.")
    known = sorted(f"configs/{p.relative_to(PACKAGED_CONFIGS)}" for p in PACKAGED_CONFIGS.rglob("*.yaml"))
    near = difflib.get_close_matches(str(path), known, n=3, cutoff=0.6)
    listed = ", ".join(name for name in known if not name.startswith("configs/model/"))
    advice = f"Did you mean {', '.join(near)}?" if near else f"Packaged recipes: {listed}; models in configs/model/."
    raise UsageError(f"no recipe at {path}. {advice}")


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The recipe with its `base` files merged under it, later ones winning, its own keys last."""
    return _read(find_recipe(path), depth=0)


def _read(path: Path, depth: int) -> dict[str, Any]:
    if depth > _MAX_BASE_DEPTH:
        raise UsageError(f"{path}: `base` files nest deeper than {_MAX_BASE_DEPTH}; is there a cycle?")
    try:
        own = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(own, dict):
        raise UsageError(f"{path}: a recipe is a mapping of sections, this is {type(own).__name__}.")
    bases = own.pop("base", [])
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        nearby = path.parent / base
        merged = merge(merged, _read(nearby if nearby.is_file() else find_recipe(base), depth + 1))
    return merge(merged, own)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`: mappings merge key by key, everything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def apply_overrides(raw: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A copy of `raw` with each `section.field=value` set; values are read as YAML.

    Raises:
        UsageError: an override has no `=` or goes through something that is not a section.
    """
    raw = copy.deepcopy(raw)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise UsageError(f"--set {override}: write it as section.field=value.")
        *sections, field = name.split(".")
        place = raw
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise UsageError(f"--set {override}: {section} is a value, not a section.")
        try:
            place[field] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {override}: the value is not readable YAML: {error}") from error
    return raw


def validate(
    schema: type[Model],
    raw: dict[str, Any],
    subject: str,
    cross_check: Callable[[Model], list[Problem]] | None = None,
) -> Model:
    """Build `schema` from `raw`; raise one ConfigError with every problem, cross-field ones included.

    When single fields are wrong, the cross-field checks still run on what is left without those fields, so that
    a recipe with three mistakes is mended in one round.
    """
    try:
        config = schema.model_validate(raw)
    except ValidationError as error:
        errors = _innermost(error.errors())
        problems = [_problem(schema, details) for details in errors]
        if cross_check is not None:
            problems += _cross_problems_of_rest(schema, raw, errors, cross_check)
        raise ConfigError(subject, problems) from None
    problems = cross_check(config) if cross_check is not None else []
    if problems:
        raise ConfigError(subject, problems)
    return config


def load(
    schema: type[Model],
    path: str | Path,
    overrides: list[str] | None = None,
    cross_check: Callable[[Model], list[Problem]] | None = None,
) -> Model:
    """Read, override and validate the recipe at `path`."""
    raw = apply_overrides(read_recipe(path), overrides or [])
    return validate(schema, raw, f"recipe {path}", cross_check)


def dump(config: BaseModel) -> str:
    """The resolved configuration as YAML that `load` reads back to an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _problem(schema: type[BaseModel], details: Any) -> Problem:
    where = _dotted(details["loc"])
    if details["type"] == "extra_forbidden":
        return Problem(where, f"unknown key.{_suggestion(schema, details['loc'])}")
    if details["type"] == "missing":
        return Problem(where, "required, but not given.")
    if details["type"] == "union_tag_invalid":
        kind, tag = details["ctx"]["discriminator"].strip("'"), details["ctx"]["tag"]
        allowed = details["ctx"]["expected_tags"].replace("'", "")
        return Problem(f"{where}.{kind} = {tag!r}", f"unknown {kind}. Allowed: {allowed}.")
    value = details.get("input")
    shown = "" if isinstance(value, (dict, list)) else f" = {'null' if value is None else repr(value)}"
    return Problem(f"{where}{shown}", f"{_reason(details)}.")


def _reason(details: Any) -> str:
    """Pydantic's reason in words that fit YAML: it speaks of tuples, dictionaries and instances."""
    if details["type"] in ("tuple_type", "list_type"):
        return "input should be a list"
    if details["type"] in ("model_type", "dict_type", "model_attributes_type"):
        return "input should be a section with fields"
    if details["type"] == "too_short":
        return f"list should have at least {details['ctx']['min_length']} items, not {details['ctx']['actual_length']}"
    message = details["msg"].removeprefix("Value error, ")
    return f"{message[0].lower()}{message[1:]}"


def _is_union_tag(part: Any, location: tuple[Any, ...]) -> bool:
    """Pydantic puts the tag of a discriminated union after the list index; readers of recipes do not want it."""
    place = location.index(part)
    return isinstance(part, str) and place > 0 and isinstance(location[place - 1], int)


def _dotted(location: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in location if not _is_union_tag(part, location))


def _suggestion(schema: type[BaseModel], location: tuple[Any, ...]) -> str:
    prefix, _, last = _dotted(location).rpartition(".")
    siblings = list(_schema_at(schema, location[:-1]).model_fields)
    near = difflib.get_close_matches(last, siblings, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {prefix + '.' if prefix else ''}{near[0]}?"
    by_field = {path.rpartition(".")[2]: path for path in _field_paths(schema)}
    elsewhere = difflib.get_close_matches(last, list(by_field), n=1, cutoff=0.75)
    if elsewhere:
        return f" Did you mean {by_field[elsewhere[0]]}?"
    return f" Allowed here: {', '.join(sorted(siblings))}."


def _schema_at(schema: Any, location: tuple[Any, ...]) -> type[BaseModel]:
    """The schema that an error's location points into: through fields, list items and tags of unions."""
    for part in location:
        if isinstance(schema, type) and issubclass(schema, BaseModel):
            schema = schema.model_fields[part].annotation
        elif isinstance(part, int):
            schema = get_args(schema)[0]
        else:
            schema = next(option for option in _options(schema) if part in _tags(option))
        if not isinstance(schema, type):
            models = [
                option for option in _options(schema) if isinstance(option, type) and issubclass(option, BaseModel)
            ]
            schema = models[0] if len(models) == 1 else schema
    return cast("type[BaseModel]", schema)


def _options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, seen through `Annotated`."""
    inner = get_args(annotation)
    return get_args(inner[0]) if inner and len(get_args(inner[0])) > 1 else inner


def _tags(option: Any) -> set[Any]:
    return {tag for field in option.model_fields.values() for tag in get_args(field.annotation)}


def _field_paths(schema: type[BaseModel], prefix: str = "") -> list[str]:
    paths = []
    for name, field in schema.model_fields.items():
        paths.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            paths += _field_paths(field.annotation, f"{prefix}{name}.")
    return paths


def _innermost(errors: list[Any]) -> list[Any]:
    """Drop an error about a list whose items are wrong themselves: it only repeats them."""
    locations = [details["loc"] for details in errors]
    return [
        details
        for details in errors
        if details["type"] != "too_short"
        or not any(other != details["loc"] and other[: len(details["loc"])] == details["loc"] for other in locations)
    ]


def _cross_problems_of_rest(
    schema: type[Model], raw: dict[str, Any], errors: list[Any], cross_check: Callable[[Model], list[Problem]]
) -> list[Problem]:
    """Cross-field problems of `raw` without its wrong fields; problems that name such a field are left out."""
    rest = copy.deepcopy(raw)
    for details in errors:
        _remove(rest, details["loc"])
    doubtful = {_dotted(details["loc"]) for details in errors if details["type"] != "extra_forbidden"}
    for _ in range(2):  # once to see which required fields are gone now, once with stand-ins for them
        try:
            found = cross_check(schema.model_validate(rest))
            return [problem for problem in found if not any(name in str(problem) for name in doubtful)]
        except ValidationError as error:
            for details in error.errors():
                if details["type"] == "missing":
                    doubtful.add(_dotted(details["loc"]))
                    _insert(rest, details["loc"], _STAND_INS.get(_dotted(details["loc"]), 1))
    return []


# valid values for required fields that are wrong or not given, where 1 is not one; layers that ask for nothing
_STAND_INS = {"name": "stand-in", "data.shards": "stand-in", "model.layers": [{"mixer": "sliding_window"}]}


def _remove(place: Any, location: tuple[Any, ...]) -> None:
    """Take the field at `location` out of its section; a wrong item takes its whole list with it."""
    path = [part for part in location if not _is_union_tag(part, location)]
    while path and isinstance(path[-1], int):
        path.pop()
    section = _section(place, path)
    if section is not None:
        section.pop(path[-1], None)


def _insert(place: Any, location: tuple[Any, ...], value: Any) -> None:
    path = [part for part in location if not _is_union_tag(part, location)]
    section = _section(place, path)
    if section is not None:
        section[path[-1]] = value


def _section(place: Any, path: list[Any]) -> dict[Any, Any] | None:
    """The mapping that holds the last part of `path`; None if there is no such place."""
    for part in path[:-1]:
        try:
            place = place[part]
        except (KeyError, IndexError, TypeError):
            return None
    return place if path and isinstance(place, dict) else None

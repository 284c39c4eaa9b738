"""How mistakes in settings are told."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator
from datetime import date
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from dmir.errors import DmirError, suggestion
from dmir.settings import Model

QUOTES = "expected text; put a name into quotes ('2021', 'yes'), or YAML makes a number, a truth value or a date of it"


class ConfigError(DmirError):
    """A configuration that cannot be used: every mistake in it, one a line."""

    def __init__(self, source: str, problems: list[str]) -> None:
        self.problems = problems
        plural = "mistake" if len(problems) == 1 else "mistakes"
        super().__init__(f"{source}: {len(problems)} {plural}\n" + "\n".join(f"  {p}" for p in problems))


def shown(value: Any) -> str:
    """Return a value as a message shows it: in one line, and not the whole of what is large or nested."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlist, short.maxtuple, short.maxdict = 3, 200, 200, 8, 8, 8
    try:
        return short.repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return "a number of thousands of digits"


def mistakes_of(build: Callable[[], Any], where: str = "") -> list[str]:
    """Build settings and return what is wrong with them, one ``key: what`` a line; nothing wrong, an empty list."""
    try:
        build()
    except ValidationError as error:
        return mistakes(error, where)
    except (ValueError, DmirError) as error:
        return [f"{where}: {error}"]
    return []


def mistakes(error: ValidationError, prefix: str = "") -> list[str]:
    """Say each mistake that pydantic found as ``key: what is wrong``."""
    root = next((model for model in _descendants(Model) if model.__name__ == error.title), Model)
    lines = []
    for item in error.errors(include_url=False):
        model, path = _resolve(root, item["loc"])
        where = ".".join([prefix, *path] if prefix else path)
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = f"found an unknown key. {suggestion(path[-1], model.model_fields)}"
        elif item["type"] == "missing":
            message = "found nothing; this key is required"
        elif item["type"] == "string_type" and isinstance(item["input"], bool | int | float | date):
            message = f"found {shown(item['input'])}; {QUOTES}"
        elif item["type"] != "value_error":
            message = f"found {shown(item['input'])}; {message[0].lower()}{message[1:]}"
        lines += [f"{where}: {line}" if where else line for line in message.splitlines()]
    return lines


def _descendants(model: type[Model]) -> Iterator[type[Model]]:
    for child in model.__subclasses__():
        yield child
        yield from _descendants(child)


def _resolve(root: type[Model], location: tuple[int | str, ...]) -> tuple[type[Model], list[str]]:
    """Return the model that a location lies in, and its path of keys without the tags of unions."""
    candidates, path = [root], []
    for part in location:
        tagged = [model for model in candidates if len(candidates) > 1 and part in _tags(model)]
        if tagged:
            candidates = tagged
            continue
        path.append(str(part))
        field = candidates[0].model_fields.get(str(part))
        if field is not None and len(candidates) == 1:
            candidates = list(models_in(field.annotation)) or candidates
    return candidates[0], path


def models_in(annotation: Any) -> Iterator[type[Model]]:
    """Yield the models that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, Model):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


def _tags(model: type[Model]) -> set[Any]:
    literals = (field.annotation for field in model.model_fields.values() if field.is_required())
    return {tag for annotation in literals if get_origin(annotation) is Literal for tag in get_args(annotation)}


def unique_mistakes(key: str, names: list) -> list[str]:
    """Say what is wrong with a list of which each is to stand there once: nothing in it, or one more often."""
    if not names:
        return [f"{key}: found an empty list; expected at least one"]
    repeated = sorted({str(n) for n in names if names.count(n) > 1})
    return [f"{key}: {', '.join(repeated)} stands there more than once"] if repeated else []

"""What a setting is: declared as a field, checked, read from records and written to them."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Set
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from enum import StrEnum
from types import NoneType
from typing import Any, ClassVar, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from safeweights_peft.errors import SettingsError

Kind = TypeVar("Kind")


class Setting(NamedTuple):
    """One setting: what it may be, and how the command line names and explains it."""

    help: str
    group: str = ""
    flag: str = ""
    # The range; the largest float as its bound keeps infinity out, and NaN is in no range.
    least: float = -sys.float_info.max
    above: float = -math.inf  # itself outside
    most: float = sys.float_info.max
    choices: tuple[str, ...] = ()
    unset: str = ""  # what None means
    word: str = ""  # by which options and files, which have no None, may give it
    older: Any = None  # the value in records that are older than the setting
    # `settings_of` reads these from the field.
    name: str = ""
    kind: type[Any] = str  # bool, int, float, str or a StrEnum
    is_optional: bool = False
    is_repeated: bool = False  # whether it is a tuple, whose items are of this kind
    default: Any = None

    @property
    def range(self) -> str:
        """The range in words, such as "above 0 and at most 1"; empty if it has no bounds."""
        bounds = (("at least", self.least), ("above", self.above), ("at most", self.most))
        given = ((word, bound) for word, bound in bounds if abs(bound) < sys.float_info.max)
        return " and ".join(f"{word} {bound:.10g}" for word, bound in given)

    def check(self, value: Any) -> Any:
        """Return a value, as a member where it is an enum's; refuse what the setting can't be."""
        if (value is None and self.is_optional) or self.is_word(value):
            return None
        if self.is_repeated:
            return self._check_items(value)
        if self.choices:
            if value in self.choices:
                return self.kind(value)
            expected = f"one of {', '.join(self.choices)}"
        elif type(value) is not self.kind and (self.kind, type(value)) != (float, int):
            expected = self.kind.__name__
        elif self.kind in (bool, str) or self._allows(value):
            return value
        else:
            expected = f"a number {self.range}" if self.range else "a finite number"
        expected += f" or {self.word!r}" if self.word else ""
        found = repr(value)[:80]
        raise SettingsError(f"{self.name}: expected {expected}, found {found}; choose another")

    def is_word(self, value: Any) -> bool:
        """Tell whether a value is the word for None."""
        return self.word != "" and value == self.word

    def _check_items(self, values: Any) -> tuple[Any, ...]:
        item = self._replace(is_repeated=False)
        items = tuple(map(item.check, values)) if isinstance(values, list | tuple) else ()
        if not items or len({*items}) < len(items):
            found = repr(values)[:80]
            raise SettingsError(
                f"{self.name}: expected at least one, and none twice, found {found}; correct it"
            )
        return items

    def _allows(self, number: float) -> bool:
        return number > self.above and self.least <= number <= self.most


def setting(default: Any, help: str, **option: Any) -> Any:
    """Declare a field of `Settings`; its flag and group have defaults."""
    return field(default=default, metadata={"setting": Setting(help, **option)})


@dataclass(frozen=True)
class Settings:
    """The settings of one job, checked when they are made."""

    heading: ClassVar[str]  # of the options that have no other group

    def __post_init__(self) -> None:
        """Check every setting."""
        for item in settings_of(type(self)):
            object.__setattr__(self, item.name, item.check(getattr(self, item.name)))


def settings_of(job: type[Settings]) -> tuple[Setting, ...]:
    """List the settings of a class with their names, types and defaults."""
    hints, settings = get_type_hints(job), []
    for item in fields(job):
        option: Setting = item.metadata["setting"]
        kind, *others = get_args(hints[item.name]) or (hints[item.name],)
        completed = option._replace(
            name=item.name,
            flag=option.flag or f"--{item.name.replace('_', '-')}",
            group=option.group or job.heading,
            unset=option.unset or option.word,
            kind=kind,
            choices=tuple(map(str, kind)) if issubclass(kind, StrEnum) else option.choices,
            is_optional=NoneType in others,
            is_repeated=Ellipsis in others,
            default=item.default,
        )
        settings.append(completed)
    return tuple(settings)


def find_older(job: type[Settings]) -> dict[str, Any]:
    """List the values that settings have in records older than themselves."""
    return {item.name: item.older for item in settings_of(job) if item.older is not None}


def restore(kind: type[Kind], values: Any, where: str, *, partial: bool = False) -> Kind:
    """Make a dataclass, and those inside it, of JSON; refuse other names and other types.

    Every field must be there, unless ``partial`` lets those that have one keep their default.
    """
    fix = "correct it" if partial else "use the version of safeweights-peft that wrote it"
    hints = get_type_hints(kind)
    known = {item.name: item.default for item in fields(kind)}  # type: ignore[arg-type]
    needed = {name for name, default in known.items() if default is MISSING or not partial}
    if issubclass(kind, Settings):
        # A record that is older than a setting was made without it.
        older = find_older(kind)
        needed -= {name for name, default in known.items() if default is None or default is False}
        needed -= older.keys()
        if isinstance(values, Mapping) and not partial:
            values = older | {**values}
    if not isinstance(values, Mapping) or not needed <= values.keys() <= known.keys():
        found = _compare_names(values, known, needed)
        raise SettingsError(f"{where}: expected {', '.join(known)}, found {found}; {fix}")

    def build(hint: Any, value: Any, where: str) -> Any:
        if isinstance(hint, type) and is_dataclass(hint):
            return restore(hint, value, where, partial=partial)
        if get_origin(hint) is dict and isinstance(value, Mapping):
            inner = get_args(hint)[1]
            return {key: build(inner, item, f"{where}.{key}") for key, item in value.items()}
        for allowed in get_args(hint) or (hint,):
            if type(value) is allowed or (allowed is float and type(value) is int):
                return value
        name = getattr(hint, "__name__", hint)
        raise SettingsError(f"{where}: expected {name}, found {repr(value)[:80]}; {fix}")

    if issubclass(kind, Settings):  # which check their values themselves
        try:
            return kind(**values)
        except SettingsError as error:
            raise SettingsError(f"{where}.{error}") from error
    return kind(
        **{name: build(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    )


def _compare_names(values: Any, known: Iterable[str], needed: Set[str]) -> str:
    """Say which of the known names are missing, and which others are there."""
    if not isinstance(values, Mapping):
        return repr(values)[:200]
    others = ", ".join(str(name) for name in values if name not in known)[:200]
    missing = ", ".join(name for name in known if name in needed - values.keys())
    parts = (others and f"{others} beside them", missing and f"no {missing}")
    return " and ".join(filter(None, parts))


def to_json(settings: Any) -> dict[str, Any]:
    """Make of one job's or a whole run's settings what JSON holds, where a tuple is a list."""
    content: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return content


def flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Name nested settings by their path, such as ``score.density``."""
    flat: dict[str, Any] = {}
    content = settings if isinstance(settings, Mapping) else to_json(settings)
    for key, value in content.items():
        is_nested = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{key}.") if is_nested else {prefix + key: value}
    return flat

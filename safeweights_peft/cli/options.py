"""Options made of settings, settings made of options, and what commands share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import click

from safeweights_peft.errors import SettingsError
from safeweights_peft.scales import ADDED, STEPS, split_scale
from safeweights_peft.schema import Setting, Settings, settings_of
from safeweights_peft.settings import RunSettings

Function = Callable[..., Any]
Decorator = Callable[[Function], Function]


class Command(click.Command):
    """A command whose help lists options by group."""

    def __init__(self, *args: Any, resumes: bool = False, **kwargs: Any) -> None:
        """Make a command; `resumes` if the same call goes on after an interruption."""
        super().__init__(*args, **kwargs)
        self.resumes = resumes

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, and let the group know which it is, should it fail."""
        ctx.meta["command"] = ctx
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each group."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record and isinstance(parameter, click.Option):
                groups.setdefault(getattr(parameter, "group", "Options"), []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


class _Option(click.Option):
    def __init__(self, *args: Any, group: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class _NumberOrWord(click.ParamType):
    """A number, or the word of a setting that can be left to find itself."""

    def __init__(self, setting: Setting) -> None:
        self.number, self.setting = click.types.convert_type(setting.kind), setting
        self.name = f"{self.number.name}|{setting.word}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert all but the word."""
        return value if self.setting.is_word(value) else self.number.convert(value, param, ctx)


def _find_type(setting: Setting) -> Any:
    if setting.word:
        return _NumberOrWord(setting)
    return click.Choice(setting.choices) if setting.choices else setting.kind


def command(name: str, **attributes: Any) -> Callable[[Function], Command]:
    """Make a command of a function, with `--json`, which `output.show` reads."""

    def decorate(function: Function) -> Command:
        command = click.command(name, cls=Command, **attributes)(function)
        # Added here, so that no command can lack it; kept in the context, as none decides by it.
        json = click.Option(
            ["--json"],
            is_flag=True,
            expose_value=False,
            callback=lambda ctx, _, value: ctx.meta.update(json=value),
            help="Print JSON, not a table.",
        )
        command.params.append(json)
        return command

    return decorate


def option(setting: Setting, group: str = "Options") -> Decorator:
    """Make an option of a setting; without a value given it is None."""

    def check(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
        if setting.is_word(value):
            return value  # as a word, since None is what was not given
        try:
            return setting.check(value) if value not in (None, ()) else None
        except SettingsError as error:
            message = str(error).removeprefix(f"{setting.name}: ")
            raise click.BadParameter(message, ctx, parameter) from error

    # What is on by default needs an option that turns it off.
    is_on = setting.kind is bool and setting.default is True
    return click.option(
        f"{setting.flag}/--no-{setting.flag.strip('-')}" if is_on else setting.flag,
        cls=_Option,
        group=group,
        # Not click's ranges: they let NaN pass, and refuse in other words than Python does.
        type=_find_type(setting),
        is_flag=setting.kind is bool,
        multiple=setting.is_repeated,
        # Not the setting's default: a --settings file comes before that, an option before both.
        default=None,
        callback=check,
        help=setting.help + _describe_values(setting),
    )


def max_asr(help: str) -> Decorator:
    """Make the option of a threshold on the ASR."""
    return option(Setting(help, flag="--max-asr", kind=float, least=0, most=1))


def max_over_refusal(help: str) -> Decorator:
    """Make the option of a threshold on over-refusal."""
    return option(Setting(help, flag="--max-over-refusal", kind=float, least=0, most=1))


def _describe_values(setting: Setting) -> str:
    default = setting.unset if setting.default is None else setting.default
    if isinstance(default, bool):
        return f"  [default: {setting.flag.strip('-')}]" if default else ""
    if setting.is_repeated:
        default = ", ".join(map(str, default))
    text = f"{default:g}" if isinstance(default, int | float) else default
    notes = [f"default: {text}"] if text else []
    if setting.kind is float and setting.range:  # that a count is positive needs no words
        notes.append(setting.range)
    return f"  [{'; '.join(notes)}]" if notes else ""


def _is_source(setting: Setting) -> bool:
    return setting.group == "Data" and setting.kind is str


def settings(
    *jobs: type[Settings], only: str = "", without: str = "", group: str = ""
) -> Decorator:
    """Make options of the settings of jobs: all, or some by their flags."""
    of_flag: dict[str, Setting] = {}
    for job in jobs:
        for setting in settings_of(job):
            of_flag.setdefault(setting.flag, setting)  # jobs may share one, such as --seed
    flags = only.split() or [flag for flag in of_flag if flag not in without.split()]
    options = [option(of_flag[flag], group or of_flag[flag].group) for flag in flags]
    if any(_is_source(of_flag[flag]) for flag in flags):
        options.append(column)
    # The last is applied first, as decorators are.
    return lambda function: reduce(lambda inner, add: add(inner), reversed(options), function)


def make_settings(values: Mapping[str, Any], *jobs: type[Settings]) -> list[Any]:
    """Make settings of the options given, over those of `--settings`, over the defaults."""
    run = values.get("settings")
    stored = {type(part): part for part in vars(run).values()} if run else {}
    made = []
    for job in jobs:
        names = {item.name: item.flag.strip("-").replace("-", "_") for item in settings_of(job)}
        # None is what was not given; no setting can be set to None by an option.
        changes = {name: values[p] for name, p in names.items() if values.get(p) is not None}
        if values.get("column"):
            sources = {item.name for item in settings_of(job) if _is_source(item)}
            changes |= {
                name: name_column(changes[name], values) for name in sources & changes.keys()
            }
        made.append(replace(stored.get(job) or job(), **changes))
    return made


def name_column(source: str, values: Mapping[str, Any]) -> str:
    """Put what `--column` names behind a source that an option gave."""
    from safeweights_peft.sources import with_column

    return with_column(source, values["column"])


def _read_settings(
    ctx: click.Context, parameter: click.Parameter, path: Path | None
) -> RunSettings | None:
    try:
        # BASE is the argument, whatever the file says: a run is repeated on another model so.
        return RunSettings.read(path, base="") if path else None
    except SettingsError as error:
        raise click.BadParameter(str(error), ctx, parameter) from error


class _Adapter(click.ParamType):
    """An adapter's directory; or its Hub id, perhaps @REVISION, and then it is fetched."""

    name = "adapter"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Find the directory: what is here comes before what is on the Hub."""
        if Path(value).is_dir():
            return Path(value)
        path, at, suffix = str(value).rpartition("@")
        if at and Path(path).is_dir():
            what = f"expected {path} alone, as a scale means nothing here, found @{suffix}"
            self.fail(f"{what}; leave it out", param, ctx)
        # The Hub's client takes longer to import than a patch to inspect.
        from safeweights_peft.hub.pull import fetch_adapter, is_hub_id

        return fetch_adapter(value) if is_hub_id(value) else DIRECTORY.convert(value, param, ctx)


class _Patch(click.ParamType):
    """A patch's directory or Hub id, perhaps with a factor on its values: PATCH or PATCH@SCALE."""

    name = "patch"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Path, float]:
        """Split off the scale."""
        try:
            path, scale = split_scale(str(value))
        except SettingsError as error:
            self.fail(str(error), param, ctx)
        return ADAPTER.convert(path, param, ctx), scale


added, repair_steps = option(ADDED), option(STEPS, "Training")
ADAPTER, PATCH = _Adapter(), _Patch()
DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
NEW = click.Path(path_type=Path)
NEW_FILE = click.Path(dir_okay=False, path_type=Path)

column = click.option(
    "--column",
    cls=_Option,
    group="Data",
    help="Column of the requests, in all sources that options name without #COLUMN.  [default: "
    "the usual ones, such as prompt or goal]",
)
base = click.argument("base", help="Model: directory or Hub id.")
adapter = click.argument(
    "adapter", type=ADAPTER, help="Safety patch or map: directory or Hub id[@REVISION]."
)
patch = click.argument(
    "patch",
    metavar="PATCH[@SCALE]",
    type=PATCH,
    help="Safety patch: directory or Hub id[@REVISION]; @0.5 halves its values.",
)
patch_to_add = click.option(
    "--adapter",
    "patch",
    metavar="PATCH[@SCALE]",
    type=PATCH,
    help="Safety patch to add: directory or Hub id; @0.5 halves its values.",
)
base_of_adapter = click.option(
    "--base", help="Base model: directory or Hub id.  [default: the one that the adapter names]"
)
out = click.option("--out", required=True, type=NEW, help="Directory to write.")
overwrite = click.option("--overwrite", is_flag=True, help="Replace an existing result.")
settings_file = click.option(
    "--settings",
    type=FILE,
    callback=_read_settings,
    help="Settings for what no option gives: a run's settings.json, or the same in TOML.",
)
dry_run = click.option("--dry-run", is_flag=True, help="Estimate memory and disk, then stop.")


def safety_map(help: str, required: bool = True) -> Decorator:
    """Make the option that takes a map, or whatever adapter its help says."""
    return click.option("--map", "map_dir", required=required, type=ADAPTER, help=help)


OF_BASE = "Safety map of BASE, or safety patch merged into it: directory or Hub id."
map_of_base = safety_map(OF_BASE)

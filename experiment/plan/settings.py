"""Where a plan comes from: the command line, the environment, plan.yaml and a preset, the first of which wins."""

import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliPositionalArg,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from experiment.plan.plan import Plan

PRESETS = Path(__file__).with_name("presets")
DEFAULT_PRESET = "quick"


# A key that the arrivals or the workload chosen would not read is an error where it was given: a duration without an
# arrival is a closed loop by mistake.
READ_BY: dict[str, dict[str, tuple[str, ...]]] = {
    "arrival": {
        "requests_per_user": ("closed",),
        "min_seconds": ("closed",),
        "duration_seconds": ("poisson", "constant"),
        "ramp_seconds": ("poisson", "constant"),
    },
    "workload": dict.fromkeys(("input_mean", "output_mean", "sigma"), ("lognormal",)),
}
# The keys by which the measured requests of a cell are counted, unless `requests` says how many there are.
COUNTS = ("requests_per_user", "min_requests", "min_seconds", "duration_seconds")


class PlanError(Exception):
    """Bad input; each line names the key, the value and what is allowed."""


def presets() -> list[str]:
    """Names of the presets that ship with Headroom."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


class _Files(PydanticBaseSettingsSource):
    """What plan.yaml says, over what its preset says."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError  # everything is read at once

    def __call__(self) -> dict[str, Any]:
        file = self.current_state.get("plan")
        own = _read_yaml(Path(file)) if file else {}
        preset = self.current_state.get("preset") or own.pop("preset", None) or DEFAULT_PRESET
        if preset not in presets():
            raise PlanError(f"preset: {preset!r}: expected one of {', '.join(presets())}")
        return {**_read_yaml(PRESETS / f"{preset}.yaml"), **own, "preset": preset}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"plan: {str(path)!r}: {os.strerror(error.errno or 0).lower()}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PlanError(f"plan: {str(path)!r}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise PlanError(f"plan: {str(path)!r}: expected keys and values, got {type(found).__name__}")
    return found


class Settings(Plan, BaseSettings):
    """Load each target in turn with the same requests and write a report.

    plan.yaml holds the same keys as the options, with underscores. Options win over HEADROOM_ variables, these over
    plan.yaml, and that over the preset.
    """

    model_config = SettingsConfigDict(
        env_prefix="HEADROOM_",
        cli_prog_name="headroom compare",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_implicit_flags=True,
        extra="forbid",
    )

    plan: CliPositionalArg[str | None] = Field(None, description="plan.yaml, or the plan.json of another run")
    preset: str | None = Field(None, description=f"plan to begin with: {', '.join(presets())}; default: quick")
    resume: str | None = Field(None, description="go on with the run in this folder; takes no other option")
    concurrency: list[Annotated[int, Field(ge=1, le=4096)]] | None = Field(
        None, min_length=1, description="the levels of a closed loop, by another name"
    )
    hf_url: str = Field("", pattern="^(https?://.+)?$", description="use the HF server there, start none")
    vllm_url: str = Field("", pattern="^(https?://.+)?$", description="use the vLLM server there, start none")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - neither is used
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Put the files after the environment."""
        return init_settings, env_settings, _Files(settings_cls)


def read_plan(arguments: Sequence[str]) -> Plan:
    """The plan that a command line asks for; raises PlanError, and SystemExit after --help or an unknown option."""
    try:
        settings = CliApp.run(Settings, cli_args=list(arguments))
        if settings.resume is not None:
            raise PlanError(f"resume: {settings.resume!r}: expected headroom compare --resume DIR and nothing else")
        plan = Plan.model_validate(_folded(settings))
        if unread := list(_unread(plan, settings)):
            raise PlanError("\n".join(unread))
        return plan
    except ValidationError as error:
        raise PlanError("\n".join(_problems(error))) from None
    except SettingsError as error:
        raise PlanError(str(error)) from None


def _unread(plan: Plan, settings: Settings) -> Iterator[str]:
    """The keys that were given and would change nothing; the plan.json of another run gives them all."""
    if settings.plan and settings.plan.endswith(".json"):
        return
    before = Plan.model_validate(_read_yaml(PRESETS / f"{settings.preset or DEFAULT_PRESET}.yaml"))
    for by, keys in READ_BY.items():
        chosen = getattr(plan, by)
        for name, readers in keys.items():
            value = getattr(plan, name)
            if chosen not in readers and value != getattr(before, name):
                yield f"{name}: {value:g}: is not read by {by} {chosen}; expected {by} {' or '.join(readers)}"
    for name in COUNTS if plan.requests else ():
        if (value := getattr(plan, name)) != getattr(before, name):
            yield f"{name}: {value:g}: is not read beside requests, which says how many there are"


def _folded(settings: Settings) -> dict[str, Any]:
    """The keys of a plan, with what is said by another name put in its place."""
    values = settings.model_dump(include=set(Plan.model_fields))
    if settings.concurrency:
        if settings.arrival != "closed":
            raise PlanError(f"concurrency: {settings.concurrency}: expected levels, as arrival is {settings.arrival}")
        values["levels"] = settings.concurrency
    for kind in ("hf", "vllm"):
        if url := getattr(settings, f"{kind}_url"):
            targets = [target for target in values["targets"] if target["kind"] == kind]
            if len(targets) != 1:
                raise PlanError(f"{kind}_url: {url!r}: expected one target of kind {kind}, the plan has {len(targets)}")
            if targets[0]["args"] or getattr(settings, f"{kind}_args"):
                raise PlanError(f"{kind}_url: {url!r}: that server runs already and takes no args")
            targets[0]["url"] = url
    return values


def _problems(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"] if part != "[key]")
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            close = difflib.get_close_matches(where, Settings.model_fields, 1)
            message = f"unknown key{f'; expected {close[0]}?' if close else ''}"
        shown = not isinstance(problem["input"], dict | Plan)
        yield ": ".join([*([where] if where else []), *([repr(problem["input"])] if where and shown else []), message])

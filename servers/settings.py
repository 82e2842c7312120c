"""What both servers are configured with, and how a command line becomes settings."""

import os
import socket
import sys
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict, SettingsError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class ServerSettings(BaseSettings):
    """The options that mean the same on both servers."""

    # A variable that is set to nothing, as a line of .env may, is as good as none.
    model_config = SettingsConfigDict(
        cli_kebab_case=True, cli_implicit_flags=True, cli_hide_none_type=True, env_ignore_empty=True
    )

    model: str = Field("random:tiny", description="a Hugging Face id, a folder, or random:SHAPE")
    host: str = Field("127.0.0.1", description="address to listen on")
    dtype: Dtype = Field("auto", description="weights and KV cache; auto: float32 on CPU, bfloat16 on GPU")
    max_model_len: int | None = Field(None, ge=2, description="prompt + output tokens; default: the model's own limit")
    threads: int | None = Field(None, ge=1, description="CPU threads for the model; default: all cores but one")
    kv_budget: int | None = Field(None, ge=1, description="most bytes of KV cache; default: the engine's own choice")
    per_request_metrics: bool = Field(False, description="say in each response how long it waited and ran")


Settings = TypeVar("Settings", bound=BaseSettings)


def parse(kind: type[Settings], program: str, arguments: Sequence[str]) -> Settings:
    """Read settings from the command line and the environment; on bad input say what is allowed and exit with 2."""
    try:
        # What follows -- must not pass through the parser, which would split it at commas and read JSON.
        own = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
        passed_on = list(arguments[len(own) + 1 :])
        given: dict[str, Any] = {"passed_on": passed_on} if passed_on else {}
        return CliApp.run(kind, cli_args=own, **given)
    except SettingsError as error:
        print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except ValidationError as error:
        for problem in error.errors():
            option = "--" + "-".join(str(part) for part in problem["loc"]).replace("_", "-")
            # An error without a place is about options that do not go together, and names them itself.
            where = f"{option}: {problem['input']!r}: " if problem["loc"] else ""
            print(f"{program}: {where}{problem['msg'].removeprefix('Value error, ')}", file=sys.stderr)
        raise SystemExit(2) from None


def listen(host: str, port: int) -> socket.socket:
    """Bind and listen; raises OSError that names the address and what to do."""
    try:
        return socket.create_server((host, port), backlog=1024)
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno and error.errno > 0 else error
        raise OSError(f"--port: {port}: cannot listen on {host}:{port}: {reason}; choose another port") from None


def cpu_cores(threads: int | None) -> list[int]:
    """Cores for the model on a CPU: as many as asked for, else all but one, which is left for HTTP and the clients."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[: threads or max(1, len(cores) - 1)]


def fail(program: str, message: object) -> SystemExit:
    """Print one line on standard error; the exit with status 1 that is returned is to be raised."""
    print(f"{program}: {message}", file=sys.stderr)
    return SystemExit(1)

"""The monitor's settings: from the command line, else from HEADROOM_MONITOR_* in the environment, else as here."""

from collections.abc import Iterable

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "HEADROOM_MONITOR_"


class Settings(BaseSettings):
    """Samples the memory of GPUs and of server processes, and serves the samples over HTTP."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, cli_kebab_case=True, cli_prog_name="monitor")

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(9400, ge=0, le=65535, description="port to listen on; 0 takes any free one")
    hz: int = Field(10, ge=1, le=100, description="samples a second")
    minutes: int = Field(30, ge=1, le=1440, description="how long samples are kept")
    max_cpu: float = Field(0.02, gt=0, le=1, description="share of a core that reading shared memory (PSS) may take")


VARIABLES = [PREFIX + field.upper() for field in Settings.model_fields]


def unknown_variables(environ: Iterable[str]) -> list[str]:
    """Answer the environment variables that look like settings but are none."""
    return sorted(name for name in environ if name.upper().startswith(PREFIX) and name.upper() not in VARIABLES)

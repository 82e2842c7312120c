"""The monitor's settings: from the command line, else from HEADROOM_MONITOR_* in the environment, else as here."""

from collections.abc import Iterable

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "HEADROOM_MONITOR_"
# Ticks of one device that are kept at most: an hour at 1 kHz (230 MB), or ten at 100 Hz (and 550 MB of processes).
MAX_TICKS = 3_600_000


class Settings(BaseSettings):
    """Samples the memory of GPUs and of server processes, and serves the samples over HTTP."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, cli_kebab_case=True, cli_prog_name="monitor")

    host: str = Field("127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(9400, ge=0, le=65535, description="port to listen on; 0 takes any free one")
    hz: int = Field(
        100,
        ge=1,
        le=1000,
        description="samples of the memory of each GPU a second; of its processes up to 100 while that changes and "
        "else 5, of utilization, power, clocks, throttling and temperature up to 10, of the servers' processes on "
        "the host 5, or without a GPU 10; energy, PCIe, NVLink and ECC are read once a second, or "
        "where that takes long once in 4 s for each GPU there is",
    )
    minutes: int = Field(30, ge=2, le=1440, description="how long samples are kept, in memory that is taken at once")
    max_cpu: float = Field(
        0.02,
        gt=0,
        le=1,
        description="share of a core for all sampling; of that 60 % are for the memory of GPUs, 10 % for their "
        "processes, 10 % for utilization, power, clocks, throttling and temperature, 5 % for energy, PCIe, NVLink and "
        "ECC, 10 % for the servers' processes on the host, 5 % for the memory that those share (PSS), without a GPU 90 "
        "and 10 %; what needs more is sampled less often; answering /timeline and /metrics is not part of it",
    )

    @model_validator(mode="after")
    def _fits(self) -> "Settings":
        if self.minutes * 60 * self.hz > MAX_TICKS:
            raise ValueError(
                f"--minutes {self.minutes} x 60 x --hz {self.hz} is more than the {MAX_TICKS} samples of a device that "
                f"may be kept: at {self.hz} Hz up to {MAX_TICKS // 60 // self.hz} minutes, "
                f"for {self.minutes} minutes up to {MAX_TICKS // 60 // self.minutes} Hz"
            )
        return self


VARIABLES = [PREFIX + field.upper() for field in Settings.model_fields]


def unknown_variables(environ: Iterable[str]) -> list[str]:
    """Answer the environment variables that look like settings but are none."""
    return sorted(name for name in environ if name.upper().startswith(PREFIX) and name.upper() not in VARIABLES)

"""The options of the HF server."""

from typing import Literal

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from servers.settings import ServerSettings

PROGRAM = "servers.hf"


class Settings(ServerSettings):
    """Serve a model with Hugging Face Transformers over the OpenAI API."""

    model_config = SettingsConfigDict(env_prefix="HEADROOM_HF_", cli_prog_name=PROGRAM)

    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free one")
    engine: Literal["sequential", "batch", "continuous"] = Field(
        "sequential",
        description="one request at a time; those that wait padded into one batch; Transformers' continuous batching",
    )
    max_batch: int = Field(32, ge=1, le=4096, description="requests that may run at once (not sequential)")
    max_wait_ms: float = Field(
        5.0, ge=0, le=60_000, description="how long a batch may fill up while requests keep coming in (batch)"
    )
    cache: Literal["dynamic", "static"] = Field(
        "dynamic", description="KV cache that grows, or the maximum length set aside for each row (not continuous)"
    )
    compile: bool = Field(False, description="compiled decode on a static cache, CUDA graphs on GPU (not continuous)")
    device_map: Literal["auto"] | None = Field(
        None, description="auto: layers spread over all GPUs (not continuous, not compiled); default: the first GPU"
    )
    max_waiting: int = Field(512, ge=0, description="requests that may wait; one more is answered with 429")
    drain_seconds: float = Field(10.0, ge=0, description="how long running requests may go on after SIGTERM")

    @model_validator(mode="after")
    def _possible(self) -> "Settings":
        if self.engine == "continuous" and (self.compile or self.cache == "static"):
            option = "--compile" if self.compile else "--cache static"
            raise ValueError(f"{option}: not possible with --engine continuous, whose cache is paged")
        if self.device_map and (self.compile or self.engine == "continuous"):
            option = "--compile" if self.compile else "--engine continuous"
            raise ValueError(f"--device-map: not possible with {option}, whose KV cache is on one device")
        return self

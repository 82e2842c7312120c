"""What Docker says of the files, without a stack."""

import re
import shutil
from pathlib import Path

import pytest

from tests.system.compose import ROOT, Compose, run

FILES = ["docker-compose.yml", "docker-compose.gpu.yml"]
OVER_GPU = "docker compose -f docker-compose.yml -f docker-compose.gpu.yml"
MOST_BYTES_OVER_BASE = 300e6


@pytest.mark.parametrize("files", [FILES[:1], FILES], ids=["cpu", "gpu"])
@pytest.mark.parametrize("settings", ["no .env", ".env.example", "all of .env.example"])
def test_compose_takes_the_files(files: list[str], settings: str, tmp_path: Path) -> None:
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    example = (ROOT / ".env.example").read_text()
    if settings != "no .env":
        whole = settings.startswith("all")
        (tmp_path / ".env").write_text(re.sub(r"^#(?=[A-Z_]+=)", "", example, flags=re.MULTILINE) if whole else example)
    options = [word for name in files for word in ("--file", name)]
    services = run("docker", "compose", *options, "--profile", "command", "config", "--services", folder=tmp_path)
    assert {"hf", "vllm", "monitor", "locust", "locust-worker", "headroom"} <= set(services.split())


@pytest.mark.parametrize(
    ("given", "begins"),
    [
        (["DEVICE=cpu"], "docker compose --profile command build docker compose up --detach --wait"),
        (["DEVICE=gpu"], f"{OVER_GPU} --profile command build {OVER_GPU} up --detach --wait"),
        (["DEVICE=cpu", "DOCKER=no", "-o", ".venv/ready-cpu"], 'echo "Docker with Compose v2 does not answer'),
    ],
)
def test_make_up_picks_by_what_the_machine_has(given: list[str], begins: str) -> None:
    planned = " ".join(run("make", "--no-print-directory", "-n", "up", *given).split())
    assert planned.startswith(begins), planned
    assert ("headroom up" in planned) == ("DOCKER=no" in given)


@pytest.mark.parametrize(("image", "dockerfile"), [("headroom-locust", "loadtest"), ("headroom-monitor", "monitor")])
def test_an_image_is_small(built: Compose, image: str, dockerfile: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = next(re.finditer(r"^FROM (\S+)", (built.folder / dockerfile / "Dockerfile").read_text(), re.MULTILINE))[1]
    size, under = (int(run("docker", "image", "inspect", "--format", "{{.Size}}", one)) for one in (image, base))
    with capsys.disabled():
        print(f"\n{image}: {(size - under) / 1e6:.0f} MB over {base}")
    assert size - under <= MOST_BYTES_OVER_BASE

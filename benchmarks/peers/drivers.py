"""How each client is told to send a load, and what it says that it saw. Nothing here measures."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from loadtest.calibrate import OwnLoad, read_seen
from loadtest.reference.probe import ARRIVAL_SECONDS, WARM_UP, Seen
from servers.models import cache_folder

LISTS = Path(__file__).parent
INSTALL_SECONDS = 1800
INPUT_TOKENS = 8


class UnavailableError(RuntimeError):
    """A peer that cannot be installed or does not run; the message says why."""


@dataclass(frozen=True)
class Load:
    """Requests to send: `streams` of them, spread evenly over ARRIVAL_SECONDS, each of `tokens` output tokens.

    WARM_UP more come before them at the same rate.
    `tokenizer` is a folder for clients that want one; `out` an empty folder for what they write.
    """

    url: str
    streams: int
    tokens: int
    tokenizer: str
    out: Path

    @property
    def requests(self) -> int:
        """All requests, the warm-up too."""
        return WARM_UP + self.streams

    @property
    def rate(self) -> float:
        """Requests per second; a few of them do not have to wait for long."""
        return max(self.streams, WARM_UP) / ARRIVAL_SECONDS


@dataclass(frozen=True)
class Client:
    """One load generator: its command, how to read its report, and what it needs in its environment."""

    command: Callable[[Load], list[str]]
    read: Callable[[Path], Iterator[Seen]]
    environment: Callable[[Load], dict[str, str]] = lambda _: {}


def headroom(load: Load) -> list[str]:
    """Headroom in an open loop with constant gaps."""
    return OwnLoad(load.url, load.requests, load.rate, load.tokens, load.out).command()


def plain(load: Load) -> list[str]:
    """The careful FastHttpUser."""
    file = str(LISTS / "fast_http_user.py")
    return [sys.executable, "-m", "locust", "-f", file, "--headless", "-u1", "--host", load.url, "--only-summary"]


def plain_environment(load: Load) -> dict[str, str]:
    """What its locustfile reads."""
    out = str(load.out / "seen.jsonl")
    return {
        "REQUESTS": str(load.requests),
        "RATE": str(load.rate),
        "TOKENS": str(load.tokens),
        "OUT": out,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(Path.cwd()), os.environ.get("PYTHONPATH")))),
    }


def read_plain(out: Path) -> Iterator[Seen]:
    """What its locustfile writes."""
    for row in map(json.loads, (out / "seen.jsonl").read_text().splitlines()):
        yield Seen(row["key"], row["ttft"], fmean(row["gaps"]), tuple(row["gaps"]))


def vllm_bench(load: Load) -> list[str]:
    """`vllm bench serve`, with gaps of a gamma distribution so narrow that they are constant."""
    options = {
        "backend": "openai",
        "base-url": load.url,
        "model": "reference",
        "tokenizer": load.tokenizer,
        "dataset-name": "random",
        "random-input-len": INPUT_TOKENS,
        "random-output-len": load.tokens,
        "num-prompts": load.requests,
        "request-rate": load.rate,
        "burstiness": 1_000_000,
        "request-id-prefix": "bench-",
        "ready-check-timeout-sec": 0,
        "result-dir": load.out,
        "result-filename": "result.json",
    }
    command = [sys.executable, "-m", "benchmarks.peers.vllm_bench", "--ignore-eos", "--save-result", "--save-detailed"]
    return [*command, "--disable-tqdm", *(f"--{name}={value}" for name, value in options.items())]


def read_vllm_bench(out: Path) -> Iterator[Seen]:
    """Its detailed result: TTFT and all gaps."""
    found = json.loads((out / "result.json").read_text())
    for number, (ttft, gaps, error) in enumerate(zip(found["ttfts"], found["itls"], found["errors"], strict=True)):
        if gaps and not error:
            yield Seen(f"bench-{number}", ttft, fmean(gaps), tuple(gaps))


def guidellm(load: Load) -> list[str]:
    """GuideLLM at a constant rate."""
    data = f"prompt_tokens={INPUT_TOKENS},output_tokens={load.tokens}"
    return [
        *[str(installed("guidellm") / "bin" / "guidellm"), "run", "--disable-console"],
        *["--backend", f"kind=openai_http,target={load.url},model=reference,request_format=/v1/completions"],
        *["--profile", f"kind=constant,rate={load.rate}", "--constraint", f"kind=max_requests,count={load.requests}"],
        *["--tokenizer", f"kind=hf_auto,model={load.tokenizer}", "--data", f"kind=synthetic_text,{data}"],
        *["--output", f"kind=json,path={load.out / 'result.json'}"],
    ]


def read_guidellm(out: Path) -> Iterator[Seen]:
    """Its report: the times of the first and of the last token."""
    found = json.loads((out / "result.json").read_text())
    for request in found["benchmarks"][0]["requests"]["successful"]:
        times = request["info"]["timings"]
        first, last = times["first_token_iteration"], times["last_token_iteration"]
        itl = (last - first) / (times["token_iterations"] - 1)
        yield Seen(request["response_id"], first - times["request_start"], itl)


def aiperf(load: Load) -> list[str]:
    """AIPerf at a constant rate, with the server's count of tokens."""
    options = {
        "model": "reference",
        "url": load.url,
        "endpoint-type": "completions",
        "tokenizer": load.tokenizer,
        "isl": INPUT_TOKENS,
        "isl-stddev": 0,
        "osl": load.tokens,
        "osl-stddev": 0,
        "request-count": load.requests,
        "request-rate": load.rate,
        "arrival-pattern": "constant",
        "extra-inputs": "ignore_eos:true",
        "artifact-dir": load.out,
        "export-level": "records",
        "ui": "none",
    }
    flags = ["--streaming", "--use-server-token-count", "--use-legacy-max-tokens"]
    flags += ["--no-gpu-telemetry", "--no-server-metrics"]
    command = [str(installed("aiperf") / "bin" / "aiperf"), "profile", *flags]
    return command + [part for name, value in options.items() for part in (f"--{name}", str(value))]


def read_aiperf(out: Path) -> Iterator[Seen]:
    """Its records: TTFT and mean ITL of each request, in milliseconds."""
    for row in map(json.loads, (out / "profile_export.jsonl").read_text().splitlines()):
        metrics = row["metrics"]
        if not row.get("error") and "inter_token_latency" in metrics:
            times = (metrics[name]["value"] / 1e3 for name in ("time_to_first_token", "inter_token_latency"))
            yield Seen(row["metadata"]["x_request_id"], *times)


#: AIPerf looks for a tokenizer's folder in the cache of the hub when it is told to be offline.
ONLINE = {"HF_HUB_OFFLINE": ""}
CLIENTS = {
    "headroom": Client(headroom, read_seen),
    "vllm-bench": Client(vllm_bench, read_vllm_bench),
    "fast-http-user": Client(plain, read_plain, plain_environment),
    "aiperf": Client(aiperf, read_aiperf, lambda _: ONLINE),
    "guidellm": Client(guidellm, read_guidellm),
}


def installed(name: str) -> Path:
    """Folder of a peer's own environment, made from its pinned list at first; raises UnavailableError."""
    wanted = LISTS / f"{name}.txt"
    folder = cache_folder() / "peers" / f"{name}-{hashlib.sha256(wanted.read_bytes()).hexdigest()[:12]}"
    if (folder / "ready").exists():
        return folder
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    for command in ([sys.executable, "-m", "venv", str(folder)], [*pip, "--no-deps", "-r", str(wanted)]):
        print(f"benchmarks.client: setting up {name}: {' '.join(command)}", file=sys.stderr)
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            raise UnavailableError(f"it cannot be installed: {done.stderr.strip()[-300:]}")
    (folder / "ready").touch()
    return folder

"""Others that watch a GPU beside the monitor: bare loops, `nvidia-smi`, and an exporter for Prometheus.

A bare loop is the least that sampling takes, in Python or in C: it sleeps, and asks NVML for the memory of one GPU.

nvitop-exporter reads NVML as the monitor does, about once a second. The user installs it, see HOW; nothing is put into
the project's own environment. Exporters that start `nvidia-smi` for each scrape cost what that costs.
"""

import multiprocessing
import signal
import socket
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from datetime import datetime
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pynvml

from experiment.run.stack import Program, RunError, end, get, spawn
from monitor.nvml import Reader

JSON = dict[str, Any]

EXPORTER = "nvitop-exporter"
HOW = (
    "python3 -m venv ~/nvitop && ~/nvitop/bin/pip install nvitop-exporter, then --exporter ~/nvitop/bin/nvitop-exporter"
)
SCRAPES, SCRAPE_SECONDS = 100, 0.05
START_SECONDS, STOP_SECONDS = 60.0, 10.0
#: What a program does when it starts, such as loading the driver, is not what it costs to watch.
SETTLE_SECONDS = 5.0


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process so far; raises RunError when it has ended."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        raise RunError(f"process {pid} ended before it was measured") from None
    return float(times.user + times.system)


def quantiles(values: Sequence[float]) -> JSON:
    """p50, p99 and maximum."""
    return dict(zip(("p50", "p99", "max"), np.quantile(values, (0.5, 0.99, 1)).tolist(), strict=True))


def scrape_cost(program: Program, cpu_share: float) -> JSON:
    """Seconds that a scrape takes, and the CPU seconds beyond the share that goes on anyway; raises RunError.

    As Prometheus scrapes: compressed, over a connection that is kept if the program keeps it.
    """
    times = []
    connection = HTTPConnection(program.url.removeprefix("http://"), timeout=5)
    before, begun = cpu_seconds(program.process.pid), time.monotonic()
    for _ in range(SCRAPES):
        asked = time.perf_counter()
        try:
            connection.request("GET", "/metrics", headers={"Accept-Encoding": "gzip"})
            with connection.getresponse() as answer:
                answer.read()
        except (OSError, HTTPException) as error:
            raise RunError(f"{program.name} did not answer a scrape: {error!r}. {program.tail()}") from None
        if answer.status != HTTPStatus.OK:
            raise RunError(f"{program.name} answered a scrape with {answer.status}. {program.tail()}")
        times.append(time.perf_counter() - asked)
        time.sleep(SCRAPE_SECONDS)
    connection.close()
    wall, cpu = time.monotonic() - begun, cpu_seconds(program.process.pid) - before
    return {"scrape_seconds": quantiles(times), "cpu_seconds_per_scrape": max(0.0, cpu - cpu_share * wall) / SCRAPES}


def bare_loop(hz: int, seconds: float) -> JSON:
    """What it takes to ask for nothing but the memory of the first GPU, in a process of its own; raises RunError."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_loop, hz, seconds).result()
        except (pynvml.NVMLError, BrokenProcessPool) as error:
            raise RunError(f"the bare loop could not ask NVML: {error}") from None


def _loop(hz: int, seconds: float) -> JSON:
    pynvml.nvmlInit()
    reader = Reader(pynvml.nvmlDeviceGetHandleByIndex(0))
    begun, cpu, samples = time.monotonic(), time.thread_time(), 0
    while (now := time.monotonic()) < begun + seconds:
        reader.memory()
        samples += 1
        time.sleep(max(0.0, begun + samples / hz - now))
    wall = time.monotonic() - begun
    return {"hz": hz, "samples_per_second": samples / wall, "cpu_share": (time.thread_time() - cpu) / wall}


def c_loop(program: Path, hz: int, seconds: float) -> JSON:
    """What the same takes in C (watch.c), and what it takes there just to wake up; raises RunError."""
    command = [str(program), str(hz), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=4 * seconds + START_SECONDS, check=False)
    if done.returncode:
        raise RunError(f"the loop in C ended with {done.returncode}: {done.stderr.strip()}")
    reading, waking = ([float(word) for word in line.split()] for line in done.stdout.splitlines())
    shares = {"cpu_share": reading[2] / reading[1], "waking_cpu_share": waking[2] / waking[1]}
    return {"hz": hz, "samples_per_second": reading[0] / reading[1], **shares}


def nvidia_smi(program: str, hz: int, seconds: float) -> JSON:
    """What NVIDIA's own program takes to print the memory in use as often, once it has started; raises RunError."""
    query = ["--query-gpu=index,timestamp,memory.used", "--format=csv,noheader", f"--loop-ms={max(1, 1000 // hz)}"]
    with tempfile.TemporaryFile("w+") as lines:
        process = subprocess.Popen([program, *query], stdout=lines, stderr=subprocess.STDOUT)
        try:
            time.sleep(SETTLE_SECONDS)
            since, begun, before = datetime.now(), time.monotonic(), cpu_seconds(process.pid)
            time.sleep(seconds)
            until, wall, cpu = datetime.now(), time.monotonic() - begun, cpu_seconds(process.pid) - before
            ended = process.poll()
        finally:
            process.send_signal(signal.SIGINT)
            end(process, STOP_SECONDS)
        lines.seek(0)
        text = lines.read()
    if ended is not None:
        raise RunError(f"nvidia-smi ended with {ended}: {text.strip()[-300:]}")
    return {"hz": hz, "samples_per_second": rate(text, since, until), "cpu_share": cpu / wall}


def rate(text: str, since: datetime, until: datetime) -> float:
    """Lines a second, of all GPUs together, of those that nvidia-smi stamped in a window of local time.

    What it holds back until it ends is not missed: the rate is that between the first and the last stamp of a GPU.
    """
    stamps: defaultdict[str, list[datetime]] = defaultdict(list)
    for line in text.splitlines():
        with suppress(ValueError):  # a line that was cut off, or says what went wrong
            gpu, stamp, _ = line.split(", ")
            stamps[gpu].append(datetime.strptime(stamp, "%Y/%m/%d %H:%M:%S.%f"))
    inside = [[stamp for stamp in of_gpu if since <= stamp < until] for of_gpu in stamps.values()]
    return sum((len(s) - 1) / (s[-1] - s[0]).total_seconds() for s in inside if len(s) > 1)


@contextmanager
def exporter(program: Path, log: Path) -> Iterator[Program]:
    """An exporter that answers scrapes; raises RunError when it does not come up."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    process = spawn([str(program), "--bind-address", "127.0.0.1", "--port", str(port)], log, {})
    running = Program(program.name, process, log, f"http://127.0.0.1:{port}")
    try:
        deadline = time.monotonic() + START_SECONDS
        while get(running.url + "/metrics") is None:
            running.check()
            if time.monotonic() > deadline:
                raise RunError(f"{running.name} did not answer within {START_SECONDS:g} s. Its log:\n{running.tail()}")
            time.sleep(0.2)
        yield running
    finally:
        process.terminate()
        end(process, STOP_SECONDS)


def exporter_cost(program: Path, log: Path, seconds: float) -> JSON:
    """CPU share of an exporter that is left alone, then what scrapes cost; raises RunError."""
    with exporter(program, log) as running:
        time.sleep(SETTLE_SECONDS)
        begun, before = time.monotonic(), cpu_seconds(running.process.pid)
        time.sleep(seconds)
        share = (cpu_seconds(running.process.pid) - before) / (time.monotonic() - begun)
        return {"exporter": running.name, "cpu_share": share, **scrape_cost(running, share)}

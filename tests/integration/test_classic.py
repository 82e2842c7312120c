"""The classic experiment with the real servers, as a learner runs it."""

import json
import subprocess
from pathlib import Path

import psutil

from tests.integration.harness import HEADROOM, free_ports


def test_it_runs_to_its_end_and_says_only_what_it_measured(tmp_path: Path) -> None:
    hf, vllm, monitor = free_ports(3)
    ports = [f"--hf-port={hf}", f"--vllm-port={vllm}", f"--monitor-port={monitor}"]
    options = ["--model=random:tiny", f"--out={tmp_path}", "--vllm-args=-- --enforce-eager", *ports]
    done = subprocess.run(
        [*HEADROOM, "classic", *options],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*-classic/classic.json")
    kept = json.loads(path.read_text())
    assert kept["state"] == "complete"
    for server in ("hf", "vllm"):
        assert [one["output_tokens"] for one in kept[server]["answers"]] == [50] * 4
        assert kept[server]["loaded"]["held"] > 2**20
        assert kept[server]["readings"][2]["allocated"] > 0
        assert kept[server]["after"]["last"] == 0
    assert [one["prompt_tokens"] for one in kept["hf"]["answers"]] == [
        one["prompt_tokens"] for one in kept["vllm"]["at_once"]
    ]
    assert len({one["sent_ns"] for one in kept["vllm"]["at_once"]}) == 4
    assert len(kept["stages"]) == 1 + 6 + 7 + 1
    for one in kept["findings"]:
        assert one["text"] in done.stdout
    keys = {one["key"] for one in kept["findings"]}
    assert {"same_work", "split", "kv_hf_grows", "pool", "pool_used", "blocks", "no_verdict"} <= keys
    left = [process for process in psutil.process_iter(["cmdline"]) if str(hf) in (process.info["cmdline"] or [])]
    assert left == []

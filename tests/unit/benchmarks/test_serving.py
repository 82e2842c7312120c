"""The servers that benchmarks start."""

from pathlib import Path

from benchmarks.serving import Servers


def stack_of(pid: int) -> str:
    words = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return next(word for word in words if word.startswith("HEADROOM_STACK="))


def test_servers_of_one_benchmark_are_of_a_stack_of_their_own(tmp_path: Path) -> None:
    with Servers(tmp_path, 30) as servers, Servers(tmp_path, 30) as others:
        ours = [servers.start(name, ["http.server", "{port}"], {}).process for name in ("a", "b")]
        theirs = others.start("c", ["http.server", "{port}"], {}).process
        stacks = [stack_of(process.pid) for process in (*ours, theirs)]
    assert stacks[0] == stacks[1] != stacks[2]
    assert all(process.poll() is not None for process in (*ours, theirs))

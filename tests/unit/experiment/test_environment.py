"""What is kept of the machine and the code that a run was made with."""

import subprocess
from pathlib import Path

from experiment.environment import checkout


def git(folder: Path, *words: str) -> str:
    own = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", str(folder), *own, *words], check=True, capture_output=True, text=True).stdout  # noqa: S607


def test_the_commit_of_a_checkout_is_kept_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    assert checkout(tmp_path) == {}
    git(tmp_path, "init", "-q")
    assert checkout(tmp_path) == {}  # there is no commit yet
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "first")
    head = git(tmp_path, "rev-parse", "HEAD").strip()
    assert checkout(tmp_path) == {"headroom commit": head}
    (tmp_path / "file").write_text("2")
    assert checkout(tmp_path) == {"headroom commit": f"{head}-dirty"}


def test_a_repository_around_the_place_where_it_is_installed_is_not_its_own(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "site-packages").mkdir()
    git(tmp_path, "commit", "-qm", "theirs", "--allow-empty")
    assert checkout(tmp_path / "site-packages") == {}

"""The programs meet only over HTTP and files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("servers", "monitor", "loadtest", "experiment")
ALLOWED = {("experiment", "loadtest.records"), ("experiment", "loadtest")}
# `from loadtest import records` names the package; what it may take from there is one module.
FROM_LOADTEST = {"records"}


def imports(path: Path) -> list[tuple[str, set[str]]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, set[str]()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            found.append((node.module or "", {alias.name for alias in node.names}))
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_no_sibling_but_experiment_the_record_types(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    siblings = set(PACKAGES) - {package}
    for path in files:
        for module, names in imports(path):
            if module.split(".")[0] in siblings:
                assert (package, module) in ALLOWED, f"{path.relative_to(ROOT)} imports {module}"
                assert module != "loadtest" or names <= FROM_LOADTEST, f"{path.relative_to(ROOT)}: {names}"


def test_servers_do_not_import_each_other() -> None:
    for own, other in (("hf", "vllm"), ("vllm", "hf")):
        for path in (ROOT / "servers" / own).glob("*.py"):
            assert not any(module.startswith(f"servers.{other}") for module, _ in imports(path)), path

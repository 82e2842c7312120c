"""What stands beside Headroom in a benchmark: other clients, other programs that watch a GPU, and the least in C."""

import shutil
import subprocess
from pathlib import Path


def compiled(name: str, folder: Path) -> Path:
    """Compile the C program of that name into a folder; raises OSError without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise OSError(f"cc: not found: a C compiler is needed for benchmarks/peers/{name}.c (Debian: gcc, libc6-dev)")
    program = folder / name
    subprocess.run([compiler, "-O2", "-o", program, Path(__file__).parent / f"{name}.c"], check=True)
    return program

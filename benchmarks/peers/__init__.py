"""What stands beside Headroom in a benchmark: other clients, other programs that watch a GPU, and the least in C."""

import shutil
import subprocess
from pathlib import Path


def compiled(name: str, folder: Path) -> Path:
    """Compile the C program of that name into a folder; raises OSError where that cannot be done."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise OSError(
            f"cc, gcc: not found: a C compiler is needed for benchmarks/peers/{name}.c (Debian: gcc, libc6-dev)"
        )
    source, program = Path(__file__).parent / f"{name}.c", folder / name
    # Before glibc 2.34 dlopen is in a library of its own.
    command = [compiler, "-O2", "-o", str(program), str(source), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"benchmarks/peers/{name}.c cannot be compiled: {done.stderr.strip()}")
    return program

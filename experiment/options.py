"""How the small commands read their arguments: as argparse does, but bad input is one line."""

import argparse
import sys
from typing import NoReturn

BAD_INPUT = 2


class Options(argparse.ArgumentParser):
    """Arguments of a command; bad ones are said in one line that names the command, and end it with 2."""

    def __init__(self, command: str, description: str):
        super().__init__(prog=f"headroom {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and exit."""
        print(f"headroom: {self.prog.removeprefix('headroom ')}: {message}", file=sys.stderr, flush=True)
        raise SystemExit(BAD_INPUT)

"""The program ``hf-archs``: runs ``hf_archs/cli.py`` as a file, outside its package, whose import takes seconds.

It is the one module beside the plugins' folders. `hf_archs.cli` imports the library only inside its commands, so that
help, the version and a mistyped option are answered at once, and by the commands themselves.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def main() -> None:
    """Run the command line."""
    package = importlib.util.find_spec("hf_archs")
    assert package is not None
    assert package.origin is not None
    spec = importlib.util.spec_from_file_location("hf_archs.cli", Path(package.origin).with_name("cli.py"))
    assert spec is not None
    assert spec.loader is not None
    cli = sys.modules["hf_archs.cli"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cli)
    cli.main()

"""The program ``hf-archs``: runs ``hf_archs/commands/cli.py`` without importing its package.

Importing the package takes seconds, and `hf_archs.commands.cli` imports the library only inside its commands. So help,
the version and a mistyped option are answered at once. This is the only module outside the plugins' folders.
"""

import importlib.util
import sys
from pathlib import Path


def main() -> None:
    """Run the command line."""
    package = importlib.util.find_spec("hf_archs")
    assert package is not None
    assert package.origin is not None
    spec = importlib.util.spec_from_file_location(
        "hf_archs.commands.cli", Path(package.origin).parent / "commands" / "cli.py"
    )
    assert spec is not None
    assert spec.loader is not None
    cli = sys.modules["hf_archs.commands.cli"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cli)
    cli.main()

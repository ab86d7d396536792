"""The program ``hf-archs``: runs ``hf_archs/commands/cli.py`` as a file, outside its package.

It is the one module beside the plugins' folders. Importing the package takes seconds, and `hf_archs.commands.cli`
imports the library only inside its commands, so that help, the version and a mistyped option are answered at once,
and by the commands themselves.
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

"""`import hf_archs` imports only modules that the models need."""

import json
import subprocess
import sys

import pytest

HTTP_CLIENTS = ("aiohttp", "httpx", "httpx2", "requests", "urllib3")
COMMAND_LINE = ("click", "matplotlib", "rich", "starlette", "typer", "uvicorn")
COMMANDS = ("hf_archs.commands", "hf_archs.testing.measuring")


def imported_by(statement: str) -> set[str]:
    program = f"import json, sys\n{statement}\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def ours():
    """The modules that `import hf_archs` imports in addition to its hosts."""
    return imported_by("import hf_archs") - imported_by("import transformers, peft.utils.constants")


def test_the_plugins_are_there(ours):
    assert {"hf_archs", "hf_archs_mamba", "hf_archs_hybrid"} <= ours


@pytest.mark.parametrize("name", HTTP_CLIENTS + COMMAND_LINE + COMMANDS)
def test_importing_brings_neither_an_http_client_nor_a_command(ours, name):
    assert not {module for module in ours if module == name or module.startswith(f"{name}.")}


def test_the_commands_are_there():
    assert set(COMMANDS) <= imported_by("import hf_archs.commands.cli, hf_archs.testing.measuring")

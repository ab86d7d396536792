"""The installed versions of the requirements, compared with the versions that hf-archs was tested with."""

import importlib.metadata
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.version import Version

# the versions in constraints.txt, which is not in the wheel
TESTED = {
    "torch": "2.13.0",
    "transformers": "5.24.0",
    "accelerate": "1.15.0",
    "peft": "0.21.2",
    "datasets": "5.2.0",
    "huggingface-hub": "2.4.0",
    "safetensors": "0.8.0",
    "numpy": "2.4.6",
    "psutil": "7.2.2",
    "httpx2": "2.16.2",
    "typer": "0.29.2",
    "rich": "15.0.0",
    "triton": "3.9.0",
    "trl": "1.16.0",
    "matplotlib": "3.11.2",
    "starlette": "1.10.0",
    "uvicorn": "0.54.0",
}


@dataclass(frozen=True)
class Comparison:
    """The installed version of one required distribution, compared with the tested one.

    Attributes:
        name: name of the distribution.
        found: installed version; None if it is not installed.
        verdict: the comparison with the tested version and the allowed versions, in words.
        allowed: whether hf-archs can be expected to work with it.
    """

    name: str
    found: str | None
    verdict: str
    allowed: bool


def requirements() -> dict[str, Requirement]:
    """The requirements of the installed hf-archs, by name; of several lines, the line without a marker."""
    lines = [Requirement(line) for line in importlib.metadata.requires("hf-archs") or ()]
    return {line.name: line for line in sorted(lines, key=lambda line: line.marker is None)}


def compare() -> list[Comparison]:
    """Compare the installed version of each requirement in `TESTED` with the tested and the allowed versions."""
    required = requirements()
    return [_compare(required[name], tested) for name, tested in TESTED.items() if name in required]


def _compare(requirement: Requirement, tested: str) -> Comparison:
    name = requirement.name
    optional = "extra" in str(requirement.marker)
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Comparison(name, None, f"optional; tested: {tested}" if optional else f"tested: {tested}", optional)
    installed = Version(Version(found).public)  # without +cpu and the like
    allowed = requirement.specifier.contains(installed, prereleases=True)
    if installed == Version(tested):
        verdict = "as tested"
    else:
        way = "older" if installed < Version(tested) else "newer"
        verdict = f"{way} than tested, {tested}" if allowed else f"{way} than allowed, {requirement.specifier}"
    return Comparison(name, found, verdict, allowed)

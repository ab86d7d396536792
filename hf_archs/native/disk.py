"""Checkpoints on disk: recognising a path, checking weight files, replacing a folder without breaking it on failure."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub.constants import REPOCARD_NAME
from safetensors import SafetensorError, safe_open

from hf_archs.native.model_card import is_automatic

WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "adapter_model*.safetensors")


def looks_local(source: str) -> bool:
    """Whether a name that does not exist on disk is meant as a path, and not as ``owner/name`` on the Hub."""
    path = Path(source).expanduser()
    in_folder = "/" in source and path.parent.is_dir()
    return in_folder or path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1


def check_weights(folder: Path) -> None:
    """Open every safetensors file in ``folder``. Raises a `SafetensorError` that names a corrupt or truncated file."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                tensors.keys()
        except SafetensorError as error:
            raise SafetensorError(f"{file} is corrupt or truncated ({error}); restore it from where it came") from error


@contextlib.contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """Context manager: a temporary folder, whose files move into ``folder`` when the block succeeds.

    Until then ``folder`` is unchanged, so a failure leaves a good checkpoint good. Its other files are kept, except for
    weights that the new ones replace under other names. A model card written by hand is kept too.
    """
    folder = Path(folder).expanduser().resolve()
    place = folder if folder.is_dir() else folder.parent  # an existing folder may be a disk of its own
    place.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=place))
    try:
        yield partial
        folder.mkdir(exist_ok=True)
        new = [path.relative_to(partial) for path in partial.rglob("*") if path.is_file()]
        for name in new:
            card = folder / name if str(name) == REPOCARD_NAME else None
            if card is not None and card.is_file() and not is_automatic(card.read_text(encoding="utf-8")):
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).replace(folder / name)
        if any(name.match(pattern) for name in new for pattern in WEIGHTS):
            for stale in {path for pattern in WEIGHTS for path in folder.glob(pattern)}:
                if stale.relative_to(folder) not in new:
                    stale.unlink()
    finally:
        shutil.rmtree(partial, ignore_errors=True)

"""The progress line: a bar on a terminal, lines elsewhere; it imports nothing of the library."""

import io
import subprocess
import sys
import threading

from rich.console import Console

from hf_archs.commands import progress


def shown(monkeypatch, terminal):
    """A console's lines for a job of two parts, which waits until the first half is shown."""
    monkeypatch.setattr(progress, "EVERY", 0.01)
    seen = threading.Event()

    class File(io.StringIO):
        def write(self, what):
            if "(loss 1.5)" in what:
                seen.set()
            return super().write(what)

    file = File()
    with progress.working("measuring", Console(file=file, force_terminal=terminal, width=100)) as bar:
        bar(1, 2, "loss 1.5")
        assert seen.wait(60)
        bar.next("pulling")
    return file.getvalue()


def test_lines_without_a_terminal(monkeypatch):
    text = shown(monkeypatch, terminal=False)
    assert "\r" not in text
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[0] == "measuring ..."
    assert "measuring (loss 1.5), 50 %, 0 s" in lines
    assert lines[-1] == "pulling: 0.0 s"
    assert next(line for line in lines if line.startswith("measuring: ")).endswith(" s")


def test_a_bar_on_a_terminal(monkeypatch):
    text = shown(monkeypatch, terminal=True)
    assert "50%" in text
    assert "\r" in text
    assert "pulling: 0.0 s" in text


def test_it_shows_the_import_of_the_library():
    """It is loaded as a file, before the package."""
    code = f"import runpy, sys; runpy.run_path({progress.__file__!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

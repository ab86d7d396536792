"""The Hub as a process of its own: ``python -m hf_archs.testing.hub``."""

import argparse
import contextlib
import sys
import threading
from pathlib import Path

import uvicorn

from hf_archs.testing.hub import EmbeddedHub


def main() -> None:
    """Serve until Ctrl-C, or with ``--until-eof`` until standard input ends."""
    parser = argparse.ArgumentParser(description="Serve an embedded Hub on 127.0.0.1; its endpoint is the first line.")
    parser.add_argument("--root", type=Path, required=True, help="folder of the repositories")
    parser.add_argument("--port", type=int, default=0, help="0 (the default) takes any free port")
    parser.add_argument("--until-eof", action="store_true", help="stop when standard input (a parent's pipe) ends")
    options = parser.parse_args()
    hub = EmbeddedHub(options.root, port=options.port)
    print(hub.endpoint, flush=True)
    if options.until_eof:
        threading.Thread(target=_stop_at_end_of_input, args=(hub.server,), daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        hub.run()


def _stop_at_end_of_input(server: uvicorn.Server) -> None:
    sys.stdin.read()
    server.should_exit = True


if __name__ == "__main__":
    main()

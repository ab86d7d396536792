"""An embedded Hub: the Hugging Face Hub's protocol on loopback, as the real ``huggingface_hub`` client speaks it.

With it, tests push and pull through the unchanged client, without an account or a network. It checks the sha256 and
size of every object, the parts of multipart uploads, the parent of a commit, and the token of each request. Use it
inside a process::

    with EmbeddedHub() as hub:
        HfApi(endpoint=hub.endpoint, token=hub.token).create_repo("alice/tiny")
        subprocess.run(command, env=os.environ | hub.environment(home))  # transformers reads HF_ENDPOINT when imported

or as a process of its own: ``python -m hf_archs.testing.hub --root DIR --port 0`` prints its endpoint on the first line
(with ``--until-eof`` it stops when its standard input ends).

On disk a repository is one folder, ``<root>/<models|datasets|spaces>/<owner>/<name>``: ``repo.json`` (visibility, refs,
discussions, Xet hashes), ``commits/<oid>.json`` (one commit with its whole file list) and ``objects/<sha256>`` (all
content). The ids of files, folders and commits are git's.

The client, not the server, chooses how to upload a large file: with ``hf_xet`` installed it uses Xet, unless
``HF_HUB_DISABLE_XET=1`` is set or the content is an open file. For Xet this Hub returns the folder of a ``local://``
store, which ``hf_xet`` supports for tests, and turns its content into plain objects at the commit. A file that came by
Xet is announced with an ``X-Xet-Hash``, so that such a client downloads it by Xet too.

`EmbeddedHub.faults` makes it answer wrongly; see `hf_archs.testing.hub.faults`.
"""

from hf_archs.testing.hub.repository import HubError
from hf_archs.testing.hub.server import USERS, EmbeddedHub

__all__ = ["USERS", "EmbeddedHub", "HubError"]

"""An embedded Hub: the Hugging Face Hub's protocol on loopback, as the real ``huggingface_hub`` client speaks it.

Test equipment. It lets a push and a pull run through the unchanged client with no account and no network, and it
checks what it is given: every object's sha256 and size, every part of a multipart upload, the parent of a commit,
the token behind each request. Use it inside a process::

    with EmbeddedHub() as hub:
        HfApi(endpoint=hub.endpoint, token=hub.token).create_repo("alice/tiny")
        subprocess.run(command, env=os.environ | hub.environment(home))  # transformers reads HF_ENDPOINT when imported

or beside one: ``python -m hf_archs.testing.hub --root DIR --port 0`` prints its endpoint on the first line (with
``--until-eof`` it ends when its standard input does).

On disk a repository is one folder, ``<root>/<models|datasets|spaces>/<owner>/<name>``: ``repo.json`` (visibility, refs,
discussions), ``commits/<oid>.json`` (one commit with its whole file list) and ``objects/<sha256>`` (all content).
Object ids of files, folders and commits are git's own.

The client has two ways to upload a large file and the server cannot choose between them: with ``hf_xet`` installed it
uses Xet unless ``HF_HUB_DISABLE_XET=1`` is set or the content is an open file. For Xet this Hub hands out the folder of
a ``local://`` store, which ``hf_xet`` knows for tests, and turns what lies there into plain objects at the commit.
Downloads are always plain HTTP, because no file is announced with an ``X-Xet-Hash``.
"""

from hf_archs.testing.hub.repository import HubError
from hf_archs.testing.hub.server import USERS, EmbeddedHub

__all__ = ["USERS", "EmbeddedHub", "HubError"]

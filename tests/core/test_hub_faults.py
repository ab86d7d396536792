"""Faults of the Hub, through both transfer paths: a transfer is repeated or refused in one sentence, and a model that
is loaded after it, from the same cache, is whole.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.utils.logging as hub_logging
import pytest
import torch
import transformers.utils.logging as transformers_logging
from huggingface_hub import HfApi, constants, file_download, scan_cache_dir
from huggingface_hub.utils import _xet
from starlette.responses import HTMLResponse, RedirectResponse
from transformers import AutoModelForCausalLM

import hf_archs
from hf_archs.cache import ArchDynamicCache
from hf_archs.commands import cli, sentences
from hf_archs.errors import CheckpointMismatch
from hf_archs.native import hub as downloads
from hf_archs.testing.contract.models import lively
from hf_archs.testing.hub import EmbeddedHub
from hf_archs.testing.hub.faults import Fault, Way, after, answered, changed, cut, refused

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes/text content:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

WEIGHTS, CONFIG, SHARD = r"/resolve/.*\.safetensors$", r"/resolve/.*/config\.json$", r"/resolve/.*-00002-of-"
PAGE = HTMLResponse("<html>please log in</html>")


def a_model(seed: int) -> torch.nn.Module:
    architecture = hf_archs.get_architecture("mamba")
    return lively(architecture.causal_lm_class, architecture.tiny_config(), seed)


def same(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    others = other.state_dict()
    return all(torch.equal(value, others[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def pushed(tmp_path_factory, client_of, lora_of, word_tokenizer):
    """A Hub's folder with the same model: whole and in shards, by LFS, and by Xet; and with an adapter for it."""
    root, model = tmp_path_factory.mktemp("hub"), a_model(0)
    with EmbeddedHub(root) as hub, pytest.MonkeyPatch.context() as patch:
        client_of(hub, tmp_path_factory.mktemp("cache"), patch)
        model.push_to_hub("alice/lfs")
        word_tokenizer.push_to_hub("alice/lfs")
        model.push_to_hub("alice/shards", max_shard_size="20KB")
        patch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        model.push_to_hub("alice/xet")
        assert not list(root.glob("*/*/lfs/xet"))
        assert list(root.glob("*/*/xet/xet"))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        adapted = lora_of(a_model(0), "alice/lfs")
        adapted.push_to_hub("alice/adapter")
        huggingface_hub.close_session()
    return SimpleNamespace(root=root, model=model, adapted=adapted)


@pytest.fixture
def hub(pushed, client_of, tmp_path, monkeypatch):
    shutil.copytree(pushed.root, tmp_path / "hub")
    with EmbeddedHub(tmp_path / "hub") as hub:
        client_of(hub, tmp_path / "cache", monkeypatch)
        yield hub
        huggingface_hub.close_session()


@pytest.fixture
def by_xet(monkeypatch):
    """Let the client of this test transfer by Xet."""

    def by_xet(wanted: bool = True) -> None:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not wanted)

    return by_xet


@pytest.fixture
def generate(monkeypatch, capfd, tmp_path):
    """The one sentence with which ``hf-archs generate``, on a cache of its own, refuses a repository."""
    levels = hub_logging.get_verbosity(), transformers_logging.get_verbosity()

    def generate(*arguments: str) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(constants, "HF_HUB_CACHE", generate.cache)
            patch.setattr(sys, "argv", ["hf-archs", "generate", *arguments])
            capfd.readouterr()
            with pytest.raises(SystemExit) as end:
                cli.main()
        said = capfd.readouterr().err
        assert end.value.code == 2, said
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        return said

    generate.cache = str(tmp_path / "cache of the command")
    yield generate
    hub_logging.set_verbosity(levels[0])
    transformers_logging.set_verbosity(levels[1])
    transformers_logging.enable_progress_bar()


def load(name: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(f"alice/{name}")


def always(path: str, way: Way, methods: str = "GET HEAD") -> list[Fault]:
    return [Fault(method, path, way) for method in methods.split()]


def flipped(body: bytes) -> bytes:
    return body[:-5] + bytes([body[-5] ^ 1]) + body[-4:]


def damaged(hub: EmbeddedHub, stores: str, change: Callable[[bytes], bytes]) -> Callable[[], None]:
    """Change the content of the Xet stores of this Hub."""

    def damage() -> None:
        for file in hub.root.glob(f"*/*/*/{stores}/*/xet/xorbs/xorbs/default.*"):
            if file.suffix != ".tagset":
                content = file.read_bytes()
                file.unlink()  # it is a link to the original
                file.write_bytes(change(content))

    return damage


# Downloads


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("lfs", Fault("GET", WEIGHTS, cut(1000), times=3)),
        ("shards", Fault("GET", SHARD, cut(1000), times=3)),
        ("lfs", Fault("HEAD", CONFIG, refused(503, "busy"), times=1)),
        ("xet", Fault("GET", "xet-read-token", refused(503, "busy"), times=3)),
    ],
    ids=["cut", "cut shard", "503", "503 of Xet"],
)
def test_a_download_is_repeated(hub, pushed, by_xet, name, fault):
    by_xet(name == "xet")
    hub.faults.append(fault)
    assert same(load(name), pushed.model)
    assert fault.times == 0


AT_THE_CONFIG = "503", "only pages"  # which transformers reads before it knows a class of ours, and words the error
DOWNLOADS = {
    "cut": ("lfs", always(WEIGHTS, cut(1000)), r"the Hub at http://\S+ cannot be reached \(peer closed connection"),
    "cut shard": ("shards", always(SHARD, cut(1000)), "cannot be reached .*received 1000 bytes"),
    "503": (
        "lfs",
        always(".*", refused(503, "busy")),
        r"the Hub at \S+ refused /alice/lfs/\S+/config.json \(503\): busy",
    ),
    "503 of weights": ("lfs", always(WEIGHTS, refused(503, "busy"), "GET"), r"model.safetensors \(503\): busy"),
    "503 of Xet": ("xet", always("xet-read-token", refused(503, "busy")), r"xet-read-token/\w+ \(503\): busy"),
    "401 of Xet": ("xet", always("xet-read-token", refused(401, "no")), r"\(401\): no; a token of a user who may read"),
    "gated": (
        "lfs",
        always(WEIGHTS, refused(403, "restricted", "GatedRepo")),
        r"refused \S+/model.safetensors \(403\): restricted; ask for access on the repository's page",
    ),
    "gated shard": ("shards", always(SHARD, refused(403, "restricted", "GatedRepo")), r"\(403\): restricted; ask for"),
    "circle": (
        "lfs",
        always(WEIGHTS, answered(RedirectResponse("/alice/lfs/resolve/main/model.safetensors"))),
        r"the Hub at \S+ redirects in a circle \(Exceeded",
    ),
    "page": (
        "lfs",
        always(WEIGHTS, answered(PAGE), "GET"),
        r"sent less or more than it announced \(.* has size 26",
    ),
    "only pages": ("lfs", always(".*", answered(PAGE)), r"does not answer as a Hub \(.*; check HF_ENDPOINT"),
}


@pytest.mark.parametrize("case", DOWNLOADS)
def test_a_download_is_refused(hub, pushed, by_xet, generate, case):
    """In Python and on the command line, in one sentence; and nothing of it is in the cache afterwards."""
    name, faults, said = DOWNLOADS[case]
    by_xet(name == "xet")
    hub.faults += faults
    with pytest.raises(OSError) as error:
        load(name)
    sentence = sentences.sentence(error.value)
    assert re.search(said, sentence)
    assert str(error.value) == sentence or case in AT_THE_CONFIG
    assert re.search(said, generate(f"alice/{name}"))
    hub.faults.clear()
    assert same(load(name), pushed.model)


@pytest.mark.parametrize("name", ["lfs", "xet"])
def test_a_repository_deleted_meanwhile_is_refused(hub, by_xet, generate, name):
    by_xet(name == "xet")
    hub.faults += [Fault("HEAD", WEIGHTS, after(lambda: HfApi().delete_repo(f"alice/{name}", missing_ok=True)))]
    said = rf"refused /\S+/{name}/\S+ \(404\): Repository not found; check the name, and HF_TOKEN"
    with pytest.raises(downloads.TransferError, match=said):
        load(name)
    assert re.search(said, generate(f"alice/{name}"))


def test_a_missing_shard_is_refused(hub, generate):
    shard = next(file for file in HfApi().list_repo_files("alice/shards") if "-00002-of-" in file)
    HfApi().delete_file(shard, "alice/shards")
    with pytest.raises(OSError, match=f"alice/shards does not appear to have a file named {shard}"):
        load("shards")
    assert f"alice/shards does not appear to have a file named {shard}" in generate("alice/shards")


@pytest.mark.parametrize("name", ["lfs", "xet"])
def test_a_push_during_a_download_does_not_mix_two_commits(hub, pushed, by_xet, name):
    by_xet(name == "xet")
    hub.faults.append(Fault("HEAD", WEIGHTS, after(lambda: a_model(1).push_to_hub(f"alice/{name}")), times=1))
    assert same(load(name), pushed.model)
    assert same(load(name), a_model(1))


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no device that is always full")
@pytest.mark.parametrize("name", ["lfs", "xet"])
def test_a_full_disk_is_refused(hub, pushed, by_xet, generate, monkeypatch, name):
    """The file into which the client downloads is a device that is always full."""
    by_xet(name == "xet")
    monkeypatch.setattr(file_download.uuid, "uuid4", lambda: SimpleNamespace(hex="0" * 32))
    sha256 = next(
        file for file in HfApi().list_repo_tree(f"alice/{name}") if file.path == "model.safetensors"
    ).lfs.sha256
    said = "the disk of the Hub's cache is full; make room, or set HF_HOME to a folder on another disk"

    def fill(cache: str) -> None:
        blobs = Path(cache) / f"models--alice--{name}" / "blobs"
        blobs.mkdir(parents=True)
        (blobs / f"{sha256}.00000000.incomplete").symlink_to("/dev/full")

    fill(constants.HF_HUB_CACHE)
    with pytest.raises(downloads.TransferError, match=said):
        load(name)
    fill(generate.cache)
    assert said in generate(f"alice/{name}")
    assert same(load(name), pushed.model)


def test_a_failure_that_the_caller_handles_is_not_taken_for_a_cause(hub, pushed, tmp_path):
    """The wrong shapes in a folder are named, which is read because a repository cannot be."""
    pushed.model.save_pretrained(tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config | {"vocab_size": 40}))
    hub.faults += always(WEIGHTS, cut(1000))

    def fall_back() -> None:
        try:
            load("lfs")
        except OSError:
            AutoModelForCausalLM.from_pretrained(tmp_path / "folder")

    with pytest.raises(CheckpointMismatch, match="has shape"):
        fall_back()


# Content


def blob_of(error: BaseException) -> Path:
    """The file that the error says to delete."""
    return Path(re.search(r"delete (\S+), and the next load fetches it again", str(error))[1])


@pytest.mark.parametrize(
    ("name", "path", "change"),
    [
        ("lfs", WEIGHTS, flipped),
        ("shards", SHARD, flipped),
        ("lfs", WEIGHTS, lambda body: b"<html>please log in</html>".ljust(len(body))),
    ],
    ids=["byte", "byte of a shard", "page"],
)
def test_other_content_is_found(hub, pushed, generate, name, path, change):
    hub.faults.append(Fault("GET", path, changed(change)))
    for _ in range(2):  # also from the cache
        with pytest.raises(
            downloads.TransferError, match="in the cache is not the file on the Hub: its sha256"
        ) as error:
            load(name)
    assert "is not the file on the Hub: its sha256 is" in generate(f"alice/{name}")
    hub.faults.clear()
    blob_of(error.value).unlink()
    assert same(load(name), pushed.model)


def test_a_changed_cache_is_found(hub, pushed):
    """A whole file is read once; it is read again after a change."""
    load("lfs")
    snapshot = next(Path(constants.HF_HUB_CACHE).glob("models--alice--lfs/snapshots/*"))
    file = snapshot / "model.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(downloads.hashlib, "file_digest", None)
        assert same(load("lfs"), pushed.model)
    file.write_bytes(flipped(file.read_bytes()))
    for source in ("alice/lfs", snapshot):
        with pytest.raises(downloads.TransferError, match="is not the file on the Hub") as error:
            AutoModelForCausalLM.from_pretrained(source)
    assert not scan_cache_dir(constants.HF_HUB_CACHE).warnings  # the record is no damage to the cache
    assert blob_of(error.value) == file.resolve()
    assert same(AutoModelForCausalLM.from_pretrained("alice/lfs", force_download=True), pushed.model)


def test_a_changed_store_of_several_repositories_is_found(hub, pushed, by_xet):
    """Where the file in a repository's cache is itself a link, that to which it leads is to be deleted."""
    by_xet()
    load("xet")
    file = next(Path(constants.HF_HUB_CACHE).glob("models--alice--xet/snapshots/*/model.safetensors"))
    store = file.resolve()
    assert store.name != (file.parent / file.readlink()).name
    store.chmod(0o600)
    store.write_bytes(flipped(store.read_bytes()))
    with pytest.raises(downloads.TransferError, match="is not the file on the Hub") as error:
        load("xet")
    assert blob_of(error.value) == store
    store.unlink()
    assert same(load("xet"), pushed.model)


def test_a_cache_that_cannot_be_written_is_compared_at_every_load(hub, pushed):
    (Path(constants.HF_HUB_CACHE) / "models--alice--lfs").mkdir(parents=True)
    (Path(constants.HF_HUB_CACHE) / "models--alice--lfs" / downloads.CHECKED).touch()
    assert same(load("lfs"), pushed.model)
    file = next(Path(constants.HF_HUB_CACHE).glob("models--alice--lfs/snapshots/*/model.safetensors"))
    file.write_bytes(flipped(file.read_bytes()))
    with pytest.raises(downloads.TransferError, match="is not the file on the Hub"):
        load("lfs")


def test_other_content_of_an_adapter_is_found(hub, pushed, generate):
    """Of one that transformers loads into its base, and on the command line."""
    ids = torch.arange(3, 12)[None]
    hub.faults.append(Fault("GET", "/resolve/.*adapter_model.safetensors", changed(flipped)))
    with pytest.raises(
        downloads.TransferError, match=r"adapter_model.safetensors in the cache is not the file"
    ) as error:
        load("adapter")
    assert "adapter_model.safetensors in the cache is not" in generate("alice/lfs", "--adapter", "alice/adapter")
    hub.faults.clear()
    blob_of(error.value).unlink()
    assert torch.equal(load("adapter")(ids).logits, pushed.adapted(ids).logits)


def test_other_content_of_a_saved_state_is_found(hub, pushed):
    model = pushed.model
    cache = model(torch.arange(3, 12)[None], use_cache=True).past_key_values
    cache.push_to_hub("alice/states", model)
    hub.faults.append(Fault("GET", "/resolve/.*state.safetensors", changed(flipped), times=1))
    with pytest.raises(downloads.TransferError, match=r"state.safetensors in the cache is not the file") as error:
        ArchDynamicCache.load("alice/states", model)
    blob_of(error.value).unlink()
    loaded = ArchDynamicCache.load("alice/states", model)
    assert all(torch.equal(state, loaded.state_dict()[name]) for name, state in cache.state_dict().items())


@pytest.mark.parametrize("change", [lambda content: content[: len(content) // 2], lambda content: b""])
def test_a_damaged_store_of_xet_is_refused(hub, pushed, by_xet, generate, change):
    by_xet()
    damage = damaged(hub, "xet-read", change)

    def way(app):
        async def answer(scope, receive, send):
            async def sent(message):
                damage()  # the store is there before its token is sent
                await send(message)

            await app(scope, receive, sent)

        return answer

    hub.faults.append(Fault("GET", "xet-read-token", way))
    said = r"the transfer by Xet with the Hub at \S+ failed \(.*reconstruction error.*\); try again, or with HF_HUB_DIS"
    with pytest.raises(downloads.TransferError, match=said):
        load("xet")
    _xet.XET_CONNECTION_INFO_CACHE.clear()
    assert re.search(said, generate("alice/xet"))
    by_xet(False)  # as the sentence says
    assert same(load("xet"), pushed.model)


# Uploads


UPLOADS = {
    "cut": ("lfs", [Fault("PUT", "/lfs/", cut(1000))], "cannot be reached"),
    "503": ("lfs", [Fault("PUT", "/lfs/", refused(503, "busy"))], r"refused /lfs/\S+ \(503\): busy"),
    "full": ("lfs", [Fault("PUT", "/lfs/", refused(507, "no room"))], r"refused /lfs/\S+ \(507\): no room"),
    "hash": (
        "lfs",
        [Fault("PUT", "/lfs/", changed(flipped))],
        r"\(422\): the upload has sha256 \w+ and \d+ bytes, not",
    ),
    "503 at the commit": ("lfs", [Fault("POST", "/commit/", refused(503, "busy"))], r"/commit/main \(503\): busy"),
    "cut commit": ("xet", [Fault("POST", "/commit/", cut(100))], "cannot be reached"),
    "page": ("lfs", [Fault("POST", "/preupload/", answered(PAGE))], "does not answer as a Hub"),
}


def refused_push(name: str, said: str, push: Callable[[], object]) -> None:
    """The push is refused in one sentence, and a stranger still loads the commit before it."""
    before = HfApi().repo_info(f"alice/{name}").sha
    with pytest.raises(Exception) as error:
        push()
    assert sentences.is_expected(error.value)
    assert re.search(said, sentences.sentence(error.value))
    assert HfApi().repo_info(f"alice/{name}").sha == before


@pytest.mark.parametrize("case", UPLOADS)
def test_an_upload_is_refused(hub, pushed, by_xet, case):
    name, faults, said = UPLOADS[case]
    by_xet(name == "xet")
    hub.faults += faults
    refused_push(name, said, lambda: a_model(1).push_to_hub(f"alice/{name}"))
    assert not list(hub.root.glob("*/*/*/incoming/*"))
    assert same(load(name), pushed.model)
    hub.faults.clear()
    a_model(1).push_to_hub(f"alice/{name}")
    assert same(load(name), a_model(1))


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("lfs", Fault("PUT", "/lfs/", cut(1000), times=2)),
        ("lfs", Fault("PUT", "/lfs/", refused(503, "busy"), times=2)),
        ("xet", Fault("GET", "xet-write-token", refused(503, "busy"), times=1)),
    ],
    ids=["cut", "503", "503 of Xet"],
)
def test_an_upload_is_repeated(hub, by_xet, name, fault):
    by_xet(name == "xet")
    hub.faults.append(fault)
    a_model(1).push_to_hub(f"alice/{name}")
    assert fault.times == 0
    assert same(load(name), a_model(1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content[: len(content) // 2], r"\(422\): the upload by Xet cannot be put together"),
        (
            lambda content: content[:100_000] + bytes([content[100_000] ^ 128]) + content[100_001:],
            r"\(422\): the upload",
        ),
    ],
    ids=["cut", "byte"],
)
def test_a_damaged_upload_by_xet_is_refused(hub, pushed, by_xet, change, said):
    by_xet()
    hub.faults.append(Fault("POST", "/commit/", after(damaged(hub, "xet", change)), times=1))
    refused_push("xet", said, lambda: a_model(1).push_to_hub("alice/xet"))
    assert same(load("xet"), pushed.model)


@pytest.mark.parametrize("name", ["lfs", "xet"])
def test_a_stale_parent_is_refused(hub, pushed, by_xet, tmp_path, name):
    """And without a parent the later push is added to the earlier, as one commit."""
    by_xet(name == "xet")
    a_model(1).save_pretrained(tmp_path / "folder")
    parent = HfApi().repo_info(f"alice/{name}").sha
    HfApi().upload_file(path_or_fileobj=b"first", path_in_repo="notes.txt", repo_id=f"alice/{name}")
    refused_push(
        name,
        rf"\(412\): A commit has happened since: main is at \w+, not {parent}",
        lambda: HfApi().upload_folder(repo_id=f"alice/{name}", folder_path=tmp_path / "folder", parent_commit=parent),
    )
    assert same(load(name), pushed.model)
    a_model(1).push_to_hub(f"alice/{name}")
    assert same(load(name), a_model(1))
    assert HfApi().file_exists(f"alice/{name}", "notes.txt")

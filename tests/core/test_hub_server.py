"""The embedded Hub, tested only through the real `huggingface_hub` client."""

import hashlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info
from huggingface_hub.utils import get_session
from safetensors.torch import save_file

from hf_archs.testing.hub import EmbeddedHub

# the client's own: it hands files to httpx2 in the old way
pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=<...>' to upload raw bytes/text content:DeprecationWarning"
)

MULTIPART = 50_000


@pytest.fixture
def online(monkeypatch):
    """Allow this process's client the network, by plain LFS, and close its session afterwards."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield
    huggingface_hub.close_session()


@pytest.fixture
def hub(tmp_path, online):
    with EmbeddedHub(tmp_path / "hub", multipart_threshold=MULTIPART) as hub:
        yield hub


@pytest.fixture
def api(hub):
    """The client of alice, who owns the repository alice/tiny."""
    api = HfApi(endpoint=hub.endpoint, token="hf_write")
    api.create_repo("alice/tiny")
    return api


def as_user(hub, token) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=token)


def put(api, path="a.txt", content=b"one", **options):
    return api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id="alice/tiny", **options)


def get(api, path, cache, revision=None, repo_id="alice/tiny", **options) -> bytes:
    return Path(api.hf_hub_download(repo_id, path, revision=revision, cache_dir=cache, **options)).read_bytes()


def status_of(error) -> int:
    return error.value.response.status_code


def a_folder(root: Path) -> Path:
    (root / "sub").mkdir(parents=True)
    (root / "config.json").write_text("{}")
    (root / "empty.txt").write_text("")
    save_file({"w": torch.randn(100)}, root / "small.safetensors")
    save_file({"w": torch.randn(40_000)}, root / "sub" / "large.safetensors")
    return root


def listing(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def uploads_left(hub) -> list[Path]:
    return list(hub.root.glob("*/*/*/incoming/*"))


# Repositories and tokens


def test_create_delete_and_who_am_i(hub, api):
    assert api.whoami()["name"] == "alice"
    assert api.create_repo("alice/tiny", exist_ok=True).repo_id == "alice/tiny"
    assert api.create_repo("bare").repo_id == "alice/bare"
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo("alice/tiny")
    assert status_of(error) == 409
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo("bob/tiny")
    assert status_of(error) == 403
    with pytest.raises(HfHubHTTPError) as error:
        as_user(hub, "hf_read").create_repo("alice/other")
    assert status_of(error) == 403
    with pytest.raises(HfHubHTTPError) as error:
        as_user(hub, False).create_repo("alice/other")
    assert status_of(error) == 401
    api.delete_repo("alice/bare")
    assert not api.repo_exists("alice/bare")
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("alice/bare")


@pytest.mark.parametrize("option", [{"private": True}, {"visibility": "private"}])
def test_private_repositories_and_tokens(hub, api, tmp_path, option):
    api.create_repo("alice/secret", **option)
    weights = os.urandom(1_000)
    api.upload_file(path_or_fileobj=weights, path_in_repo="w.bin", repo_id="alice/secret")
    assert api.model_info("alice/secret").private
    assert not api.model_info("alice/tiny").private
    reader, other, anonymous = (as_user(hub, token) for token in ("hf_read", "hf_other", False))
    assert get(reader, "w.bin", tmp_path / "reader", repo_id="alice/secret") == weights
    for stranger, status in ((anonymous, 401), (other, 404)):
        for call in (
            lambda s=stranger: s.model_info("alice/secret"),
            lambda s=stranger: get(s, "w.bin", tmp_path / "stranger", repo_id="alice/secret"),
            lambda s=stranger: list(s.list_repo_tree("alice/secret")),
            lambda s=stranger: s.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="alice/secret"),
        ):
            with pytest.raises(RepositoryNotFoundError) as error:
                call()
            assert status_of(error) == status
    for who in (reader, other, anonymous):
        with pytest.raises(HfHubHTTPError) as error:
            put(who)
        assert status_of(error) == (401 if who is anonymous else 403)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        as_user(hub, "hf_nobody").model_info("alice/tiny")
    # a sha256 gives no access to another user's content
    other.create_repo("bob/copy")
    steal = CommitOperationAdd("w.bin", weights)
    steal._is_uploaded, steal._upload_mode = True, "lfs"
    with pytest.raises(BadRequestError, match="never uploaded"):
        other.create_commit("bob/copy", [steal], commit_message="steal")


# Pushing and pulling


def test_a_folder_comes_back_whole(hub, api, tmp_path):
    source = a_folder(tmp_path / "source")
    commit = api.upload_folder(folder_path=source, repo_id="alice/tiny")
    copy = Path(api.snapshot_download("alice/tiny", cache_dir=tmp_path / "cache"))
    pulled = listing(copy)
    assert pulled.pop(".gitattributes")
    assert pulled == listing(source)
    check = api.verify_repo_checksums("alice/tiny", cache_dir=tmp_path / "cache")
    assert check.checked_count == 5
    assert not check.mismatches
    info = api.model_info("alice/tiny", files_metadata=True)
    assert info.sha == commit.oid == copy.name
    files = {s.rfilename: s for s in info.siblings}
    assert files.keys() == pulled.keys() | {".gitattributes"}
    for path in ("small.safetensors", "sub/large.safetensors"):
        assert files[path].lfs.sha256 == hashlib.sha256(pulled[path]).hexdigest()
        assert files[path].lfs.size == files[path].size == len(pulled[path])
    assert files["config.json"].lfs is None
    assert not uploads_left(hub)
    # nothing changed: no new commit, and no object is asked for a second time
    assert api.upload_folder(folder_path=source, repo_id="alice/tiny").oid == commit.oid
    large = UploadInfo.from_path(str(source / "sub/large.safetensors"))
    new = UploadInfo.from_bytes(b"new")
    actions, _, _ = post_lfs_batch_info([large, new], "hf_write", "model", "alice/tiny", endpoint=hub.endpoint)
    assert ["actions" in action for action in actions] == [False, True]


def test_object_ids_are_those_of_git(api):
    for path, content in (("a/x", b"hello\n"), ("a.b/y", b"hey\n"), ("a0", b"top\n")):
        put(api, f"folder/{path}", content)
    entries = {e.path: e for e in api.list_repo_tree("alice/tiny", recursive=True)}
    assert entries["folder"].tree_id == "ad8f2c99b9766c4f8baa3d8ac78e588adae71f73"  # as `git write-tree` said
    assert entries["folder/a/x"].blob_id == "ce013625030ba8dba906f756967f9e9ca394464a"  # as `git hash-object` said
    assert [e.path for e in api.list_repo_tree("alice/tiny", "folder")] == ["folder/a", "folder/a.b", "folder/a0"]
    assert [e.path for e in api.get_paths_info("alice/tiny", ["folder", "folder/a0", "none"])] == [
        "folder/a0",
        "folder",
    ]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("alice/tiny", "none"))


def test_datasets_live_beside_models(api, tmp_path):
    api.create_repo("alice/tiny", repo_type="dataset")
    api.upload_file(path_or_fileobj=b"\0rows", path_in_repo="t.bin", repo_id="alice/tiny", repo_type="dataset")
    assert get(api, "t.bin", tmp_path, repo_type="dataset") == b"\0rows"
    assert api.dataset_info("alice/tiny").id == "alice/tiny"
    assert not api.file_exists("alice/tiny", "t.bin")


def test_ranges_and_file_metadata(hub, api, tmp_path):
    source = a_folder(tmp_path / "source")
    commit = api.upload_folder(folder_path=source, repo_id="alice/tiny")
    content = (source / "sub/large.safetensors").read_bytes()
    url = huggingface_hub.hf_hub_url("alice/tiny", "sub/large.safetensors", endpoint=hub.endpoint)
    metadata = api.get_hf_file_metadata(url=url)
    assert metadata.etag == hashlib.sha256(content).hexdigest()
    assert (metadata.size, metadata.commit_hash) == (len(content), commit.oid)
    regular = api.get_hf_file_metadata(url=url.replace("sub/large.safetensors", "config.json"))
    assert regular.etag == "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # as `git hash-object` said
    for asked, piece in (("0-9", content[:10]), ("100-", content[100:]), ("-7", content[-7:])):
        answer = get_session().get(url, headers={"Range": f"bytes={asked}"})
        assert answer.status_code == 206
        assert answer.content == piece
        assert answer.headers["Content-Range"].endswith(f"/{len(content)}")
    assert get_session().get(url, headers={"Range": f"bytes={len(content)}-"}).status_code == 416
    rest = io.BytesIO(content[:1_000])
    rest.seek(1_000)
    http_get(url, rest, resume_size=1_000, expected_size=len(content))
    assert rest.getvalue() == content
    parsed = api.parse_safetensors_file_metadata("alice/tiny", "sub/large.safetensors")
    assert parsed.tensors["w"].shape == [40_000]


def test_large_and_binary_files_are_lfs_and_ignored_files_stay_away(api, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / ".gitignore").write_text("# left out\n*.log\nbuild/\n!keep.log\n")
    (folder / "build").mkdir()
    for name, content in {
        "a.log": b"",
        "keep.log": b"k",
        "build/x": b"",
        "text": b"t",
        "binary": b"\0",
        "long": b"x" * (11 * 2**20),
    }.items():
        (folder / name).write_bytes(content)
    api.upload_folder(folder_path=folder, repo_id="alice/tiny")
    entries = {e.path: e.lfs is not None for e in api.list_repo_tree("alice/tiny", recursive=True)}
    del entries[".gitattributes"]
    assert entries == {".gitignore": False, "keep.log": False, "text": False, "binary": True, "long": True}


# Refusals


@pytest.mark.parametrize(
    ("route", "size", "promise", "says"),
    [
        ("lfs", 1_000, "another sha256", "has sha256"),
        ("lfs", 1_000, "one byte less", "longer than"),
        ("lfs", 1_000, "one byte more", "and 1000 bytes"),
        ("lfs", 3 * MULTIPART + 2, "another sha256", "has sha256"),
        ("lfs", 3 * MULTIPART + 2, "one byte less", "longer than"),
        ("lfs", 3 * MULTIPART + 2, "one byte more", "part 4 has 2 bytes"),
        ("xet", 1_000, "another sha256", "has sha256"),
    ],
)
def test_an_upload_that_is_not_what_was_promised(hub, api, monkeypatch, route, size, promise, says):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", route != "xet")
    addition = CommitOperationAdd("w.bin", os.urandom(size))
    if promise == "another sha256":
        addition.upload_info.sha256 = hashlib.sha256(b"other").digest()
    else:
        addition.upload_info.size += 1 if promise == "one byte more" else -1
    with pytest.raises((RuntimeError, HfHubHTTPError)) as error:
        api.create_commit("alice/tiny", [addition], commit_message="wrong")
    refusal = error.value if isinstance(error.value, HfHubHTTPError) else error.value.__cause__
    assert isinstance(refusal, HfHubHTTPError)
    assert refusal.response.status_code == 422
    assert says in refusal.response.headers["X-Error-Message"]
    assert not api.file_exists("alice/tiny", "w.bin")
    stored = list((hub.root / "models/alice/tiny/objects").iterdir())
    assert [hashlib.sha256(file.read_bytes()).hexdigest() for file in stored] == [stored[0].name]  # .gitattributes
    assert not [file for file in uploads_left(hub) if "." not in file.name]  # at most parts, which may be sent again


def test_the_parts_of_an_upload_are_verified(hub, api):
    content = os.urandom(2 * MULTIPART + 10)
    info = UploadInfo.from_bytes(content)

    def batch():
        actions, _, _ = post_lfs_batch_info([info], "hf_write", "model", "alice/tiny", endpoint=hub.endpoint)
        return actions[0]["actions"]["upload"]

    upload = batch()
    header, session = upload["header"], get_session()
    assert header["chunk_size"] == str(MULTIPART)
    pieces = [content[i : i + MULTIPART] for i in range(0, len(content), MULTIPART)]
    assert session.put(header["1"], content=pieces[0][:-1]).status_code == 422
    assert session.put(header["3"], content=pieces[0]).status_code == 422
    assert session.put(upload["href"], content=content).status_code == 400
    assert session.put(header["1"][:-1] + "9", content=pieces[0]).status_code == 400
    assert session.put(f"{hub.endpoint}/lfs/forged", content=content).status_code == 403

    def cut_off():
        yield pieces[0][:100]
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        session.put(header["1"], content=cut_off())
    etags = [session.put(header[str(i)], content=piece).headers["ETag"] for i, piece in enumerate(pieces, 1)]
    good = [{"partNumber": i, "etag": etag} for i, etag in enumerate(etags, 1)]
    swapped = [{"partNumber": i, "etag": etag} for i, etag in zip((1, 2, 3), (etags[1], etags[0], etags[2]))]
    for parts in (swapped, good[:2], []):
        answer = session.post(upload["href"], json={"oid": info.sha256.hex(), "parts": parts})
        assert answer.status_code == 422
    verify = upload["href"].split("/lfs/")[0] + "/alice/tiny.git/info/lfs/objects/verify"
    promise = {"oid": info.sha256.hex(), "size": info.size}
    assert session.post(verify, json=promise, headers=api._build_hf_headers()).status_code == 404
    answer = session.post(upload["href"], json={"oid": info.sha256.hex(), "parts": good})
    assert answer.status_code == 200
    assert session.post(verify, json=promise, headers=api._build_hf_headers()).status_code == 200
    assert not uploads_left(hub)


def test_what_a_commit_may_not_do(hub, api):
    first = put(api, "a.txt", b"one")
    put(api, "a.txt", b"two")
    with pytest.raises(HfHubHTTPError) as error:
        put(api, "a.txt", b"three", parent_commit=first.oid)
    assert status_of(error) == 412
    put(api, "a.txt", b"three", parent_commit=api.model_info("alice/tiny").sha)
    lost = CommitOperationAdd("w.bin", b"\0never uploaded")
    lost._is_uploaded, lost._upload_mode = True, "lfs"
    outside = CommitOperationAdd("a", b"x")
    outside.path_in_repo = "../a"
    for operations, says in (
        ([lost], "never uploaded"),
        ([outside], "Invalid path"),
        ([CommitOperationAdd("a.txt/b", b"x")], "both a file and a folder"),
    ):
        with pytest.raises(BadRequestError, match=says):
            api.create_commit("alice/tiny", operations, commit_message="bad")
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        api.delete_file("none.txt", "alice/tiny")
    api.create_tag("alice/tiny", tag="v1")
    for revision in ("v1", first.oid):
        with pytest.raises(BadRequestError, match="branch"):
            put(api, "a.txt", b"four", revision=revision)
    for revision in ("none", "refs/heads/none", first.oid[:-1] + "x"):
        with pytest.raises(RevisionNotFoundError):
            put(api, "a.txt", b"four", revision=revision)
    with pytest.raises(RepositoryNotFoundError):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="alice/none")
    assert len(api.list_repo_commits("alice/tiny")) == 4


def test_what_is_not_there(api, tmp_path):
    head = api.model_info("alice/tiny").sha
    with pytest.raises(RevisionNotFoundError):
        get(api, ".gitattributes", tmp_path, "none")
    with pytest.raises(EntryNotFoundError) as error:
        get(api, "none.txt", tmp_path)
    assert error.value.response.headers["X-Repo-Commit"] == head  # the client keeps it
    for repo_id in ("alice/none", "none", "%2e%2e/tiny"):
        with pytest.raises((RepositoryNotFoundError, huggingface_hub.errors.HFValidationError)):
            get(api, "a.txt", tmp_path, repo_id=repo_id)
    for place in ("models%2F./alice/tiny", "models/alice%2F./tiny", "models/alice/none%2F..%2Ftiny", "models/none"):
        answer = get_session().get(f"{api.endpoint}/api/{place}", headers=api._build_hf_headers())
        assert (answer.status_code, answer.headers["X-Error-Code"]) == (404, "RepoNotFound")
    for name in ("../outside", "..", ".hidden", ""):
        answer = get_session().post(
            f"{api.endpoint}/api/repos/create", json={"name": name}, headers=api._build_hf_headers()
        )
        assert answer.status_code == 400


def test_model_cards_are_validated(api):
    for card in ("---\nlicense: [\n---\n", "---\n- a\n---\n", "---\ntags: 3\n---\n", "---\npipeline_tag: [a]\n---\n"):
        with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
            put(api, "README.md", card.encode())
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        put(api, "README.md", b"no metadata")
    put(api, "README.md", b"---\nlicense: mit\ntags:\n- a\npipeline_tag: text-generation\n---\n# Card\n")
    info = api.model_info("alice/tiny")
    assert (info.pipeline_tag, info.tags, info.card_data.license) == ("text-generation", ["a"], "mit")


# History


def test_branches_tags_and_commits(api, tmp_path):
    first = put(api, "a.txt", b"one")
    api.create_branch("alice/tiny", branch="dev/x")
    api.create_tag("alice/tiny", tag="v1", revision="dev/x")
    api.create_branch("alice/tiny", branch="old", revision=first.oid)
    put(api, "a.txt", b"two")
    third = put(api, "a.txt", b"three", revision="dev/x", commit_message="third", commit_description="why")
    contents = {"main": b"two", "dev/x": b"three", "old": b"one", "v1": b"one", first.oid: b"one", third.oid: b"three"}
    for revision, content in contents.items():
        assert get(api, "a.txt", tmp_path, revision) == content
        assert api.snapshot_download("alice/tiny", revision=revision, cache_dir=tmp_path)
    refs = api.list_repo_refs("alice/tiny")
    assert {b.name: b.target_commit for b in refs.branches}["dev/x"] == third.oid
    assert {t.name: t.ref for t in refs.tags} == {"v1": "refs/tags/v1"}
    newest, *older = api.list_repo_commits("alice/tiny", revision="dev/x")
    assert (newest.title, newest.message, newest.authors) == ("third", "why", ["alice"])
    assert older[0].commit_id == first.oid
    for create, name in ((api.create_branch, {"branch": "old"}), (api.create_tag, {"tag": "v1"})):
        with pytest.raises(HfHubHTTPError) as error:
            create("alice/tiny", **name)
        assert status_of(error) == 409
        create("alice/tiny", **name, exist_ok=True)
    api.delete_branch("alice/tiny", branch="old")
    api.delete_tag("alice/tiny", tag="v1")
    for revision in ("old", "v1"):
        with pytest.raises(RevisionNotFoundError):
            api.model_info("alice/tiny", revision=revision)
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag("alice/tiny", tag="v1")
    with pytest.raises(HfHubHTTPError):
        api.delete_branch("alice/tiny", branch="main")


def test_copy_and_delete(api, tmp_path):
    api.upload_folder(folder_path=a_folder(tmp_path / "source"), repo_id="alice/tiny", path_in_repo="m")
    copies = [CommitOperationCopy("m/small.safetensors", "n/w"), CommitOperationCopy("m/config.json", "n/c.json")]
    api.create_commit("alice/tiny", [*copies, CommitOperationDelete("m/sub/")], commit_message="copy")
    files = {f.path: f for f in api.list_repo_tree("alice/tiny", recursive=True) if hasattr(f, "lfs")}
    assert files["n/w"].lfs.sha256 == files["m/small.safetensors"].lfs.sha256
    assert files["n/c.json"].blob_id == files["m/config.json"].blob_id
    assert "m/sub/large.safetensors" not in files
    api.delete_file("n/w", "alice/tiny")
    api.delete_folder("m", "alice/tiny")
    assert api.list_repo_files("alice/tiny") == [".gitattributes", "n/c.json"]


def test_pull_requests(hub, api, tmp_path):
    put(api, "a.txt", b"one")
    bob = as_user(hub, "hf_other")
    weights = os.urandom(500)
    operations = [CommitOperationAdd("a.txt", b"two"), CommitOperationAdd("w.bin", weights)]
    proposal = bob.create_commit("alice/tiny", operations, commit_message="better", create_pr=True)
    assert (proposal.pr_num, proposal.pr_revision) == (1, "refs/pr/1")
    assert get(api, "a.txt", tmp_path) == b"one"
    assert get(api, "a.txt", tmp_path, "refs/pr/1") == b"two"
    assert get(api, "w.bin", tmp_path, "refs/pr/1") == weights
    put(api, "a.txt", b"three", revision="refs/pr/1")
    assert get(api, "a.txt", tmp_path / "later", "refs/pr/1") == b"three"
    assert [r.ref for r in api.list_repo_refs("alice/tiny", include_pull_requests=True).pull_requests] == ["refs/pr/1"]
    second = bob.create_pull_request("alice/tiny", title="empty")
    assert (second.num, second.git_reference, second.author) == (2, "refs/pr/2", "bob")
    with pytest.raises(HfHubHTTPError) as error:
        put(as_user(hub, "hf_read"), create_pr=True)
    assert status_of(error) == 403


# Lifetime


def test_a_root_outlives_its_hub_and_a_temporary_one_does_not(online, tmp_path):
    for _ in range(2):
        with EmbeddedHub(tmp_path) as hub:
            api = as_user(hub, hub.token)
            api.create_repo("alice/tiny", exist_ok=True)
            commits = len(api.list_repo_commits("alice/tiny"))
            put(api, "a.txt", os.urandom(8).hex().encode())
    assert commits == 2
    with EmbeddedHub() as hub:
        assert as_user(hub, hub.token).create_repo("alice/tiny")
        assert hub.root.exists()
    assert not hub.root.exists()
    with pytest.raises(huggingface_hub.utils._http.httpx2.ConnectError):
        get_session().get(hub.endpoint)


def test_own_users_and_bad_arguments(online, tmp_path):
    with EmbeddedHub(tmp_path, users={"r": ("eve", "read"), "w": ("eve", "write")}) as hub:
        assert hub.token == "w"
        assert as_user(hub, "r").whoami()["auth"]["accessToken"]["role"] == "read"
        with pytest.raises(HfHubHTTPError):
            as_user(hub, "hf_write").whoami()
    with pytest.raises(ValueError, match=r"'admin'.*read, write"):
        EmbeddedHub(tmp_path, users={"t": ("eve", "admin")})
    with pytest.raises(ValueError, match="multipart_threshold is 0"):
        EmbeddedHub(tmp_path, multipart_threshold=0)


def test_the_hub_as_a_process(online, tmp_path):
    options = ["--root", str(tmp_path), "--port", "0"]
    with subprocess.Popen(
        [sys.executable, "-m", "hf_archs.testing.hub", *options], stdout=subprocess.PIPE, text=True
    ) as process:
        endpoint = process.stdout.readline().strip()
        try:
            api = HfApi(endpoint=endpoint, token="hf_write")
            api.create_repo("alice/tiny")
            put(api)
            assert api.list_repo_files("alice/tiny") == [".gitattributes", "a.txt"]
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


def test_the_hub_ends_with_whoever_holds_its_input(tmp_path):
    command = [sys.executable, "-m", "hf_archs.testing.hub", "--root", str(tmp_path), "--until-eof"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("http://127.0.0.1:")
        process.stdin.close()
        assert process.wait(30) == 0


PUSH_AND_PULL = """
import torch
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.utils._runtime import is_xet_available
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
tokens = torch.arange(20)[None]
for route in ("xet", "lfs"):
    constants.HF_HUB_DISABLE_XET = route == "lfs"  # what the environment variable sets
    assert is_xet_available() == (route == "xet")
    model = LlamaForCausalLM(config).eval()
    whole, sharded = f"alice/{route}", f"alice/{route}-sharded"
    model.push_to_hub(whole, private=True)
    ModelCard("---\\nlicense: mit\\nlibrary_name: transformers\\n---\\n# Tiny\\n").push_to_hub(whole)
    model.push_to_hub(sharded, max_shard_size="100KB", create_pr=True)
    for name, revision in ((whole, "main"), (sharded, "refs/pr/1")):
        pulled = AutoModelForCausalLM.from_pretrained(name, revision=revision).eval()
        assert torch.equal(model(tokens).logits, pulled(tokens).logits)
        HfApi().snapshot_download(name, revision=revision)
        assert not HfApi().verify_repo_checksums(name, revision=revision).mismatches
    assert ModelCard.load(whole).data.license == "mit"
    files = [f for f in HfApi().list_repo_tree(sharded, revision="refs/pr/1") if f.path.endswith(".safetensors")]
    assert len(files) > 1 and all(f.lfs for f in files)
    folder = HfApi().snapshot_download(whole)  # a folder in a pull request, by the pipeline that Xet has for folders
    assert HfApi().upload_folder(repo_id=whole, folder_path=folder, path_in_repo="copy", create_pr=True).pr_num == 1
    assert HfApi().file_exists(whole, "copy/model.safetensors", revision="refs/pr/1")
print("pushed and pulled")
"""


def test_transformers_pushes_and_pulls_by_xet_and_by_lfs(tmp_path):
    with EmbeddedHub(tmp_path / "hub", multipart_threshold=MULTIPART) as hub:
        environment = os.environ | hub.environment(tmp_path / "home")
        environment.pop("HF_HUB_DISABLE_XET", None)
        command = [sys.executable, "-c", PUSH_AND_PULL]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.stdout.endswith("pushed and pulled\n"), done.stderr
        for file in hub.root.glob("*/*/*/objects/*"):
            assert hashlib.sha256(file.read_bytes()).hexdigest() == file.name
        assert not uploads_left(hub)
        assert list(hub.root.glob("*/*/*/xet")), "nothing went by Xet"
        assert not list(hub.root.glob("*/*/*/xet/*"))  # converted to objects and deleted

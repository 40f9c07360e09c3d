"""Storage on folders and on a real S3 server; every refusal is one line without a credential."""

from __future__ import annotations

import pickle
import socket
import time

import pytest
from pyarrow import fs as pafs

from vidfuse.on_ray import storage
from vidfuse.on_ray.storage import StorageError, check_storage, open_storage

SECRET_WORDS = ("AKIDNOBODY", "not-the-secret")


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def url(request, tmp_path):
    return str(tmp_path / "set") if request.param == "folder" else request.getfixturevalue("s3").url("set")


def refusal(url: str, *, write: bool = False) -> str:
    with pytest.raises(StorageError) as error:
        check_storage(url, write=write)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_written_is_read(url, tmp_path):
    fs, root = open_storage(url, write=True)
    assert storage.list_files(fs, root) == {}
    storage.write_bytes(fs, storage.join(root, "a.json"), b"1")
    storage.write_bytes(fs, storage.join(root, "deep/er/b.bin"), b"22")
    storage.write_bytes(fs, storage.join(root, "a.json"), b"333")
    (tmp_path / "source").write_bytes(bytes(20_000_000))
    storage.upload(fs, storage.join(root, "big"), str(tmp_path / "source"))
    assert storage.list_files(fs, root) == {"a.json": 3, "big": 20_000_000}
    assert storage.read_bytes(fs, storage.join(root, "deep/er/b.bin")) == b"22"
    assert storage.exists(fs, storage.join(root, "deep"))
    assert not storage.exists(fs, storage.join(root, "c"))
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(fs, storage.join(root, "c"))
    storage.delete(fs, storage.join(root, "a.json"))
    storage.delete(fs, storage.join(root, "a.json"))
    assert list(storage.list_files(fs, root)) == ["big"]
    check_storage(url)


def test_a_place_can_be_checked_for_writing_before_it_is_there(url):
    check_storage(url, write=True)
    fs, root = open_storage(url)
    assert storage.list_files(fs, root) == {}


def test_file_systems_travel_to_other_processes(url):
    fs, root = open_storage(url, write=True)
    storage.write_bytes(pickle.loads(pickle.dumps(fs)), storage.join(root, "a"), b"1")  # noqa: S301
    assert storage.read_bytes(fs, storage.join(root, "a")) == b"1"


def test_relative_and_file_urls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for url in ("sets/one", f"file://{tmp_path}/sets/one"):
        fs, root = open_storage(url, write=True)
        assert isinstance(fs, pafs.LocalFileSystem)
        assert root == str(tmp_path / "sets/one")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    fs, root = open_storage(str(tmp_path))
    storage.write_bytes(fs, f"{root}/a", b"old")
    with pytest.raises(TypeError):
        storage.write_bytes(fs, f"{root}/a", "not bytes")  # type: ignore[arg-type]
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"old")]


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    """A file that is being written is not, nor are other names."""
    fs, root = open_storage(str(tmp_path))
    left, other, short = (f".{name}" for name in (f"a.tar.{'0' * 32}", f"b.tar.{'0' * 32}", "a.tar.0"))
    for name in (left, other, short, "a.tar"):
        (tmp_path / name).write_bytes(b"1")
    with storage._writing(fs, f"{root}/a.tar") as file:
        file.write(b"2")
        storage.remove_partials(fs, root, {"a.tar"})
        assert not (tmp_path / left).exists()
    assert {path.name for path in tmp_path.iterdir()} == {other, short, "a.tar"}
    assert (tmp_path / "a.tar").read_bytes() == b"2"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "the URL is empty"),
        ("s3://", "there is no bucket; give s3://bucket/prefix"),
        ("s3:///prefix", "there is no bucket"),
        ("s3:/bucket/x", "s3:/bucket/x: s3:// is meant, or ./s3:"),
        ("s3:bucket/x", "s3:// is meant"),
        ("S3:/bucket/x", "S3:// is meant"),
        ("file:/tmp/x", "file:// is meant"),
        ("gs://bucket/x", "gs:// is not known; give a folder or s3://bucket/prefix"),
    ],
)
def test_urls_that_name_no_place(url, words):
    for call in (open_storage, check_storage):
        with pytest.raises(StorageError) as error:
            call(url)
        assert words in str(error.value)


def test_credentials_in_a_url_are_refused_and_not_repeated():
    for url in ("s3://AKIDNOBODY:not-the-secret@bucket/x", "s3://bucket/x?secret_key=not-the-secret"):
        line = refusal(url)
        assert "do not belong into a URL" in line
        assert not any(word in line for word in SECRET_WORDS)


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    assert "there is no such folder" in refusal(str(tmp_path / "nowhere"))
    assert "a file, a folder is needed" in refusal(str(tmp_path / "file"))
    assert "cannot be written" in refusal(str(tmp_path / "file/below"), write=True)
    with pytest.raises(StorageError, match="cannot be made"):
        open_storage("/proc/nowhere", write=True)
    assert "cannot be written" in refusal("/proc/nowhere", write=True)


@pytest.mark.s3
def test_a_bucket_that_does_not_exist(s3):
    for write in (False, True):
        assert "the bucket 'no-such-bucket' does not exist; create it" in refusal("s3://no-such-bucket/x", write=write)
    assert "cannot be the name of a bucket" in refusal("s3://No_Bucket!/x")


@pytest.mark.s3
@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_named_not_printed(s3, monkeypatch, wrong):
    monkeypatch.setenv(wrong, "AKIDNOBODY" if wrong.endswith("ID") else "not-the-secret")
    line = refusal(s3.url())
    assert "the credentials are refused" in line
    assert not any(word in line for word in (*SECRET_WORDS, s3.key, s3.secret))


@pytest.mark.s3
def test_no_credentials(s3, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    assert "no credentials; set AWS_ACCESS_KEY_ID" in refusal(s3.url())
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "the profile that AWS_PROFILE names" in refusal(s3.url())


@pytest.mark.s3
def test_a_credentials_file_is_enough(s3, monkeypatch, tmp_path):
    file = tmp_path / "credentials"
    file.write_text(f"[default]\naws_access_key_id = {s3.key}\naws_secret_access_key = {s3.secret}\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    url = s3.url()
    check_storage(url, write=True)
    fs, root = open_storage(url)
    storage.write_bytes(fs, f"{root}/a", b"1")


def test_an_endpoint_that_refuses_or_is_silent(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDNOBODY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with socket.socket() as silent, socket.socket() as closed:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        closed.bind(("127.0.0.1", 0))
        for listener in (silent, closed):
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
            started = time.monotonic()
            assert "the endpoint does not answer" in refusal("s3://bucket/x")
            assert time.monotonic() - started < 20


@pytest.mark.parametrize("endpoint", ["127.0.0.1:8333", "http://user:word@host", "http://host/path", "nonsense"])
def test_an_endpoint_that_is_no_address(monkeypatch, endpoint):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    for call in (open_storage, check_storage):
        with pytest.raises(StorageError, match="AWS_ENDPOINT_URL: an address such as"):
            call("s3://bucket/x")


def test_refusals_of_the_server_have_words():
    class Refusal:
        operation_name = "PutObject"
        response = {"Error": {"Code": "AccessDenied"}, "ResponseMetadata": {"HTTPStatusCode": 403}}  # noqa: RUF012

    assert "no permission to write there; the credentials need s3:PutObject" in storage._explain(Refusal(), "b")
    Refusal.response = {"Error": {"Code": "Odd"}, "ResponseMetadata": {"HTTPStatusCode": 500}}
    assert storage._explain(Refusal(), "b") == "the server refuses with Odd (HTTP 500)"

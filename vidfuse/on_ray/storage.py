"""Where files are: one file system over local folders and `s3://`. The only place that sees endpoints and credentials.

Comes in: a folder's path or an `s3://bucket/prefix` URL. Goes out: a pyarrow file system with a path on it, or a `StorageError`
of one line. Credentials, region and endpoint come only from what AWS's own tools read: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_PROFILE and the files of AWS, AWS_REGION, AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL.
They are never logged or printed.

Reading and writing goes through pyarrow (fast, retries); asking whether a place is usable goes through botocore, whose errors
are typed and whose time limits are short.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pyarrow import fs as pafs

CONNECT_SECONDS = 5.0
"""How long a connection may take to open."""
REQUEST_SECONDS = 60.0
"""How long a connection may be silent."""
ATTEMPTS = 10
"""Tries of one request, with growing pauses: a server that restarts is waited for."""
CHECK_SECONDS = 5.0
"""How long `check_storage` waits to connect, and then for an answer."""
_COPY_BYTES = 8 * 1024**2
_PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{32}")
"""Name of a local file while it is written."""
_SLIP = re.compile(r"(s3|file):|[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
"""How a URL begins that lacks a slash."""
_FULL = ("QuotaExceeded", "InsufficientStorage", "Insufficient Storage", "XMinioStorageFull", "HTTP status 507")
"""What servers answer that have no room."""

_ADVICE = {
    "NoSuchBucket": "the bucket {bucket!r} does not exist; create it, or correct the URL",
    "InvalidAccessKeyId": "the credentials are refused (unknown access key); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "SignatureDoesNotMatch": "the credentials are refused (wrong secret key); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the credentials have expired; renew them",
    "InvalidToken": "the session token is refused; renew the credentials or unset AWS_SESSION_TOKEN",
    "AccessDenied": "no permission to {action} there; the credentials need {permission} on it",
    "RequestTimeTooSkewed": "this machine's clock is wrong by minutes, so requests are refused; set the clock",
    "AuthorizationHeaderMalformed": "the bucket is in another region; set AWS_REGION",
    "PermanentRedirect": "the bucket is in another region; set AWS_REGION",
    "InvalidBucketName": "{bucket!r} cannot be the name of a bucket; correct the URL",
}


class StorageError(ValueError):
    """A place that cannot be used: one line with the URL, what is wrong and what to do; never a credential."""


def open_storage(url: str, *, write: bool = False) -> tuple[Any, str]:
    """Open a place.

    Args:
        url: A local folder (relative ones are fine) or `s3://bucket[/prefix]`.
        write: Create the folder if it is not there (object storage has none to create).

    Returns:
        A pyarrow file system that can be pickled (without credentials), and the place's path on it.

    Raises:
        StorageError: the URL names no place, or the folder cannot be made.
    """
    bucket, path = _parse(url)
    if bucket is not None:
        return _s3(), path
    if write:
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{url}: the folder cannot be made: {error.strerror}") from None
    return pafs.LocalFileSystem(), path


def check_storage(url: str, *, write: bool = False) -> None:
    """Check that a place exists and can be read, and written if asked; takes some seconds at most.

    Args:
        url: As for `open_storage`.
        write: Also write and remove a small object.

    Raises:
        StorageError: it cannot; one line that says why.
    """
    bucket, path = _parse(url)
    if bucket is None:
        _check_folder(url, Path(path), write)
    else:
        _check_bucket(url, bucket, path.partition("/")[2], write)


def join(root: str, *names: str) -> str:
    """A path or URL below another."""
    return (
        "/".join((root.rstrip("/") or "/", *names)).replace("//", "/", 1)
        if root == "/"
        else "/".join((root.rstrip("/"), *names))
    )


def exists(fs: Any, path: str) -> bool:
    """Whether a file or folder is there."""
    return bool(fs.get_file_info(path).type != pafs.FileType.NotFound)


def is_file(fs: Any, path: str) -> bool:
    """Whether a file is there."""
    return bool(fs.get_file_info(path).type == pafs.FileType.File)


def list_files(fs: Any, folder: str) -> dict[str, int]:
    """Names of the files directly in a folder with their sizes in bytes, sorted; empty where there is no such folder."""
    infos = fs.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
    found = {info.base_name: info.size for info in infos if info.type == pafs.FileType.File}
    return {name: found[name] for name in sorted(found) if not name.startswith(".")}


def list_folders(fs: Any, folder: str) -> list[str]:
    """Paths of the folders directly in a folder, sorted; empty where there is no such folder."""
    infos = fs.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
    return sorted(info.path for info in infos if info.type == pafs.FileType.Directory)


def read_bytes(fs: Any, path: str) -> bytes:
    """A file's content.

    Raises:
        FileNotFoundError: there is none.
    """
    with fs.open_input_file(path) as file:
        return bytes(file.read())


def write_bytes(fs: Any, path: str, content: bytes) -> None:
    """Write a file whole or not at all; an older one is replaced."""
    with _writing(fs, path) as file:
        file.write(content)


def upload(fs: Any, path: str, source: str) -> None:
    """Copy a local file to a place, whole or not at all."""
    with open(source, "rb") as content, _writing(fs, path) as file:
        shutil.copyfileobj(content, file, _COPY_BYTES)


@contextlib.contextmanager
def told_when_full(place: str, advice: str) -> Iterator[None]:
    """Have a full disk or quota told as a `StorageError` that says what to do.

    Args:
        place: What is written to.
        advice: What else helps than to make room there.

    Raises:
        StorageError: it is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) and not any(word in str(error) for word in _FULL):
            raise
        raise StorageError(
            f"{place}: no room left; free some{advice}, and give the same command again: it continues, what is written stays"
        ) from None


def delete(fs: Any, path: str) -> None:
    """Remove a file; one that is not there is fine."""
    with contextlib.suppress(FileNotFoundError):
        fs.delete_file(path)


def remove_partials(fs: Any, folder: str, names: Collection[str]) -> None:
    """Remove what processes that were killed left of files directly in a folder; what is being written is left alone.

    Args:
        fs: A pyarrow file system; object storage has no such files.
        folder: Path on it.
        names: Of the files.
    """
    for path in Path(folder).glob(".*") if isinstance(fs, pafs.LocalFileSystem) else ():
        partial = _PARTIAL.fullmatch(path.name)
        if partial and partial[1] in names:
            with contextlib.suppress(OSError), locked(path):
                path.unlink()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a local file or folder, which ends with the process at the latest.

    Raises:
        BlockingIOError: another holds it.
        OSError: it is not there, or its file system has no locks.
    """
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # NFS locks only what is open for writing
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _writing(fs: Any, path: str) -> Iterator[Any]:
    if not isinstance(fs, pafs.LocalFileSystem):
        with fs.open_output_stream(path) as file:
            yield file
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with open(partial, "xb") as file, contextlib.ExitStack() as held:
            with contextlib.suppress(OSError):
                held.enter_context(locked(partial))
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _parse(url: str) -> tuple[str | None, str]:
    """Bucket (`None`: local) and path on the file system."""
    if not url.strip():
        raise StorageError("the URL is empty; give a folder or s3://bucket/prefix")
    if "://" not in url:
        if scheme := _SLIP.match(url):
            raise StorageError(
                f"{shown(url)}: {scheme[0]}// is meant, or ./{scheme[0]} for a folder of that name; correct the URL"
            )
        return None, str(Path(url).expanduser().absolute())
    parts = urlsplit(url)
    if parts.scheme == "file":
        return None, parts.path
    if parts.scheme != "s3":
        raise StorageError(f"{shown(url)}: {parts.scheme}:// is not known; give a folder or s3://bucket/prefix")
    if "@" in parts.netloc or parts.query:
        raise StorageError(f"{shown(url)}: credentials and options do not belong into a URL; set AWS_* in the environment")
    if not parts.netloc:
        raise StorageError(f"{url}: there is no bucket; give s3://bucket/prefix")
    names = [name for name in parts.path.split("/") if name]
    return parts.netloc, "/".join((parts.netloc, *names))


def shown(url: str) -> str:
    """A URL without what may be a credential in it."""
    return re.sub(r"[^/]*@|\?.*", "", url)


# --- S3 ---


def _s3() -> Any:
    endpoint, options = _endpoint(), {}
    if endpoint:
        scheme, _, address = endpoint.partition("://")
        options = {"scheme": scheme, "endpoint_override": address}
    return pafs.S3FileSystem(
        region=_region() or ("us-east-1" if endpoint else None),
        connect_timeout=CONNECT_SECONDS,
        request_timeout=REQUEST_SECONDS,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        **options,
    )


def _endpoint() -> str | None:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or _profile().get("endpoint_url")
    if not endpoint:
        return None
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path.strip("/") or "@" in parts.netloc:
        raise StorageError(
            "AWS_ENDPOINT_URL: an address such as http://host:8333 or https://host is needed, without a path or user"
        )
    return f"{parts.scheme}://{parts.netloc}"


def _region() -> str | None:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or _profile().get("region")


def _profile() -> dict[str, Any]:
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session

    try:
        return dict(Session().get_scoped_config())
    except BotoCoreError as error:
        raise StorageError(f"the AWS configuration cannot be used: {error}") from None


def _check_bucket(url: str, bucket: str, prefix: str, write: bool) -> None:
    from botocore import exceptions as faults

    endpoint = _endpoint()
    where = f"{url} at {endpoint}" if endpoint else url
    try:
        client = _client(endpoint)
        client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/" if prefix else "", MaxKeys=1)
        if write:
            _try_write(client, bucket, prefix)
    except faults.ClientError as error:
        raise StorageError(f"{where}: {_explain(error, bucket)}") from None
    except faults.ProfileNotFound:
        raise StorageError(f"{where}: the profile that AWS_PROFILE names is in none of the AWS files; correct it") from None
    except (faults.NoCredentialsError, faults.PartialCredentialsError, faults.CredentialRetrievalError):
        raise StorageError(
            f"{where}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        ) from None
    except (faults.ParamValidationError, faults.InvalidEndpointDiscoveryConfigurationError):
        raise StorageError(f"{where}: {bucket!r} cannot be the name of a bucket; correct the URL") from None
    except faults.SSLError:
        raise StorageError(f"{where}: the endpoint's certificate is not trusted; see AWS_CA_BUNDLE, or use http://") from None
    except (faults.HTTPClientError, faults.ConnectionError):
        raise StorageError(
            f"{where}: the endpoint does not answer; is the server running, is AWS_ENDPOINT_URL right?"
        ) from None
    except faults.BotoCoreError as error:
        raise StorageError(f"{where}: {type(error).__name__}; see the AWS settings in the environment") from None


def _client(endpoint: str | None) -> Any:
    from botocore.config import Config
    from botocore.session import Session

    config = Config(
        connect_timeout=CHECK_SECONDS,
        read_timeout=CHECK_SECONDS,
        retries={"total_max_attempts": 2},
        s3={"addressing_style": "path"} if endpoint else None,
    )
    return Session().create_client("s3", region_name=_region() or "us-east-1", endpoint_url=endpoint, config=config)


def _try_write(client: Any, bucket: str, prefix: str) -> None:
    key = "/".join(part for part in (prefix, f".vidfuse-write-{uuid.uuid4().hex}") if part)
    client.put_object(Bucket=bucket, Key=key, Body=b"")
    client.delete_object(Bucket=bucket, Key=key)


def _explain(error: Any, bucket: str) -> str:
    """Words for a server's refusal; its own message can hold the key id and is not shown."""
    code = str(error.response.get("Error", {}).get("Code", "unknown"))
    write = error.operation_name != "ListObjectsV2"
    action, permission = ("write", "s3:PutObject and s3:DeleteObject") if write else ("read", "s3:ListBucket and s3:GetObject")
    code = {"403": "AccessDenied", "404": "NoSuchBucket", "301": "PermanentRedirect"}.get(code, code)
    advice = _ADVICE.get(code)
    if advice is None:
        return f"the server refuses with {code} (HTTP {error.response.get('ResponseMetadata', {}).get('HTTPStatusCode', '?')})"
    return advice.format(bucket=bucket, action=action, permission=permission)


# --- folders ---


def _check_folder(url: str, path: Path, write: bool) -> None:
    if path.exists() and not path.is_dir():
        raise StorageError(f"{url}: a file, a folder is needed")
    if not write:
        if not path.is_dir():
            raise StorageError(f"{url}: there is no such folder; correct the path (or the missing s3://)")
        if not os.access(path, os.R_OK | os.X_OK):
            raise StorageError(f"{url}: no permission to read the folder")
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".vidfuse-write-"):
            pass
    except OSError as error:
        raise StorageError(
            f"{url}: the folder cannot be written: {error.strerror}; choose another or change its permissions"
        ) from None

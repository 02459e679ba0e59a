"""Pictures from `file:` URLs, inside one folder and nowhere else.

A path is resolved first and tested for containment then; the result is opened from the folder downwards without
following any link, so that nothing changed in between gets out. All refusals read the same: whether a path exists
outside is nobody's business.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from epd.errors import MediaForbidden, RequestTooLarge

_REFUSAL = "The file is not available: file: URLs must name a picture inside the allowed media folder."


def read_file_url(url: str, root: Path | None, max_bytes: int) -> bytes:
    """The bytes of the file that `url` names. Blocking: call it in a thread.

    Raises:
        MediaForbidden: no folder is configured, or the path is not a regular file inside it.
        RequestTooLarge: more than `max_bytes`.
    """
    if root is None:
        raise MediaForbidden("file: URLs are off; the server was started without --allowed-local-media-path.")
    with _refusal_instead_of_os_error(), _open_inside(root, _path_of(url)) as file:
        if os.fstat(file.fileno()).st_size > max_bytes:
            raise RequestTooLarge(f"The picture file is larger than {max_bytes} bytes.")
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:  # it grew while we read
        raise RequestTooLarge(f"The picture file is larger than {max_bytes} bytes.")
    return data


@contextlib.contextmanager
def _refusal_instead_of_os_error() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError):  # ValueError: a NUL, or text that is no path
        raise MediaForbidden(_REFUSAL) from None


def _path_of(url: str) -> str:
    parts = urlsplit(url)
    path = unquote(parts.path, errors="strict")
    if parts.netloc.lower() not in ("", "localhost") or not path.startswith("/") or "\0" in path:
        raise MediaForbidden(_REFUSAL)
    if parts.query or parts.fragment:
        raise MediaForbidden("file: URLs have no query or fragment; write ? as %3F and # as %23.")
    return path


def _open_inside(root: Path, path: str) -> BinaryIO:
    real_root, real_path = os.path.realpath(root), os.path.realpath(path, strict=True)
    relative = os.path.relpath(real_path, real_root)
    names = relative.split(os.sep)
    if names[0] == os.pardir or relative == os.curdir:
        raise MediaForbidden(_REFUSAL)
    folder = os.open(real_root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in names[:-1]:
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            os.close(folder)
            folder = inner
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(names[-1], flags, dir_fd=folder)
    finally:
        os.close(folder)
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise MediaForbidden(_REFUSAL)
    return file

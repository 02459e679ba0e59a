"""The key pair of a cluster: what its processes prove to each other that they belong together.

One file holds one CURVE key pair (Curve25519, http://curvezmq.org). All processes of a cluster have a copy: whoever
has the file is a member, nobody else is let in. The file is text: comments, and a line for each key in Z85, ZeroMQ's
own notation (https://rfc.zeromq.org/spec/32/).
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from epd.errors import ConfigError

_HEADER = """\
# Keys of one epd cluster. Every process of it is started with --cluster-keys and a copy of this file.
# Who can read this file can join the cluster and read its traffic: keep it secret (mode 0600).
# To change the keys, make a new file with `epd keys new` and restart all processes with it.
"""
_PUBLIC, _SECRET = "public-key", "secret-key"
_KEY_CHARACTERS = 40
_MAX_FILE_BYTES = 4096


@dataclass(frozen=True)
class ClusterKeys:
    """A key pair in Z85, 40 characters each."""

    public: bytes
    secret: bytes = field(repr=False)


def new_key_file(path: Path) -> None:
    """Make a key pair and write it to `path`, which only its owner can read.

    Raises:
        ConfigError: the file exists, or can't be written.
    """
    public, secret = zmq.curve_keypair()
    text = f"{_HEADER}{_PUBLIC} {public.decode()}\n{_SECRET} {secret.decode()}\n"
    try:
        # O_EXCL: a cluster that runs with the old keys could not be joined any more.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} exists and is not overwritten: name another file, or remove it first") from None
    except OSError as error:
        raise ConfigError(f"can't write {path}: {error.strerror}") from error


def load_keys(path: Path) -> ClusterKeys:
    """The key pair in a file that `new_key_file` wrote.

    Raises:
        ConfigError: it can't be read, others can read it or may change it, or it holds no key pair.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(_MAX_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"--cluster-keys {path}: {error.strerror}; `epd keys new FILE` makes one") from error
    # The group may read: that is how a secret is given to a container whose process is not root.
    if mode & (stat.S_IRWXO | stat.S_IWGRP):
        raise ConfigError(
            f"--cluster-keys {path}: its mode is {stat.S_IMODE(mode):04o}, so that others can use it: chmod 600 {path}"
        )
    return _parse(path, data)


def _parse(path: Path, data: bytes) -> ClusterKeys:
    lines = (line.split() for line in data.splitlines() if line.strip() and not line.startswith(b"#"))
    found = {line[0].decode(errors="replace"): line[1] for line in lines if len(line) == 2}
    public, secret = found.get(_PUBLIC, b""), found.get(_SECRET, b"")
    try:
        is_pair = len(secret) == _KEY_CHARACTERS and zmq.curve_public(secret) == public
    except (zmq.ZMQError, ValueError):  # characters that Z85 does not have
        is_pair = False
    if not is_pair:
        raise ConfigError(f"--cluster-keys {path}: it holds no key pair; `epd keys new FILE` makes one")
    return ClusterKeys(public, secret)


__all__ = ["ClusterKeys", "load_keys", "new_key_file"]

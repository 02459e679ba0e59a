"""What our own commands need to get into a proxy: a key, and whom to trust behind https."""

from __future__ import annotations

import argparse
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from epd.access_options import API_KEY_VARIABLE, check_keys
from epd.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """The key to send, and the authority that signed the server's certificate."""

    api_key: str | None = field(default=None, repr=False)
    ca_file: Path | None = None
    """PEM; None: the certificates that the system trusts."""

    def headers(self) -> dict[str, str]:
        """Of every request."""
        return {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}

    def tls(self) -> ssl.SSLContext:
        """What a client checks certificates with.

        Raises:
            ConfigError: the file can't be read, or holds no certificate.
        """
        try:
            return ssl.create_default_context(cafile=self.ca_file)
        except OSError as error:  # SSLError is one
            raise ConfigError(f"--ca-file {self.ca_file}: {error.strerror or error}") from error


def add_credentials(parser: argparse.ArgumentParser, environment: Mapping[str, str]) -> None:
    """Add `--api-key`, for which the environment may stand, and `--ca-file`."""
    first = environment.get(API_KEY_VARIABLE, "").partition(",")[0].strip()
    parser.add_argument(
        "--api-key", metavar="KEY", default=first or None, help=f"key of the cluster; {API_KEY_VARIABLE} stands for it"
    )
    parser.add_argument(
        "--ca-file", type=Path, metavar="FILE", help="PEM of who signed the server's certificate; default: the system's"
    )


def read_credentials(arguments: Any) -> Credentials:
    """What the flags say.

    Raises:
        ConfigError: the key can't be one.
    """
    if arguments.api_key is not None:
        check_keys((arguments.api_key,), "--api-key")
    return Credentials(api_key=arguments.api_key, ca_file=arguments.ca_file)

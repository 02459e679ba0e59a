"""Who may use a proxy and how it is reached: keys, origins of web pages, TLS, the path behind a gateway.

One set of fields for `epd proxy` and `epd up`, which passes them on.
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from pathlib import Path

from epd.errors import ConfigError
from epd.options import option, secret_option

_GROUP = "access"
EVERYBODY = "*"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+")
"""As browsers send it, so that another spelling would never be met."""
API_KEY_VARIABLE = "EPD_API_KEY"
"""Keys separated by commas, for the proxy; of several, clients send the first."""


@dataclass(frozen=True, kw_only=True)
class AccessOptions:
    """Fields of the flags about access; `check_access` is for the constructors of the classes that have them."""

    api_key: tuple[str, ...] = secret_option(
        (),
        "keys, one of which every request must bring, as Authorization: Bearer KEY or x-api-key: KEY; "
        f"{API_KEY_VARIABLE} stands for it and, unlike a flag, is not seen in lists of processes; default: everybody "
        "may ask",
        metavar="KEY",
        group=_GROUP,
    )
    api_key_file: Path | None = option(
        None, "file with further keys, one a line; lines that begin with # are comments", metavar="FILE", group=_GROUP
    )
    max_requests_per_key: int | None = option(
        None, "requests that one key may have in work at once; more get 429", minimum=1, group=_GROUP
    )
    allowed_origins: tuple[str, ...] = option(
        (EVERYBODY,),
        "web origins whose pages may call (https://app.example, CORS), as words or a JSON list; *: all, []: none",
        metavar="ORIGIN",
        group=_GROUP,
    )
    allow_credentials: bool = option(
        False, "let pages send cookies and HTTP logins along; needs origins by name", group=_GROUP
    )
    allowed_methods: tuple[str, ...] = option(
        (EVERYBODY,), "methods that pages may use", metavar="METHOD", group=_GROUP
    )
    allowed_headers: tuple[str, ...] = option(
        (EVERYBODY,), "headers that pages may send", metavar="HEADER", group=_GROUP
    )
    ssl_certfile: Path | None = option(
        None, "certificate, with its chain, in PEM form: HTTPS is served instead of HTTP", metavar="FILE", group=_GROUP
    )
    ssl_keyfile: Path | None = option(
        None, "private key of the certificate; default: it is in --ssl-certfile", metavar="FILE", group=_GROUP
    )
    root_path: str = option(
        "", "path under which a gateway shows this server (/epd), whether it cuts that off or not", group=_GROUP
    )

    def check_access(self) -> None:
        """Raises ConfigError: a value makes no sense, or a file can't be read."""
        check_keys(self.api_key, "--api-key")
        self.api_keys()
        if self.max_requests_per_key is not None and not (self.api_key or self.api_key_file):
            raise ConfigError("--max-requests-per-key needs keys to count by: give --api-key or --api-key-file")
        for origin in self.allowed_origins:
            if origin not in (EVERYBODY, "null") and _ORIGIN.fullmatch(origin) is None:
                raise ConfigError(f"--allowed-origins {origin}: want https://host or https://host:port, small letters")
        if self.allow_credentials and EVERYBODY in self.allowed_origins:
            raise ConfigError("--allow-credentials: name the trusted pages with --allowed-origins, * would be all")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError(f"--root-path {self.root_path}: want a path such as /epd, without a slash at its end")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ConfigError("--ssl-keyfile is of no use without --ssl-certfile")
        if self.ssl_certfile is not None:
            _check_certificate(self.ssl_certfile, self.ssl_keyfile)

    def api_keys(self) -> tuple[str, ...]:
        """All keys, those of the file included.

        Raises:
            ConfigError: the file can't be read, or has none or a malformed one.
        """
        if self.api_key_file is None:
            return self.api_key
        try:
            lines = self.api_key_file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-key-file {self.api_key_file}: {error}") from error
        keys = tuple(key for line in lines if (key := line.strip()) and not key.startswith("#"))
        if not keys:
            raise ConfigError(f"--api-key-file {self.api_key_file}: there is no key in it")
        check_keys(keys, f"--api-key-file {self.api_key_file}")
        return self.api_key + keys


def check_keys(keys: tuple[str, ...], source: str) -> None:
    """Keys travel in a header, and lists of them are separated by commas. What is wrong is told without the key.

    Raises:
        ConfigError: one has other signs than visible ASCII, or a comma.
    """
    for index, key in enumerate(keys):
        if not key or not key.isascii() or not key.isprintable() or set(key) & set(", "):
            raise ConfigError(f"{source}: key {index + 1} must be visible ASCII without spaces and commas")


def _check_certificate(certificate: Path, key: Path | None) -> None:
    def refuse_password() -> str:
        raise ConfigError("the private key of --ssl-certfile has a password; give one without")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, refuse_password)
    except OSError as error:  # SSLError is one
        named = f"--ssl-certfile {certificate}" + (f" --ssl-keyfile {key}" if key else "")
        raise ConfigError(f"{named}: {error.strerror or error}") from error

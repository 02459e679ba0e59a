"""A renewed certificate is taken up without a restart: those of today live for weeks, and the files just change."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path

log = logging.getLogger(__name__)

_INTERVAL_S = 10.0


class Renewals:
    """Looks whether the files of a certificate have changed.

    Args:
        context: that connections are made with; those that are open keep what they have.
        certificate: with its chain.
        key: None: it is in the same file.
    """

    def __init__(self, context: ssl.SSLContext, certificate: Path, key: Path | None) -> None:
        self._context = context
        self._certificate, self._key = certificate, key
        self._seen = self._stamps()

    def look(self) -> bool:
        """Take a changed certificate up. False: nothing has changed, or it is of no use, as between two writes."""
        stamps = self._stamps()
        if stamps == self._seen:
            return False
        self._seen = stamps
        try:
            # On a context of its own first: a key that does not match would leave the other one with half of each.
            for context in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self._context):
                context.load_cert_chain(self._certificate, self._key, _no_password)
        except (OSError, ValueError) as error:
            log.warning("the changed certificate %s is of no use (%s): the old one stays", self._certificate, error)
            return False
        log.info("the certificate %s has changed and is in use", self._certificate)
        return True

    async def follow(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.sleep(_INTERVAL_S)
            self.look()

    def _stamps(self) -> list[tuple[int, int, int]]:
        """What changes with the files, also where a mounted secret's links are turned to other ones."""
        found = []
        for file in filter(None, (self._certificate, self._key)):
            try:
                stat = file.stat()
            except OSError:
                continue
            found.append((stat.st_mtime_ns, stat.st_ino, stat.st_size))
        return found


def _no_password() -> str:
    raise ValueError("the key has a password")

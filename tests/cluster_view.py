"""A proxy's own view of the cluster, as tests ask for it."""

from __future__ import annotations

import asyncio

import msgspec

from epd.bench.http_client import HttpClient, ServerGone
from epd.cluster_view import ClusterView


async def ask_view(base_url: str) -> ClusterView | None:
    """What the proxy at `base_url` (with /v1) says of the cluster; None: it does not answer."""
    pieces: list[bytes] = []
    client = HttpClient(base_url.removesuffix("/v1"))
    try:
        async with asyncio.timeout(5):
            await client.request("GET", "/cluster", on_body=pieces.append)
        return msgspec.json.decode(b"".join(pieces), type=ClusterView)
    except (ServerGone, TimeoutError, msgspec.DecodeError):
        return None
    finally:
        client.close()

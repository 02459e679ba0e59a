"""LMDeploy's native dialect."""

from __future__ import annotations

from fastapi import Request
from starlette.responses import Response

from epd.errors import InvalidRequest


async def answer(request: Request, body: bytes, arrived: float) -> Response:
    """Answer `POST /generate` with a `prompt`.

    Args:
        request: of which the body was read already.
        body: as it came.
        arrived: `time.perf_counter()` when it did.

    Raises:
        EPDError: it can't be answered.
    """
    raise InvalidRequest("LMDeploy's form of /generate is not served yet; send inputs and parameters.", param="prompt")

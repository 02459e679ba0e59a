"""Random pieces are given out once, whoever asks."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from proxy.randomness import PIECE_BYTES, random_piece


def test_no_piece_comes_twice() -> None:
    with ThreadPoolExecutor(4) as threads:
        pieces = [
            piece for many in threads.map(lambda _: [random_piece() for _ in range(5000)], range(4)) for piece in many
        ]
    assert {len(piece) for piece in pieces} == {PIECE_BYTES}
    assert len(set(pieces)) == len(pieces) == 20_000


def test_a_forked_process_goes_on_with_its_own() -> None:
    random_piece()  # some are left
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.write(writer, b"".join(random_piece() for _ in range(10)))
        os._exit(0)
    os.close(writer)
    ours = {random_piece() for _ in range(10)}
    with os.fdopen(reader, "rb") as pipe:
        raw = pipe.read()
    os.waitpid(child, 0)
    assert len(raw) == 10 * PIECE_BYTES
    assert not ours & {raw[at : at + PIECE_BYTES] for at in range(0, len(raw), PIECE_BYTES)}

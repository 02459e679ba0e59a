"""Pictures that came in base64 within a large body, as bytes. Their text is not kept (`proxy.api.large_body`)."""

from __future__ import annotations

from collections.abc import Sequence


class InlinePicture(str):
    """A `data:` URL, or bare base64, of which the data stands beside the text. In the text is a name in its place.

    Args:
        text: ends with the name.
        name: of the data.
        pieces: of the data.
    """

    name: str

    def __new__(cls, text: str, name: str, pieces: Sequence[bytes]) -> InlinePicture:
        """As any `str`."""
        made = super().__new__(cls, text)
        made.name, made._pieces = name, pieces
        return made

    _pieces: Sequence[bytes]

    def data(self) -> bytes:
        """The picture. Putting it together the first time takes milliseconds, in which other threads run."""
        if len(self._pieces) != 1:
            self._pieces = (b"".join(self._pieces),)
        return self._pieces[0]

    def behind(self, prefix: str) -> InlinePicture:
        """The same with more text in front."""
        return InlinePicture(prefix + self, self.name, self._pieces)


def base64_url(text: str, media_type: str = "") -> str:
    """The `data:` URL of bare base64."""
    prefix = f"data:{media_type};base64,"
    return text.behind(prefix) if isinstance(text, InlinePicture) else prefix + text

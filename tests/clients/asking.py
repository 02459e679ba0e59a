"""Questions that the demo model knows the answers to, and shapes to ask for."""

from __future__ import annotations

import base64
from typing import Any, Literal

from pydantic import BaseModel, Field

from epd.demo import GALLERY_DIR

MODEL = "test-model"
WHO, SELF = "Who are you?", "I am epd demo, a tiny model that sees pictures."
SHAPE, CIRCLE = "What shape is it?", "circle"
PICTURE_URL = f"data:image/png;base64,{base64.b64encode((GALLERY_DIR / 'shape.png').read_bytes()).decode()}"

ASK: list[Any] = [{"role": "user", "content": WHO}]
ASK_PICTURE: list[Any] = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": PICTURE_URL}},
            {"type": "text", "text": SHAPE},
        ],
    }
]


class Trip(BaseModel):
    """Plan a trip."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "Trip", "description": "Plan a trip.", "parameters": Trip.model_json_schema()},
}

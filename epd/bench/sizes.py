"""Names of the checkpoints that `epd bench checkpoint` writes; apart from their making, which needs torch."""

SIZES = ("small", "qwen2.5-vl-3b", "qwen2.5-vl-7b")

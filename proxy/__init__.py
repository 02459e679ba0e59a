"""The HTTP front: validates, fetches media, tokenises, picks workers, streams. Never imports torch or transformers."""

"""Which models there are, and one model as request handlers see it."""

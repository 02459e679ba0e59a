"""One module per HTTP dialect."""

"""`/v1/chat/completions` and `/v1/completions`, whose bodies other dialects are translated into."""

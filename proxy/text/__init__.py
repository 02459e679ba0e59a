"""Text and tokens: templates, tokenizers, and answers as they grow."""

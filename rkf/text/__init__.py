"""Text to tokens and back: tokenizer, chat templates, files of text."""

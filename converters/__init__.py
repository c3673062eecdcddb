"""Foreign checkpoints to rkf and back: Hugging Face folders and GGUF. Imported as `rkf.converters`."""

if __name__ != "rkf.converters":
    raise ImportError(f"import this as rkf.converters, not {__name__}: a second copy of its state would be made")

"""Other checkpoint formats to rkf and back: Hugging Face folders and GGUF. Imported as `rkf.converters`."""

if __name__ != "rkf.converters":
    raise ImportError(f"import this as rkf.converters, not {__name__}: its state must exist only once")

"""From a container to tokens: kernels, model, cache, sampling, text. Imported as `rkf.runtime`."""

if __name__ != "rkf.runtime":
    raise ImportError(f"import this package as rkf.runtime, not {__name__}: its state must exist only once")

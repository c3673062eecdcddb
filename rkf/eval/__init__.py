"""Measures of model quality over text. May import the runtime; the runtime never imports this."""

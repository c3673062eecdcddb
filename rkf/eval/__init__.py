"""How good a model is: measures over text. May import the runtime; the runtime never imports this."""

"""An HTTP server in OpenAI's protocol, over the engine (runtime/engine.py). Needs the extra `serve`."""

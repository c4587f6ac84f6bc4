"""A page in the browser that asks a server with an OpenAI API, ours or another's."""

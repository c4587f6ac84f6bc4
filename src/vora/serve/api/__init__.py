"""OpenAI's API before any engine.

app.py       the app: what is put together
gate.py      before a request is read: key, queue, size and seconds of its body
schemas.py   what a request may say, and what is answered
messages.py  a request's messages as the processor takes them, images opened
routes.py    chat/completions, models, health, metrics
events.py    an answer as events of a stream
errors.py    every refusal in OpenAI's form
metrics.py   what Prometheus reads
"""

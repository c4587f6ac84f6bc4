"""Answering people: terminal, API and page share one road to an answer.

engine.py       from messages to an answer: who waits, who joins
answer.py       pieces of text on their way
batch.py        answers generated side by side, of tokens only
sampling.py     which token comes next
text_stream.py  tokens to pieces of text, stop texts
llama_cpp.py    llama.cpp as an engine
limits.py       what a request may take
api/            OpenAI's API before any engine
server.py       `vora serve`: an engine behind the API
chat.py         a conversation that is kept
terminal.py     `vora chat`
"""

"""The server: `python -m runtime.serve`. It speaks the OpenAI API.

command.py      flags, and how the server starts and stops
app.py          what is served under which path
schemas.py      what a request may say
asked.py        a request in the model's terms: ids, sampling, how its text is decoded
writing.py      texts on their way from the service's thread to a response
chat.py         /v1/chat/completions
completions.py  /v1/completions
words.py        /tokenize and /detokenize
stream.py       server-sent events, and clients that go away
logprobs.py     log-probabilities, as both forms of answers show them
errors.py       errors in OpenAI's form
guard.py        who may ask, and how much
connection.py   clients that are slow

Starlette, uvicorn, pydantic and prometheus-client come with the extra `serve`. Nothing else in `runtime`
imports this package.
"""

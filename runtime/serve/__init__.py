"""The server: `python -m runtime.serve`. It speaks the OpenAI API, and has a page for people.

command.py      flags
running.py      how the server starts and stops
address.py      where it listens, and who can reach it there
app.py          what is served under which path
served.py       the model, and what all answers have in common
schemas.py      what a request may say
asked.py        a request in the model's terms: ids, sampling, how its text is decoded
writing.py      texts on their way from the service's thread to a response
chat.py         /v1/chat/completions
conversations.py  a chat's request in the model's terms
calling.py      tools, and what of a text is calls of them
completions.py  /v1/completions
words.py        /tokenize and /detokenize
stream.py       server-sent events, and clients that go away
logprobs.py     log-probabilities, as chats and completions show them
errors.py       errors in OpenAI's form
guard.py        who may ask, and how much
connection.py   clients that are slow
outgoing.py     headers that every response has
static.py       the files of the page
metrics.py      /metrics
experts.py      /experts, of which picture.py has the figures

Starlette, uvicorn, pydantic and prometheus-client come with the extra `serve`. Nothing else in `runtime`
imports this package.
"""

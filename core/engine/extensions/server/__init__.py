"""An OpenAI-compatible server: FastAPI in this process, the engine core in another.

routes/      one module a group of routes: what OpenAI's API has, and how outputs become its answers
protocol.py  requests;  answers.py: answers;  errors.py: what clients are told of errors
chat.py      conversations;  parsers/: formats of tool calls and of reasoning, as plugins
service.py   the engine, watched and bounded;  metrics.py, logs.py: what it tells
gate.py      what every request passes;  streams.py: what every answer passes
app.py       all of it together;  run.py: the process
"""

from engine.extensions.server.args import ServerArgs
from engine.extensions.server.run import serve

__all__ = ["ServerArgs", "serve"]

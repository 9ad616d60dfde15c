"""Serving: `visrl.serve(…)` is `visrl.serve.runner.serve`.

runner          the server from start to stop; config its keys
app             the routes of the OpenAI protocol
schemas, fields requests read and bounded; which fields are honoured, passed on or refused; strict: what is unknown
messages, tools the messages of a request; tools in a request: definitions, calls that were made, what they gave
adapters        LoRA adapters loaded while the server runs
replies         replies whole, and as events of a stream
errors          what a caller is told

backend         what the application asks of whoever computes
batching        the backend in this process; admission decides who waits and who joins, decode_loop decodes
requests        one text asked of it
upstream        the backend in front of vLLM
ways            in which way a request is answered
calling         a turn that may call tools of the caller's
focus, looks    `MODEL:focus`: the two steps of one request; several looks, by `visrl` or by a public protocol

safety          who may ask, from where, how much; connections says whose turn it is
images          images of strangers; image_decoders opens them in processes, image_decoder is such a process
scenes          scenes that the page shows
metrics, memory counts for Prometheus; memory given back
"""

from visrl.callable_package import make_callable

make_callable(__name__, "runner", "serve")

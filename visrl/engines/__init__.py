"""Engines: conversations in, sampled completions out.

base             Engine, Policy, Request, Sampling, Completion: what every engine is
open             one way to open a model, in this process or behind servers

local            a checkpoint in this process: continuous batching
decoding         the running decode batch; sampling a token; the third protocol, DecodingEngine
cached           prefill and decode steps over the prefix-shared KV cache
kv_tree          prefix cache, slots, compaction: which entry of the KV cache belongs to whom
stateful         a cache row for each sequence, for models with recurrent layers
plain            decoding by the model's own `generate`, for models that take no prefix tree
recompute        decoding without a KV cache, for families whose tokens see more than their ancestors

endpoint         OpenAI-compatible servers as an engine: conversations to messages
client           many requests to them: concurrency, retries, health
openai_server    one request to one of them, and its faults
runtime_lora     adapters of a running server: load one, unload one
streaming        one reply chunk by chunk
wire, transport  replies and chunks taken apart, HTTP within bounds
addresses        base URLs as users write them
server_process   a vLLM server as a child process; keeper ends it with its parent
started          which servers this process has started, and whether they have ended
"""

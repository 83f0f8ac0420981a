"""A prefill replica: computes prompts chunk by chunk and hands their KV blocks to decode."""

from core.compiled import prefer_compiled

prefer_compiled(__path__, __name__)

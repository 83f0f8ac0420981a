"""A prefill replica: computes prompts chunk by chunk and hands their KV blocks to decode."""

"""The HTTP edge: OpenAI protocol, tokenizer and templates, stop strings, SSE, and the life of a request."""

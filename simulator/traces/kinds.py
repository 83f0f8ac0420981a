"""What a file of recorded load is, by how it begins. Pure."""

KINDS = ("auto", "blocks", "azure", "servegen", "clients", "sessions", "dynamo", "lengths", "decisions")
RATES, LENGTHS = "client_rates.csv", "client_length_pdfs.jsonl"  # in the names of the two files of a mix of clients

_TABLES = {
    "TIMESTAMP,ContextTokens": "azure",
    "t_s,client,input_tokens": "servegen",
    "t_s,client,rate_rps": "clients",
    "num_prefill_tokens": "lengths",
}
_FIELDS = {'"dynamo.request.trace': "dynamo", '"hash_ids"': "blocks", '"hash_id_scope"': "sessions"}
_NO_TRACES = {
    "t_s,total_rate_rps": "how many requests came, none of them: a curve for `python -m bench.autoscaling --rates`",
    '{"client":': f"how long clients' requests are, not when they come: name the {RATES} file beside it",
}


def kind_of(head: str) -> str | None:
    """By a file's first line; None: like no kind."""
    for beginning, kind in _TABLES.items():
        if head.startswith(beginning):
            return kind
    return next((kind for field, kind in _FIELDS.items() if head.startswith("{") and field in head), None)


def why_no_trace(head: str) -> str | None:
    """What a file tells, where that is known and is no load by itself."""
    return next((told for beginning, told in _NO_TRACES.items() if head.startswith(beginning)), None)

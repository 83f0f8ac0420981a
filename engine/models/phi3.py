"""Phi-3 and Phi-4: Llama with stacked QKV and gate/up tensors, and angles that may turn a part of each head."""

from engine.models.family import Family
from engine.models.llama import read_plain
from engine.stored_names import StoredNames

FAMILY = Family("Phi3ForCausalLM", read_plain, StoredNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)))

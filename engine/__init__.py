"""One model replica on its devices: models, attention, paged KV cache, block pool, sampler, tensor parallel, runner."""

from core.compiled import prefer_compiled

prefer_compiled(__path__, __name__)

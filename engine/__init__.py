"""One model replica on its devices: models, attention, paged KV cache, block pool, sampler, tensor parallel, runner."""

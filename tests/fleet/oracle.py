"""Whether output is what transformers would have said, in one forward pass."""

import torch


def are_greedy(model, prompt, output) -> bool:
    """Whether each token is the most likely one after those before it, but for rounding."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1]
    taken = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
    return bool((taken >= logits.amax(1) - 1e-3).all())

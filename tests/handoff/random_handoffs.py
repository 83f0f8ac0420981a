"""Long random lives of the handoff model, for what takes more steps than a search by rules affords."""

from random import Random

from tests.handoff.handoff_model import HandoffModel

COMMON = [1, 0, 1, 1, 0, 1, 0, 0, 1]  # what prompts often begin with


class AnyIndex:
    """Stands in for hypothesis' data: any index of a list of at most `size`."""

    def __init__(self, random: Random, size: int) -> None:
        self.random, self.size = random, size

    def draw(self, _):
        return self.random.randrange(self.size)


def run_random(seed: int, num_actions: int, model_class: type[HandoffModel] = HandoffModel) -> HandoffModel:
    """One life of `num_actions` events."""
    random, model = Random(seed), model_class()
    for _ in range(num_actions):
        action = random.random()
        if action < 0.06:
            tokens = [random.randrange(2) for _ in range(random.randint(1, 9))]
            tokens = tokens if random.random() < 0.3 else COMMON[: len(tokens)]
            model.request(random.choice("abcd"), tokens, random.randint(1, 4), random.random() < 0.2)
        elif action < 0.07:
            model.cancel(random.choice("abcd"), random.random() < 0.5)
        elif action < 0.45 and model.wire:
            model.deliver(AnyIndex(random, len(model.wire)), random.random() < 0.1)
        elif action < 0.62 and model.fetches:
            model.end_fetch(AnyIndex(random, len(model.fetches)), random.random() < 0.1)
        elif action < 0.82:
            model.prefill_forward()
        else:
            model.decode_forward()
        model.books_balance()
    return model

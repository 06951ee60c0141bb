"""How the tests ask a model for evaluation, and an engine that says what it is told to."""

import json
from pathlib import Path

from lm_eval.api.instance import Instance

from dlm_jax.engine import Answer, Engine, Result
from dlm_jax.eval import runners

EOS, MASK = 0, 1  # of the embedded models
CONTEXT = 64
QUESTION = "<|user|>Tom has 3 boxes with 4 apples each. How many apples?<|assistant|>"
CONTEXTS = [
    "<|user|>Tom has 3 apples. He buys 4 apples. How many apples?<|assistant|>",
    "<|user|>Kim has 9 pens.<|assistant|>",
    QUESTION,
    "<|user|>Tom has 3 boxes with 4 apples each. He gives away 5 apples. How many?<|assistant|>",
]


def change(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def asked(*contexts, task="some_task", **gen_kwargs) -> list[Instance]:
    return [
        Instance("generate_until", {}, (context, gen_kwargs), 0, (task, i, 1))
        for i, context in enumerate(contexts)
    ]


def generate(model, *contexts, **gen_kwargs) -> list[str]:
    return model.generate_until(asked(*contexts, **gen_kwargs), disable_tqdm=True)


def scored(model, *pairs) -> list[tuple[float, bool]]:
    requests = [Instance("loglikelihood", {}, pair, 0, ("some_task", 0, 1)) for pair in pairs]
    return model.loglikelihood(requests, disable_tqdm=True)


class Hook:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.told = []

    def add_partial(self, *told) -> None:
        self.told.append(told)


class Scripted(Engine):
    """Says what it is told to, and remembers what it was asked."""

    memory_mib = 12.345

    def __init__(self, monkeypatch, ids: list[int]) -> None:
        """Stands for all engines that are made from now on; `ids` is what it says."""
        self.batches, self.made = [], []
        self._ids = ids
        monkeypatch.setattr(runners, "Engine", self._make)

    def _make(self, checkpoint, decode, method, *, token_freq, mesh) -> Engine:
        self.made.append((decode, method))
        self.checkpoint, self.decode = checkpoint, decode
        return self

    def run(self, rows, key, draw=None) -> Result:
        assert key.shape in ((), (len(rows),))
        self.batches.append([list(row) for row in rows])
        committed_at = [0] * len(self._ids)
        text = self._text(self._ids, committed_at)
        answer = Answer(self._ids, committed_at, text, len(self._ids), 0, 6, 5)
        return Result(
            answers=[answer] * len(rows),
            frames=None,
            nfe=7,
            positions=40.06264,
            tokens_per_forward=1.0,
            compile_seconds=9.0,
            seconds=3.0,
        )

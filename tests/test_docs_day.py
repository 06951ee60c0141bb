"""docs/command.md, "A day": its commands in their order, against a hub on the loopback."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from documents import argv_of, page
from places import ROOT

from dlm_jax import generate
from dlm_jax.engine import Engine

pytest_plugins = ["hub_fixtures"]

PAGE = page("docs/command.md")
DAY = PAGE.commands(within=PAGE.section("A day"))
MODEL = "GSAI-ML/LLaDA-8B-Instruct"
MATH = ROOT / "dlm_jax" / "assets" / "llada-tiny-math"  # stands for the large model


def write_adapter(directory: Path) -> None:
    """An adapter for all query projections of the model."""
    directory.mkdir()
    shapes = safetensors.numpy.load_file(MATH / "model.safetensors")
    tensors = {}
    for name, matrix in shapes.items():
        if name.endswith("q_proj.weight"):
            module = "base_model.model." + name.removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = np.ones((2, matrix.shape[1]), np.float32) / 8
            tensors[f"{module}.lora_B.weight"] = np.ones((matrix.shape[0], 2), np.float32) / 8
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4000, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.slow
def test_a_day(hub, tmp_path, monkeypatch, capsys):
    hub.add(MODEL, MATH)
    write_adapter(tmp_path / "my-adapter")
    engine_run, batches = Engine.run, []

    def counted(self, rows, key, *args, **named):
        """Ctrl-C in the second batch of the file."""
        batches.append(rows)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return engine_run(self, rows, key, *args, **named)

    monkeypatch.setattr(Engine, "run", counted)
    told = []
    for command in DAY:
        if command.startswith("echo "):
            _, text, arrow, file = shlex.split(command)
            with Path(file).open("a" if arrow == ">>" else "w") as target:
                target.write(text + "\n")
            continue
        told.append((generate.main(argv_of(command)), *capsys.readouterr()))

    fetched, interrupted, resumed, infilled, adapted = told
    assert [status for status, _, _ in told] == [0, 130, 0, 0, 0]
    assert sum("model.safetensors" in err for _, _, err in told) == 1  # fetched once
    assert "1 of 3 answers are kept in day-answers.jsonl.partial" in interrupted[2]
    assert len(batches) == 1 + 2 + 2 + 1 + 1
    answers = [json.loads(line) for line in Path("day-answers.jsonl").read_text().splitlines()]
    assert [(answer["id"], answer["seed"]) for answer in answers] == [(1, 3), (2, 1), (3, 2)]
    assert [len(answer["tokens"]) for answer in answers] == [64, 64, 32]
    assert answers[1]["messages"][0]["role"] == "system" and resumed[1] == ""
    assert infilled[1].startswith("def double(x): return ")
    assert "= 23 apples" in fetched[1] and adapted[1] != fetched[1]

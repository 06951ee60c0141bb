"""docs/decoding.md: its code runs, its tables are complete, and what it says is refused is."""

import dataclasses
import fnmatch
import inspect
import re

import jax
import numpy as np
import pytest
from documents import argv_of, names, options_of, page, run_snippets
from places import GOLDEN, ROOT
from tiny_models import small

from dlm_jax import DecodeConfig, LikelihoodConfig, arithmetic, cache, generate, tokenizer
from dlm_jax.decoding.loop import RECORDS, GenerateOutput
from dlm_jax.decoding.sampler import ALGORITHMS
from dlm_jax.decoding.schedule import SCHEDULES
from dlm_jax.decoding.start import start
from dlm_jax.decoding.strategies import STRATEGIES
from dlm_jax.estimators import ESTIMATORS

DOCS = ROOT / "docs"
PAGE = page("docs/decoding.md")
COMMANDS = PAGE.commands()
section, table = PAGE.section, PAGE.table


def test_snippets_work_one_after_the_other():
    namespace, lines = run_snippets(PAGE.snippets)
    *answers, speed = lines
    assert [arithmetic.extract_answer(line) for line in answers] == [9 * 6 + 9, (22 - 8) // 2]
    assert re.fullmatch(r"\d+ forwards, \d+\.\d tokens per forward", speed)
    processed = namespace["processed"].tokens[:, -48:]
    for line, row in zip(answers, processed, strict=True):
        ended = tokenizer.decode(namespace["tok"], row, namespace["config"].eos_id)
        assert arithmetic.extract_answer(ended) == arithmetic.extract_answer(line)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[27:70])
def test_command(command, capsys):
    argv = argv_of(command)
    assert generate.main(argv) == 0
    out, err = capsys.readouterr()
    assert arithmetic.extract_answer(out) == 7 * 4 - 5
    if "--stop-at-eos" not in argv:
        assert "masks left" not in err
    if "--infill" in argv:
        assert "7 * 4 = 28 apples in all. 28 - 5 = 23 apples are left." in out


def test_file_of_frequencies(tmp_path):
    (text,) = [block.text for block in PAGE.blocks if block.language == "json"]
    (tmp_path / "counts.json").write_text(text)
    share_V = tokenizer.frequencies(tmp_path / "counts.json", 50)
    expected = np.full(50, 1 / 1000)
    expected[[17, 42]] = 0.25, 0.08
    np.testing.assert_allclose(share_V, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("title", "first", "known"),
    [
        ("Schedules", "`schedule`", SCHEDULES),
        ("Algorithms", "`alg`", ALGORITHMS),
        ("Strategies", "`strategy`", STRATEGIES),
        ("Likelihood", "`estimator`", ESTIMATORS),
        (
            "What is recorded",
            "`GenerateOutput`",
            [*GenerateOutput._fields, "tokens_per_forward"],
        ),
    ],
)
def test_tables_name_everything(title, first, known):
    told = names([cells[0] for cells in table(title, first)])
    assert sorted(told) == sorted(known)


def test_tables_tell_the_same_as_the_library():
    for cells in table("Algorithms", "`alg`"):
        measure = ALGORITHMS[names(cells)[0]]
        assert measure.is_probability == ("p(c)" in cells[1])
        assert measure.negative == ("never above 0" in cells[1])
    for cells in table("Strategies", "`strategy`"):
        strategy = STRATEGIES[names(cells)[0]]
        short = [] if strategy.shorthand is None else [f"{strategy.shorthand}=X"]
        short += [f'alg="{strategy.name}"'] if strategy.as_alg else []
        assert names(cells[1:2]) == short
        for field in dataclasses.fields(strategy):
            assert f"`{field.name}" in section("Strategies") or field.name == "rule"
    for cells in table("Likelihood", "`estimator`"):
        for name in names(cells[:1]):
            assert ESTIMATORS[name].log_types == tuple(names(cells[2:]))
    for name in RECORDS:
        assert f"`{name}`" in section("What is recorded")


def test_every_field_is_told():
    said = set(re.findall(r"\w+", " ".join(names(PAGE.prose))))
    for config in (DecodeConfig, LikelihoodConfig):
        assert set(inspect.signature(config).parameters) <= said


def test_every_option_exists_and_those_of_decoding_are_told():
    known, told = options_of(generate.parse), PAGE.options
    scripts = {"--plot", "--problems", "--caches", "--models"}
    assert told - scripts <= known
    wanted = "alg schedule num-transfer-tokens alg-temp threshold factor gamma sigma strategy "
    wanted += "strategy-args cfg-scale stop-at-eos max-forwards suppress debias clip-alpha infill"
    options = {f"--{name}" for name in wanted.split()}
    assert options <= known
    # What is not spelled out has the name of its field.
    spelled = {f"--{name.replace('_', '-')}" for name in names(PAGE.prose)}
    assert options <= told | spelled


REFUSED = table("What is refused", "arguments")


@pytest.mark.parametrize("cells", REFUSED, ids=lambda cells: f"{cells[0]} {cells[1]}".strip())
def test_what_is_refused(cells):
    written, condition, _ = cells
    model, params = small("dream" if condition == "Dream" else "llada")
    config = model.config
    arguments = eval(f"dict({written.strip('`')})", dict(config=config))
    prompt_BP = np.zeros((1, 4), np.int32)
    methods = ["none"]
    others = {}
    if condition == "every cache but `none`":
        methods = [name for name in cache.METHODS if name != "none"]
    elif condition.startswith("cache "):
        methods = names([condition])
    elif condition == "`token_freq`":
        others = dict(token_freq=np.full(config.vocab_size, 0.1, np.float32))
    elif condition == "a prompt with masks":
        prompt_BP += config.mask_id
    else:
        assert condition in ("", "Dream")
    for name in methods:
        with pytest.raises(ValueError) as caught:
            decode = DecodeConfig(**{"gen_length": 16, **arguments})
            others |= dict(key=jax.random.key(0), decode=decode, cache=cache.make(name))
            start(params, model, prompt_BP, **others)
        sentence = str(caught.value)
        assert sentence.endswith(".") and "\n" not in sentence
        about = [*arguments, "prompt"] if "prompt" in condition else arguments
        assert any(argument in sentence for argument in about)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(threshold=0.9, steps=16, schedule="capped"),
        dict(strategy="klass", factor=1.0),
        dict(strategy="wino", sigma=3.0),
        dict(strategy="random", alg="entropy"),
        dict(alg="topk_margin", threshold=0.5, sigma=3.0),
        dict(alg="entropy", gamma=0.1),
        dict(threshold=0.9, cfg_scale=1.0, stop_until_eos=True),
    ],
)
def test_what_is_not_in_that_table_is_allowed(arguments):
    DecodeConfig(gen_length=16, **arguments).check(small()[0].config)


def test_no_recording_in_the_repository_is_among_those_not_reproduced():
    patterns = names(
        [cells[0] for cells in table("Recorded runs that are not reproduced", "recordings")]
    )
    cases = [path.stem for path in (GOLDEN / "cases").glob("*.json")]
    assert len(patterns) > 10 and len(cases) > 100
    for pattern in patterns:
        assert not fnmatch.filter(cases, pattern), pattern


def test_figure_is_small():
    data = (DOCS / "decoding" / "accuracy.png").read_bytes()
    size = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    assert size == (1012, 869) and len(data) < 150_000

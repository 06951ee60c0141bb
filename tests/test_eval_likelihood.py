"""Log-likelihoods of the model for lm-evaluation-harness: of tokens, of windows, and estimates."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eval_models import (
    CONTEXT,
    CONTEXTS,
    EOS,
    MASK,
    QUESTION,
    Hook,
    scored,
)
from lm_eval.api.instance import Instance

from dlm_jax.answers import NotFinite
from dlm_jax.batching.responses import Responses
from dlm_jax.cache import NoCache
from dlm_jax.checkpoint import Checkpoint
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.engine import Engine
from dlm_jax.eval import runners
from dlm_jax.eval.model import DiffusionLM
from dlm_jax.eval.runners import Scorer
from dlm_jax.likelihood import LikelihoodConfig, log_likelihood

pytest_plugins = ["eval_fixtures"]

PAIRS = [
    (QUESTION, " 12 apples"),
    ("Tom has", " 3 boxes with 4 apples each. How"),
    ("Tom has 3 apples. He buys 4 ", "pens"),  # the space belongs to the continuation
]


def test_an_empty_continuation_is_certain(make):
    assert scored(make(), ("Tom has", "")) == [(0.0, False)]


TEXT = " ".join(["Tom has 3 boxes with 4 apples each."] * 7)  # longer than the context


def by_hand(loaded: Checkpoint, prompt: list[int], answer: list[int]) -> float:
    """The log-likelihood of token ids, one token after the other."""
    # Few shapes, which are few programs.
    sizes = [size for size in (4, 16, 63) if len(answer) <= size <= CONTEXT - len(prompt)]
    slots = min(sizes, default=len(answer))
    before, after = CONTEXT - slots - len(prompt), slots - len(answer)
    found = log_likelihood(
        loaded.params,
        loaded.model,
        np.array([[EOS] * before + prompt], np.int32),
        np.array([answer + [EOS] * after], np.int32),
        np.array([[False] * before + [True] * len(prompt)]),
        np.array([[True] * len(answer) + [False] * after]),
        config=LikelihoodConfig(estimator="ar_ftb"),
    )
    return float(found[0])


@pytest.fixture(scope="module")
def reader(opened) -> DiffusionLM:
    """Dream, token by token: nothing is drawn."""
    directory, loaded = opened["dream"]
    return DiffusionLM(str(directory), checkpoint=loaded, estimator="ar_ftb", batch_size=2)


def test_a_log_likelihood_is_that_of_the_tokens(reader, opened):
    loaded = opened["dream"][1]
    tok = loaded.tokenizer
    reader.cache_hook = Hook()
    found = scored(reader, *PAIRS, ("", "Tom has 3"))
    wanted = [
        by_hand(loaded, tok(QUESTION)["input_ids"], tok(" 12 apples")["input_ids"]),
        by_hand(loaded, tok("Tom has")["input_ids"], tok(PAIRS[1][1])["input_ids"]),
        by_hand(loaded, tok("Tom has 3 apples. He buys 4")["input_ids"], tok(" pens")["input_ids"]),
        by_hand(loaded, [EOS], tok("Tom has 3")["input_ids"]),
    ]
    np.testing.assert_allclose([score for score, _ in found], wanted, rtol=1e-4)
    assert [greedy for _, greedy in found] == [False] * 4
    assert reader.cache_hook.told == [
        ("loglikelihood", pair, result)
        for pair, result in zip([*PAIRS, ("", "Tom has 3")], found, strict=True)
    ]


@pytest.mark.slow
def test_pairs_that_fill_the_context_can_share_a_batch(reader, opened):
    loaded = opened["dream"][1]
    context = " ".join(["apples"] * 80)
    answers = [" 3 pens", " 3 boxes with 4 apples each. How many pens?"]
    found = scored(reader, *((context, answer) for answer in answers))
    prompt = loaded.tokenizer(context)["input_ids"]
    for (score, _), text in zip(found, answers, strict=True):
        answer = loaded.tokenizer(text)["input_ids"]
        wanted = by_hand(loaded, prompt[len(answer) - CONTEXT :], answer)
        np.testing.assert_allclose(score, wanted, rtol=1e-4)


def test_a_text_that_is_longer_than_the_context_is_scored_in_windows(reader, opened):
    loaded = opened["dream"][1]
    text = TEXT
    ids = loaded.tokenizer(text)["input_ids"]
    assert 62 < len(ids) <= 78
    first, second = ids[:62], ids[62:]
    # The second window is filled up with what stands before it.
    before = ids[len(ids) - 63 : 62]
    wanted = by_hand(loaded, [EOS], first) + by_hand(loaded, before, second)
    short = by_hand(loaded, [EOS], ids[:5])
    start = loaded.tokenizer.decode(ids[:5])
    requests = [
        Instance("loglikelihood_rolling", {}, (text,), 0),
        Instance("loglikelihood_rolling", {}, (start,), 1),
        Instance("loglikelihood_rolling", {}, ("",), 2),
    ]
    reader.cache_hook = Hook()
    found = reader.loglikelihood_rolling(requests, disable_tqdm=True)
    np.testing.assert_allclose(found, [wanted, short, 0.0], rtol=1e-4)
    # And of nothing else: windows are no requests.
    assert reader.cache_hook.told == [
        ("loglikelihood_rolling", request.args, total)
        for request, total in zip(requests, found, strict=True)
    ]


@pytest.mark.slow
def test_last_windows_of_unequal_length_share_a_batch(reader):
    one = TEXT.replace("Tom", "Kim")
    texts = (one, one + " He gives away 5")
    texts = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    together = reader.loglikelihood_rolling(texts, disable_tqdm=True)
    alone = [reader.loglikelihood_rolling([text], disable_tqdm=True)[0] for text in texts]
    np.testing.assert_allclose(together, alone, rtol=1e-4)


def test_drawn_estimates_do_not_depend_on_the_batch(make):
    pairs = [*PAIRS, PAIRS[1], ("", "3 apples")]
    model = make(batch_size=3)
    found = [score for score, _ in scored(model, *pairs)]
    assert all(score < 0 and math.isfinite(score) for score in found)
    alone = scored(make(batch_size=1), *pairs[::-1])
    # The first of two equal requests is the other one then, and its estimate is that of the first.
    order = [4, 3, 2, 1, 0]
    order[1], order[3] = order[3], order[1]
    np.testing.assert_allclose([alone[i][0] for i in order], found, rtol=1e-4)
    assert abs(found[1] - found[3]) > 1e-3
    other = scored(make(batch_size=1, seed=1), PAIRS[1])
    assert min(abs(other[0][0] - found[1]), abs(other[0][0] - found[3])) > 1e-3


@pytest.fixture
def works(monkeypatch):
    """What scorers are asked; they find everything equally probable."""
    asked = []

    def score(self, group, batch, *, rows):
        asked.extend(request.work for request in batch)
        return [dict(log_likelihood=-1.5, greedy=False, seconds=0.1)] * len(batch)

    monkeypatch.setattr(Scorer, "__call__", score)
    return asked


def test_estimates_are_kept_for_whoever_asks_the_same(make, works):
    responses = Responses()

    def new(family="llada", **settings):
        """How many pairs are scored anew."""
        works.clear()
        assert scored(make(family, responses=responses, **settings), *PAIRS) == [(-1.5, False)] * 3
        return len(works)

    assert new() == 3
    assert new(batch_size=2, gen_length=4, cache="dual", temperature=1.0) == 0
    assert new(mc_num=6) == 3
    assert new(mc_batch_size=4) == 3
    assert new(cfg_scale=0.5) == 3
    assert new(seed=1) == 3
    assert new("dream") == 3
    assert new() == 0


def test_only_what_dream_s_estimator_scores_ends_with_the_end_of_text_token(make, works):
    tok = make().tokenizer
    prompt, answer = tok(QUESTION)["input_ids"], tok(" 12 apples")["input_ids"]
    for family, estimator, end in (
        ("dream", "mc_rate", [EOS]),
        ("dream", "ar_ftb", []),
        ("dream", "mc_count", []),
        ("llada", None, []),
        ("llada", "mc_rate", [EOS]),
    ):
        works.clear()
        scored(make(family, estimator=estimator), PAIRS[0])
        assert [(work.prompt, work.answer) for work in works] == [(prompt, answer + end)]


def test_a_pair_that_is_too_long_loses_the_beginning_of_its_prompt(make, works):
    context, long = " ".join(["apples"] * 80), " ".join(["pens"] * 90)
    tok = make().tokenizer
    pens = tok(" pens")["input_ids"]
    scored(make(), (context, " pens"), ("apples", " " + long))
    first, second = works
    assert (first.prompt, first.answer) == (tok(context)["input_ids"][-63:], pens)
    assert (second.prompt, second.answer) == ([], pens * 64)
    works.clear()
    scored(make("dream"), (context, " pens"))
    assert (works[0].prompt, works[0].answer) == (tok(context)["input_ids"][-62:], [*pens, EOS])


def test_dream_s_estimator_scores_an_answer_of_one_token(make, opened):
    """It never masks the last token of a row: without an end the score would be 0."""
    model, loaded = make("dream", mc_num=128, mc_batch_size=32), opened["dream"][1]
    ((score, _),) = scored(model, (QUESTION, "3"))
    tok = loaded.tokenizer
    prompt = tok(QUESTION)["input_ids"]
    tokens = jnp.array([[*prompt, MASK, EOS]], jnp.int32)
    logits = jax.jit(loaded.model.apply)({"params": loaded.params}, tokens)[0, len(prompt) - 1]
    exact = float(jax.nn.log_softmax(logits)[tok("3")["input_ids"][0]])
    # The token is masked with the probability that its weight is one over: once on average.
    assert 0.5 < score / exact < 1.7


def test_check_greedy_tells_what_the_model_would_say(make, opened):
    loaded = opened["llada"][1]
    first, second = (loaded.tokenizer(context)["input_ids"] for context in (QUESTION, CONTEXTS[1]))
    decode = DecodeConfig.for_model(loaded.config, gen_length=6, block_length=6)
    engine = Engine(loaded, decode, NoCache())
    said, other, _ = (
        answer.ids for answer in engine.run([first, second, second], jax.random.key(0)).answers
    )
    assert said != other and MASK not in said
    model = make(check_greedy=True, batch_size=3)
    requests = [(("", ""), first, said), (("", ""), first, other), (("", ""), second, other)]
    found = model._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False, True]
    assert found[0][0] > found[1][0]


@pytest.mark.parametrize("length", [5, 32])
def test_what_was_not_checked_is_asked_again_when_it_is(make, say, monkeypatch, length):
    monkeypatch.setattr(
        runners, "log_likelihood", lambda params, model, *rows, **kw: jnp.zeros(len(rows[0]))
    )
    answer = [7] * length  # 32 is also a length to which answers are padded
    say(answer)
    responses = Responses()
    requests = [(("", "sevens"), [5, 6], answer)]
    for check in (False, True, False):
        model = make(responses=responses, check_greedy=check)
        assert model._loglikelihood_tokens(requests, disable_tqdm=True) == [(0.0, check)]


def test_a_likelihood_that_is_no_number_ends_the_evaluation(reader, monkeypatch):
    monkeypatch.setattr(reader._scorer, "_score", lambda *_: np.array([0.0, np.nan], np.float32))
    with pytest.raises(NotFinite, match="not finite in the forwards of a likelihood"):
        scored(reader, ("Tom has", " 3"), ("Tom has", " 4"))

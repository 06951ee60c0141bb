"""Log-likelihoods against plain loops over plain forwards, and what a row must not depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import replay
from places import CHECKPOINTS, read_case
from tiny_models import prompts, small

import dlm_jax
from dlm_jax import estimators
from dlm_jax.estimators import LikelihoodDraws
from dlm_jax.likelihood import LikelihoodConfig, log_likelihood

KEY = jax.random.key(7)
GUIDED = dict(estimator="mc_count", mc_num=4, batch_size=2, cfg_scale=0.7)
RATE = dict(estimator="mc_rate", mc_num=6, batch_size=3)
FORWARDS = dict(estimator="ar_ftb", batch_size=3)
BACKWARDS = dict(estimator="ar_btf", batch_size=3)

# Two rows of 4 + 3 and 6 + 5 tokens in a batch of 6 + 5 slots.
PROMPT, ANSWER = prompts(2, 6), prompts(2, 5, seed=1)
PROMPT_MASK = np.array([[False] * 2 + [True] * 4, [True] * 6])
ANSWER_MASK = np.array([[True] * 3 + [False] * 2, [True] * 5])
BATCH = (PROMPT, ANSWER, PROMPT_MASK, ANSWER_MASK)
KEYS = jax.random.split(KEY, 2)


def run(family="llada", batch=BATCH, *, key=KEYS, **setting):
    model, params = small(family)
    config = LikelihoodConfig(**setting)
    return np.asarray(log_likelihood(params, model, *batch, key=key, config=config))


@functools.cache
def _forward(family):
    model, params = small(family)
    return jax.jit(functools.partial(model.apply, {"params": params}))


def log_p(family, tokens, masked, prompt=0, cfg_scale=0.0):
    """The log-probability of every token of one sequence given a masked copy of it, [L]."""
    masked = np.isin(np.arange(len(tokens)), masked)
    hidden = np.where(masked, 39, tokens)
    free = np.where(np.arange(len(tokens)) < prompt, 39, hidden)
    logits, free = np.asarray(_forward(family)(np.stack([hidden, free]))).astype(np.float64)
    if cfg_scale:
        logits = free + (cfg_scale + 1) * (logits - free)
    if family == "dream":
        logits = np.concatenate([logits[:1], logits[:-1]])
    logits = logits - logits.max(axis=-1, keepdims=True)
    logits = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return logits[np.arange(len(tokens)), tokens]


def plain(family, prompt, answer, draws=None, **setting):
    """One row, as the originals' loops do it."""
    tokens, size = np.concatenate([prompt, answer]).astype(np.int32), len(prompt)
    log_type, cfg_scale = setting.get("log_type", "ftb"), setting.get("cfg_scale", 0.0)
    region = dict(ftb=range(size, len(tokens)), btf=range(size), union=range(len(tokens)))[log_type]
    if draws is None:
        total = 0.0
        for slot in region:
            after = range(slot, region.stop)
            before = range(region.start, slot + 1)
            masked = after if setting["estimator"] == "ar_ftb" else before
            total += log_p(family, tokens, list(masked))[slot]
        return total
    batches = []
    for copies, shares in zip(draws.masked, draws.p_mask, strict=True):
        loss = 0.0
        for copy, share in zip(copies, shares, strict=True):
            masked = np.flatnonzero(copy)
            loss += log_p(family, tokens, masked, size, cfg_scale)[masked].sum() / share
        batches.append(loss / len(copies))
    return np.mean(batches) / (len(tokens) if log_type == "union" else 1)


def drawn(key, prompt, answer, setting):
    """The masks of one row without padding, [T, S, P + A] and [T, S]."""
    config, length = LikelihoodConfig(**setting), prompt + answer
    region = jnp.isin(jnp.arange(length), jnp.asarray(config.scored(prompt, answer)))
    draw = estimators.ESTIMATORS[config.estimator].draw
    if draw is None:
        return None

    @jax.jit
    def forward(index):
        key_T = jax.random.fold_in(key, index)
        return draw(key_T, jnp.ones(length, bool), region, config.batch_size, config.eps)

    draws = [forward(index) for index in range(config.forwards(prompt, answer))]
    masked, p_mask = (np.asarray(list(part)) for part in zip(*draws, strict=True))
    return LikelihoodDraws(masked & np.asarray(region), p_mask)


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        ("llada", GUIDED),
        ("dream", RATE | dict(log_type="union")),
        ("dream", FORWARDS | dict(log_type="btf")),
        ("dream", BACKWARDS),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_padded_rows_equal_plain_loops_without_padding(family, setting):
    ours = run(family, **setting)
    for row in range(2):
        prompt, answer = PROMPT[row][PROMPT_MASK[row]], ANSWER[row][ANSWER_MASK[row]]
        draws = drawn(KEYS[row], len(prompt), len(answer), setting)
        wanted = plain(family, prompt, answer, draws, **setting)
        np.testing.assert_allclose(ours[row], wanted, rtol=1e-5)
    filled = np.where(PROMPT_MASK, PROMPT, 0), np.where(ANSWER_MASK, ANSWER, 39)
    np.testing.assert_array_equal(run(family, (*filled, *BATCH[2:]), **setting), ours)
    swapped = run(family, [part[::-1] for part in BATCH], key=KEYS[::-1], **setting)
    np.testing.assert_allclose(swapped[::-1], ours, rtol=1e-5)


def test_a_row_alone_equals_the_row_in_a_batch():
    alone = run(batch=(PROMPT[:1, 2:], ANSWER[:1, :3]), key=KEYS[:1], **GUIDED)
    np.testing.assert_allclose(alone, run(**GUIDED)[:1], rtol=1e-5)


def test_answers_of_one_and_of_two_tokens_equal_what_all_their_masks_give():
    model, params = small()
    prompt, answer = prompts(2, 4), prompts(2, 2, seed=1)
    batch = (prompt, answer, None, np.array([[True, False], [True, True]]))
    one = log_p("llada", np.concatenate([prompt[0], answer[0, :1]]), [4])[4]
    tokens = np.concatenate([prompt[1], answer[1]])
    first, second = (log_p("llada", tokens, [slot])[slot] for slot in (4, 5))
    both = log_p("llada", tokens, [4, 5])[4:].sum()

    ours = run(batch=batch, mc_num=16, batch_size=2)
    np.testing.assert_allclose(ours[0], one, rtol=1e-5)
    # Of two tokens every two copies mask one token, which counts twice, and both.
    possible = [both / 2 + (n * first + (8 - n) * second) / 8 for n in range(1, 8)]
    assert min(abs(ours[1] - value) for value in possible) < 1e-4

    masked = np.zeros((2, 2, 2, 6), bool)
    masked[0, :, :, 4] = masked[1, 0, 0, 4] = masked[1, 1, 0, 5] = True
    masked[1, :, 1, 4:] = True
    draws = LikelihoodDraws(masked, np.array([[[1.0, 1.0]] * 2, [[0.5, 1.0]] * 2]))
    config = LikelihoodConfig(mc_num=4, batch_size=2)
    ours = log_likelihood(params, model, *batch, config=config, draws=draws)
    np.testing.assert_allclose(ours, [one, both / 2 + (first + second) / 2], rtol=1e-5)


def test_an_empty_prompt_leaves_the_answer_alone():
    ours = run("dream", (prompts(1, 0), ANSWER[:1]), key=None, **FORWARDS)
    np.testing.assert_allclose(ours[0], plain("dream", [], ANSWER[0], **FORWARDS), rtol=1e-5)


def test_one_key_for_all_and_nothing_compiles_twice(caplog):
    same = [np.repeat(part[1:], 2, axis=0) for part in BATCH]
    one = run(batch=same, key=KEY, **GUIDED)
    assert one[0] != one[1]
    with jax.log_compiles(), caplog.at_level("WARNING"):
        np.testing.assert_array_equal(run(batch=same, key=jax.random.PRNGKey(7), **GUIDED), one)
        assert (run(batch=same, key=jax.random.key(8), **GUIDED) != one).all()
        assert (run(batch=same, key=KEY, **GUIDED | dict(cfg_scale=2.0)) != one).all()
        run(key=KEY, **GUIDED)  # other lengths
    assert not [text for text in caplog.messages if "_log_likelihood" in text]


def test_composes_with_jit_and_vmap():
    model, params = small()

    @jax.jit
    @jax.vmap
    def rows(prompt, answer, prompt_mask, answer_mask, key, cfg_scale):
        config = LikelihoodConfig(**GUIDED | dict(cfg_scale=cfg_scale))
        row = (part[None] for part in (prompt, answer, prompt_mask, answer_mask))
        return log_likelihood(params, model, *row, key=key[None], config=config)[0]

    ours = rows(*BATCH, KEYS, jnp.asarray([0.7, 2.0]))
    np.testing.assert_allclose(ours[0], run(**GUIDED)[0], rtol=1e-5)
    np.testing.assert_allclose(ours[1], run(**GUIDED | dict(cfg_scale=2.0))[1], rtol=1e-5)


@pytest.mark.parametrize("setting", [GUIDED, RATE | dict(log_type="union"), FORWARDS])
def test_bfloat16_parameters_give_float32(setting):
    model, params = small()
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    config = LikelihoodConfig(**setting)
    ours = jax.eval_shape(
        lambda half: log_likelihood(half, model, *BATCH, key=KEY, config=config), half
    )
    assert (ours.shape, ours.dtype) == ((2,), jnp.float32)


class TestDraws:
    VALID = np.array([False] * 2 + [True] * 10 + [False])
    SLOT = np.arange(13)
    REGION = (SLOT >= 5) & (SLOT < 13)  # seven tokens

    def draw(self, estimator, copies, rows):
        keys = jax.random.split(KEY, rows)
        draw = estimators.ESTIMATORS[estimator].draw
        valid, region = jnp.asarray(self.VALID), jnp.asarray(self.REGION)
        draws = jax.jit(jax.vmap(lambda key: draw(key, valid, region, copies, 0.1)))(keys)
        return np.asarray(draws.masked) & self.VALID, np.asarray(draws.p_mask)

    def test_count(self):
        masked, p_mask = self.draw("mc_count", 4, 400)
        assert not masked[..., ~self.REGION].any()
        counts = masked.sum(axis=-1)
        np.testing.assert_allclose(p_mask, counts / 7, rtol=1e-6)
        assert set(counts.ravel()) == set(range(1, 8))
        for start in range(1, 8):
            wanted = [(round(start + copy * 7 / 4) - 1) % 7 + 1 for copy in range(4)]
            found = counts[counts[:, 0] == start]
            assert len(found) > 30 and (found == wanted).all()
        # Every token is masked equally often, 4 times in 7.
        np.testing.assert_allclose(masked[..., 5:12].mean(axis=(0, 1)), 4 / 7, atol=0.05)

    def test_rate(self):
        masked, p_mask = self.draw("mc_rate", 4, 400)
        assert (p_mask >= 0.1).all() and (p_mask < 1).all()
        time = (p_mask - 0.1) / 0.9
        np.testing.assert_allclose(np.diff(np.sort(time, axis=-1)), 0.25, atol=1e-5)
        # Neither the first token nor the last, at slots 2 and 11.
        assert not masked[..., [2, 11]].any()
        for low in np.arange(0.1, 1.0, 0.15):
            inside = (p_mask >= low) & (p_mask < low + 0.15)
            share = masked[inside][:, 3:11].mean()
            np.testing.assert_allclose(share, p_mask[inside].mean(), atol=0.05)

    def test_depend_on_key_forward_and_copy(self):
        plan = functools.partial(
            estimators.plan,
            "mc_rate",
            valid_L=jnp.ones(40, bool),
            draws=None,
            scored=range(40),
            forwards=2,
            copies=2,
            eps=1e-3,
        )
        masked = jax.jit(lambda key, index: plan(key, index=index).masked_SL)
        first, second = masked(KEY, 0), masked(KEY, 1)
        np.testing.assert_array_equal(masked(KEY, 0), first)
        other = masked(jax.random.key(8), 0)
        assert len(np.unique(np.concatenate([first, second, other]), axis=0)) == 6


def test_the_default_is_that_of_the_family():
    for family, estimator in (("llada", "mc_count"), ("dream", "mc_rate")):
        config = small(family)[0].config
        assert LikelihoodConfig.for_model(config).estimator == estimator
        given = LikelihoodConfig.for_model(config, estimator="ar_btf", batch_size=None)
        assert (given.estimator, given.batch_size) == ("ar_btf", 16)


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            (dict(estimator="mc"), "one of mc_count, mc_rate, ar_ftb, ar_btf"),
            (dict(log_type="btf"), "with the estimator 'mc_count' it must be one of ftb"),
            (dict(estimator="ar_ftb", log_type="union"), "it must be one of ftb, btf"),
            (dict(mc_num=10, batch_size=4), "mc_num is 10; it must be a multiple of batch_size, 4"),
            (dict(mc_num=2, batch_size=4), "mc_num is 2; it must be a multiple of batch_size, 4"),
            (dict(batch_size=0), "batch_size is 0; it must be a whole number from 1 on"),
            (dict(eps=0.0), "eps is 0.0; it must lie between 0 and 1"),
            (dict(cfg_scale=-1.0), "cfg_scale is -1.0; it must be 0 or above"),
            (dict(estimator="mc_rate", cfg_scale=1.0), "'mc_rate' has no guidance"),
        ],
    )
    def test_settings(self, changes, words):
        with pytest.raises(ValueError) as error:
            LikelihoodConfig(**changes)
        assert words in str(error.value) and str(error.value).endswith(".")

    def check(self, words, prompt=None, answer=None, masks=(None, None), setting=None, **arguments):
        model, params = small()
        prompt = prompts(2, 3) if prompt is None else prompt
        answer = prompts(2, 4) if answer is None else answer
        config = LikelihoodConfig(**(setting or dict(mc_num=2, batch_size=2)))
        arguments = dict(key=KEY) | arguments
        with pytest.raises(ValueError) as error:
            log_likelihood(params, model, prompt, answer, *masks, config=config, **arguments)
        assert words in str(error.value) and str(error.value).endswith(".")

    def test_shapes(self):
        self.check("must be [batch, prompt length]", prompt=prompts(1, 3)[0])
        self.check("2 prompts and 3 answers", answer=prompts(3, 4))
        self.check("must be that of the answer, (2, 4)", masks=(None, np.ones((2, 3), bool)))
        self.check("padded left", masks=(np.array([[True, True, False]] * 2), None))
        self.check("padded right", masks=(None, np.array([[False] + [True] * 3] * 2)))
        self.check("one per row, (2,)", key=jax.random.split(KEY, 3))
        self.check("context ends at 64", prompt=prompts(2, 62))
        draws = LikelihoodDraws(np.ones((2, 1, 2, 6), bool), np.ones((2, 1, 2), np.float32))
        self.check("they must be (2, 1, 2, 7) and (2, 1, 2)", draws=draws)

    def test_values(self):
        self.check("must be integers", answer=prompts(2, 4) + 0.5)
        self.check("must lie in 0 to 39", answer=prompts(2, 4) + 30)
        self.check("The answer holds mask tokens", answer=np.full((2, 4), 39, np.int32))
        self.check("A row of the answer is empty", masks=(None, np.zeros((2, 4), bool)))
        self.check("A row of the answer is empty", answer=prompts(2, 0))
        btf = dict(estimator="ar_ftb", log_type="btf")
        self.check("A row of the prompt is empty", prompt=prompts(2, 0), setting=btf)
        self.check("draws masks; give it a key", key=None)
        draws = LikelihoodDraws(np.ones((2, 1, 2, 7), bool), np.ones((2, 1, 2), np.float32))
        self.check("draws nothing; leave draws out", setting=btf, draws=draws)


class TestReplay:
    """A replay that cannot fail would prove nothing."""

    def check(self, outcome, words, *, expected=None, name="dream-loglik-ar-ftb", **args):
        case = read_case(name)
        case = case | dict(args=case["args"] | args, expected=case["expected"] | (expected or {}))
        found, detail = replay.replay(case, CHECKPOINTS)
        assert found == outcome and words in detail, (found, detail)

    def test_falsified_cases_are_found_out(self):
        value = read_case("dream-loglik-ar-ftb")["expected"]["log_likelihood"]
        other = dict(log_likelihood=value * (1 + 3e-5))
        self.check("failed", "row 0: log-likelihood", expected=other)
        self.check("failed", "2 model forwards, recorded 3", expected=dict(nfe=3))
        self.check("failed", "log_type is 'union'", log_type="union")

    def test_what_has_no_counterpart_is_unsupported(self):
        for name, value in (
            ("classifier_free_guidance", 2.0),
            ("mask_token_id", 5),
            ("nll_type", "mc"),
            ("temperature", 0.0),
        ):
            self.check("unsupported", f"{name}={value}", **{name: value})


def test_public_names():
    assert dlm_jax.log_likelihood is log_likelihood
    assert dlm_jax.LikelihoodConfig is LikelihoodConfig

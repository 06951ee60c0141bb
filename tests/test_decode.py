"""Properties of the denoising loop, for every schedule and both families."""

import dataclasses
import functools
import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT
from tiny_models import prompts, small

from dlm_jax.decoding import history
from dlm_jax.decoding import loop as decode_lib
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.loop import diffusion_generate, diffusion_stream
from dlm_jax.decoding.start import start

KEY = jax.random.key(7)
# Every schedule, confidence measure and family once; all combinations would only cost compile time.
SETTINGS = {
    "llada, even": ("llada", dict(gen_length=8, block_length=4, steps=4)),
    "dream, timestep": ("dream", dict(gen_length=8, steps=6, schedule="timestep", alg="entropy")),
    "dream, fixed": (
        "dream",
        dict(
            gen_length=8, block_length=4, schedule="fixed", num_transfer_tokens=3, alg="topk_margin"
        ),
    ),
    "llada, sampled": (
        "llada",
        dict(
            gen_length=8, block_length=4, alg="maskgit_plus", temperature=1.0, top_p=0.9, top_k=20
        ),
    ),
}


@pytest.fixture(
    params=[
        pytest.param(s, id=name, marks=pytest.mark.slow if name == "dream, fixed" else [])
        for name, s in SETTINGS.items()
    ]
)
def setting(request) -> tuple[tuple, DecodeConfig]:
    """A small model with its parameters, and a decoding configuration."""
    family, arguments = request.param
    return small(family), DecodeConfig(**arguments)


def generate(model_params, prompt, mask=None, **arguments):
    model, params = model_params
    arguments = dict(key=KEY, record=("computed", "history")) | arguments
    return jax.device_get(diffusion_generate(params, model, prompt, mask, **arguments))


def test_fills_everything_and_never_changes_the_prompt(setting):
    small_model, config = setting
    prompt = prompts(3, 5)
    out = generate(small_model, prompt, decode=config)
    mask_id = small_model[0].config.mask_id
    np.testing.assert_array_equal(out.tokens[:, :5], prompt)
    assert (out.tokens != mask_id).all()
    assert (out.committed_at[:, :5] == -1).all() and (out.committed_at[:, 5:] >= 0).all()
    assert out.nfe == out.history.shape[0]
    assert np.isfinite(out.confidence).all()


def test_blocks_are_filled_from_left_to_right():
    out = generate(
        small("dream"), prompts(2, 3), decode=DecodeConfig(gen_length=12, block_length=4)
    )
    blocks = out.committed_at[:, 3:].reshape(2, 3, 4)
    assert (blocks.max(axis=-1)[:, :-1] < blocks.min(axis=-1)[:, 1:]).all()


def test_padding_changes_nothing(setting):
    small_model, config = setting
    short, long = prompts(1, 4, seed=1), prompts(1, 7, seed=2)
    batch = np.concatenate([np.pad(short, ((0, 0), (3, 0)), constant_values=38), long])
    mask = np.arange(7)[None] >= np.array([[3], [0]])
    keys = jax.random.split(KEY, 2)
    together = generate(small_model, batch, mask, decode=config, key=keys)
    alone = generate(small_model, short, decode=config, key=keys[:1])
    np.testing.assert_array_equal(together.tokens[0, 3:], alone.tokens[0])
    np.testing.assert_array_equal(together.committed_at[0, 3:], alone.committed_at[0])
    np.testing.assert_allclose(together.confidence[0, 3:], alone.confidence[0], atol=1e-5)
    alone = generate(small_model, long, decode=config, key=keys[1:])
    np.testing.assert_array_equal(together.tokens[1], alone.tokens[0])
    assert not together.computed[:, 0, :3].any()


def test_a_plain_python_loop_gives_the_same_tokens(small_model):
    """LLaDA's low-confidence remasking, written again without any of the library's loop."""
    model, params = small_model
    prompt = prompts(2, 5, seed=4)
    out = generate(small_model, prompt, decode=DecodeConfig(gen_length=8, block_length=4, steps=4))
    mask_id = model.config.mask_id
    canvas = np.concatenate([prompt, np.full((2, 8), mask_id, np.int32)], axis=1)
    for begin in (5, 9):
        for _ in range(2):
            logits = np.array(model.apply({"params": params}, canvas))
            if model.config.shift:
                logits = np.concatenate([logits[:, :1], logits[:, :-1]], axis=1)
            probability = np.array(jax.nn.softmax(logits, axis=-1))
            logits[..., mask_id] = -np.inf
            token = logits.argmax(-1)
            for row in range(2):
                masked = [p for p in range(begin, begin + 4) if canvas[row, p] == mask_id]
                masked.sort(key=lambda p, row=row: -probability[row, p, token[row, p]])
                canvas[row, masked[:2]] = token[row, masked[:2]]
    np.testing.assert_array_equal(out.tokens, canvas)


def test_drivers_agree(setting):
    small_model, config = setting
    model, params = small_model
    prompt, mask = prompts(2, 5), np.array([[False, False, True, True, True], [True] * 5])
    setup, state = start(params, model, prompt, mask, key=KEY, decode=config)
    results = [
        decode_lib._generate(
            setup, state.rows.tokens_BL, record=("computed", "history"), planned=planned
        )
        for planned in (True, False)
    ]
    chex.assert_trees_all_equal(*results)
    frames = list(diffusion_stream(params, model, prompt, mask, key=KEY, decode=config))
    assert [frame.step for frame in frames] == list(range(int(results[0].nfe)))
    for frame, canvas in zip(frames, results[0].history, strict=True):
        np.testing.assert_array_equal(frame.tokens, canvas)
    np.testing.assert_array_equal(frames[-1].committed_at, results[0].committed_at)
    np.testing.assert_array_equal(frames[-1].confidence, results[0].confidence)


def test_history_shows_every_commit_once(setting):
    small_model, config = setting
    out = generate(small_model, prompts(2, 5), decode=config)
    mask_id = small_model[0].config.mask_id
    masks = (out.history == mask_id).sum(axis=(1, 2))
    assert (np.diff(masks) <= 0).all() and masks[-1] == 0
    for step, canvas in enumerate(out.history):
        np.testing.assert_array_equal(canvas == mask_id, out.committed_at > step)
    np.testing.assert_array_equal(out.history[-1], out.tokens)


def test_nothing_is_recorded_unless_asked_for():
    out = generate(small(), prompts(1, 3), decode=DecodeConfig(gen_length=4), record=())
    assert out.history is None and out.computed is None


def test_composes_with_jit_and_vmap(setting):
    small_model, config = setting
    model, params = small_model
    stacked = np.stack([prompts(2, 5, seed=seed) for seed in range(3)])
    keys = jax.random.split(KEY, (3, 2))

    def one(prompt, key):
        return diffusion_generate(params, model, prompt, key=key, decode=config).tokens

    separate = [one(prompt, key) for prompt, key in zip(stacked, keys, strict=True)]
    np.testing.assert_array_equal(jax.vmap(one)(stacked, keys), np.stack(separate))
    np.testing.assert_array_equal(jax.jit(one)(stacked[0], keys[0]), separate[0])


@pytest.mark.slow
def test_equals_disable_jit():
    arguments = dict(decode=DecodeConfig(gen_length=2, steps=2))
    compiled = generate(small("dream"), prompts(1, 2), **arguments)
    with jax.disable_jit():
        eager = generate(small("dream"), prompts(1, 2), **arguments)
    np.testing.assert_array_equal(compiled.tokens, eager.tokens)


def test_numbers_are_traced_and_nothing_compiles_twice(caplog):
    run = functools.partial(generate, small(), prompts(2, 6), record=())
    base = dict(gen_length=4, block_length=2, temperature=0.7, top_p=0.9, top_k=5)
    run(decode=DecodeConfig(**base))
    with jax.log_compiles(), caplog.at_level("WARNING"):
        run(decode=DecodeConfig(**base))
        run(decode=DecodeConfig(**base | dict(temperature=0.3, top_p=0.5, top_k=3)))
        assert not [text for text in caplog.messages if "_generate" in text]
        run(decode=DecodeConfig(**base | dict(block_length=4)))
        assert [text for text in caplog.messages if "_generate" in text]


def test_noise_depends_on_key_step_and_position_only():
    decode = DecodeConfig(gen_length=8, block_length=4, temperature=1.5)
    prompt = prompts(2, 5)
    keys = jax.random.split(KEY, 2)
    both = generate(small(), prompt, decode=decode, key=keys)
    swapped = generate(small(), prompt[::-1], decode=decode, key=keys[::-1])
    np.testing.assert_array_equal(both.tokens, swapped.tokens[::-1])
    other = generate(small(), prompt, decode=decode, key=jax.random.key(8))
    assert (both.tokens != other.tokens).any()
    again = generate(small(), prompt, decode=decode, key=jax.random.PRNGKey(7))
    np.testing.assert_array_equal(again.tokens, generate(small(), prompt, decode=decode).tokens)


def test_infill_fills_masks_in_the_prompt_and_keeps_the_rest(setting):
    small_model, config = setting
    model, _ = small_model
    prompt = prompts(3, 6, seed=3)
    holes = np.zeros(prompt.shape, bool)
    holes[0, [1, 4]] = holes[1, 0] = True
    prompt[holes] = model.config.mask_id
    decode = dataclasses.replace(config, infill=True)
    out = generate(small_model, prompt, decode=decode)
    assert (out.tokens != model.config.mask_id).all()
    np.testing.assert_array_equal(out.tokens[:, :6][~holes], prompt[~holes])
    for row in range(3):
        alone = generate(
            small_model,
            prompt[row : row + 1],
            decode=decode,
            key=jax.random.fold_in(KEY, row)[None],
        )
        np.testing.assert_array_equal(out.tokens[row], alone.tokens[0])


def test_lockstep_changes_no_token():
    model, _ = small()
    prompt = prompts(2, 6, seed=3)
    prompt[0, 1:4] = model.config.mask_id
    base = dict(gen_length=8, block_length=4, schedule="fixed", num_transfer_tokens=2, infill=True)
    free = generate(small(), prompt, decode=DecodeConfig(**base, lockstep=False))
    tied = generate(small(), prompt, decode=DecodeConfig(**base, lockstep=True))
    np.testing.assert_array_equal(free.tokens, tied.tokens)
    # Row 0 has three more masks in its first block, hence needs two more forwards for it.
    assert tied.committed_at[1, 6:].max() > free.committed_at[1, 6:].max()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_generates(dtype):
    model, params = small("dream")
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    out = generate(
        (model, params), prompts(2, 5), decode=DecodeConfig(gen_length=8, block_length=4)
    )
    assert (out.tokens != model.config.mask_id).all() and np.isfinite(out.confidence).all()


def test_the_mask_token_is_never_committed_though_the_model_prefers_it():
    model, params = small()
    params = jax.tree.map(lambda leaf: leaf, params)
    params["head"]["kernel"] = jnp.zeros_like(params["head"]["kernel"])
    params["embed"]["embedding"] = jnp.ones_like(params["embed"]["embedding"])
    params["head"]["kernel"] = params["head"]["kernel"].at[:, model.config.mask_id].set(5.0)
    biased = (model, params)
    logits = model.apply({"params": params}, prompts(1, 4))
    if int(logits.argmax(-1)[0, 0]) != model.config.mask_id:
        params["head"]["kernel"] = -params["head"]["kernel"]
    decode = DecodeConfig(gen_length=4, steps=4)
    out = generate(biased, prompts(1, 4), decode=decode)
    assert (out.tokens != model.config.mask_id).all()
    # Confidences keep the mask token's share of the probability.
    assert (out.confidence[0, 4:] < 1 / model.config.vocab_size).all()
    out = generate(
        biased, prompts(1, 4), decode=DecodeConfig(gen_length=4, steps=4, ban_mask=False)
    )
    assert (out.tokens[:, 4:] == model.config.mask_id).all() and out.nfe == 4


def test_a_model_that_only_wants_masks_ends_all_the_same():
    model, params = small()
    params = dict(params, head=dict(kernel=jnp.zeros_like(params["head"]["kernel"])))
    # All logits are equal, so the lowest id wins; make the mask the lowest.
    config = dict(model.config.__dict__, mask_id=0)
    model = type(model)(type(model.config)(**config))
    decode = DecodeConfig(gen_length=4, schedule="fixed", ban_mask=False)
    out = generate((model, params), prompts(1, 3) + 1, decode=decode)
    assert out.nfe == 4 + 7


def test_sampled_tokens_follow_the_softmax():
    """Chi-square test of the first token of many one-token generations (99.9% quantile)."""
    model, params = small()
    rows, prompt = 4000, prompts(1, 4, seed=5)
    decode = DecodeConfig(gen_length=1, temperature=2.0, top_k=6)
    out = diffusion_generate(
        params, model, np.repeat(prompt, rows, axis=0), key=jax.random.key(3), decode=decode
    )
    canvas = np.concatenate([prompt, [[model.config.mask_id]]], axis=1).astype(np.int32)
    logits = np.array(model.apply({"params": params}, canvas))[0, -1].astype(np.float64)
    logits[model.config.mask_id] = -np.inf
    kept = np.argsort(-logits)[:6]
    weights = np.exp(logits[kept] / 2.0 - (logits[kept] / 2.0).max())
    counts = np.array([(out.tokens[:, -1] == token).sum() for token in kept])
    assert counts.sum() == rows
    expected = rows * weights / weights.sum()
    assert expected.min() > 5
    assert ((counts - expected) ** 2 / expected).sum() < 20.5  # chi-square, 5 degrees of freedom


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    blocks=st.integers(1, 3),
    block=st.integers(1, 4),
    factor=st.integers(1, 5),
    schedule=st.sampled_from(["even", "timestep", "fixed"]),
    leave_early=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_configuration_ends_and_leaves_no_mask(
    blocks, block, factor, schedule, leave_early, seed
):
    steps = None if schedule == "fixed" else blocks * factor
    decode = DecodeConfig(
        gen_length=blocks * block,
        block_length=block,
        steps=steps,
        schedule=schedule,
        num_transfer_tokens=factor if schedule == "fixed" else 1,
        leave_early=leave_early,
    )
    out = generate(small(), prompts(2, 3, seed=seed), decode=decode)
    assert (out.tokens != 39).all()
    assert out.nfe <= max(steps or 0, decode.gen_length)
    if not leave_early and steps is not None:
        assert out.nfe == steps


class TestBadInput:
    def check(self, words, prompt=None, mask=None, decode=None, **arguments):
        model, params = small()
        prompt = prompts(2, 3) if prompt is None else prompt
        with pytest.raises(ValueError, match=words):
            diffusion_generate(
                params,
                model,
                prompt,
                mask,
                **dict(key=KEY, decode=decode or DecodeConfig(gen_length=4)) | arguments,
            )

    def test_shapes(self):
        self.check(r"must be \[batch, prompt length\]", prompt=prompts(1, 3)[0])
        self.check("must be that of the prompt", mask=np.ones((1, 3), bool))
        self.check("at least one token", prompt=prompts(2, 0))
        self.check("one per row", key=jax.random.split(KEY, 3))
        self.check("at least one is needed", prompt=prompts(0, 3))
        self.check("must be integers", prompt=prompts(2, 3) + 0.5)
        self.check("padded left", mask=np.array([[True, True, False], [True] * 3]))

    def test_values(self):
        self.check("context ends at 64", decode=DecodeConfig(gen_length=64))
        self.check("must lie in 0 to 39", prompt=prompts(2, 3) + 30)
        self.check("set infill=True", prompt=np.full((1, 3), 39, np.int32))
        self.check("it must be a tuple of names", record=("tokens",))


def test_frames_show_a_mask_until_the_commit():
    frames = history.rebuild(
        jnp.asarray([[5, 6, 7]]), jnp.asarray([[-1, 1, 0]]), mask_id=9, forwards=2
    )
    np.testing.assert_array_equal(frames[:, 0], [[5, 9, 7], [5, 6, 7]])


SHARDED = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import conftest  # how tests set JAX
from tiny_models import prompts, small
from dlm_jax import DecodeConfig, diffusion_generate, models

axes = dict(q=(None, "model"), k=(None, "model"), v=(None, "model"), o=("model",))
axes |= dict(gate=(None, "model"), up=(None, "model"), down=("model",), head=(None, "model"))
mesh = Mesh(np.array(jax.devices()), ("model",))
model, params = small()
flat = {
    path: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*axes.get(layer, ()))))
    for path, leaf in models.flatten(params).items()
    for layer in [path.split("/")[-2]]
}
assert not flat["blocks_0/q/kernel"].sharding.is_fully_replicated
arguments = dict(key=jax.random.key(0), decode=DecodeConfig(gen_length=8, block_length=4))
one, two = (
    diffusion_generate(tree, model, prompts(2, 5), **arguments)
    for tree in (params, models.unflatten(flat))
)
np.testing.assert_array_equal(one.tokens, two.tokens)
np.testing.assert_allclose(one.confidence, two.confidence, atol=1e-5)
print("equal on", len(two.tokens.sharding.device_set), "devices")

# A batch in parts: one key per row, so that no row knows where it stands.
parts = PartitionSpec("model")
keys = jax.random.split(jax.random.key(1), 4)
decode = DecodeConfig(gen_length=8, block_length=4, temperature=5.0)

def tokens(params, prompt, key):
    return diffusion_generate(params, model, prompt, key=key, decode=decode).tokens

split = jax.shard_map(
    tokens, mesh=mesh, in_specs=(PartitionSpec(), parts, parts), out_specs=parts, check_vma=False
)
same = np.repeat(prompts(1, 5), 4, axis=0)
out = jax.jit(split)(params, same, keys)
np.testing.assert_array_equal(out, tokens(params, same, keys))
assert len(np.unique(out, axis=0)) == 4
print("equal in", len(out.sharding.device_set), "parts")
"""


@pytest.mark.slow
def test_sharded_parameters_and_batches_give_the_same_tokens():
    flags = dict(
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
        PYTHONPATH=os.pathsep.join([str(ROOT / "tests"), *sys.path]),
    )
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env=os.environ | flags, capture_output=True, text=True
    )
    assert done.stdout == "equal on 2 devices\nequal in 2 parts\n", done.stderr

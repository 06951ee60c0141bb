"""Parity with the recorded originals: logits, and generations step by step."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import replay
from places import CHECKPOINTS, GOLDEN, read_case
from tiny_models import tiny

from dlm_jax import models, queries
from dlm_jax.cache.base import empty_kv, kv_layer
from dlm_jax.models.attention import HeadsFirst
from dlm_jax.models.base import lay_out

CASES = sorted(path.stem for path in (GOLDEN / "cases").glob("*.json"))
REPRESENTATIVE = {
    "d2cache-dream-g32-b32-p0.1-k8-w0-cp10-bs2-pad-row0-mended",
    "d2fw-cp-sigma10-dream-g32-b16-threshold0.25-bs2",
    "d2fw-debias-dream-g32-b16-clip10-bs1",
    "d2fw-eb-gamma4-llada-g32-b32-bs2-mended",
    "d2fw-eos-llada-g32-b32-cp10-bs2",
    "d2fw-factor4.0-dream-g32-b16-bs2-mended",
    "d2fw-klass-dream-g32-b32-t0.15-kl0.2-h1-bs2-mended",
    "d2fw-vanilla-dream-g24-b8-n1-bs3-pad",
    "d2fw-wino-llada-g32-b16-w0.12-n0.3-cp10-bs2-pad-mended",
    "dllm-dream-g24-b12-kp8-kr2-rou0.25-bs2-pad",
    "dllmorig-llada-g24-b8-steps12-kp4-kr2-rou0.5-bs2",
    "dream-dkv-pd-un-c4-entropy-pad-s24-bs2",
    "dream-dkv-prefill-entropy-pad-s20-bs3",
    "dream-loglik-ar-ftb",
    "dream-loglik-mc-ftb-bs4",
    "dream-plain-entropy-algtemp0.3-s16-mended",
    "dream-plain-entropy-topp0.9-topk10-s20-bs2",
    "dream-plain-infill-entropy-s16",
    "dream-plain-origin-s16-bs2",
    "fastdllm-dream-dual-entropy-g48b16s15",
    "fastdllm-dream-dual-pad-bs2-thr030-g32b8-mended",
    "fastdllm-dream-nocache-thr040-g48s12",
    "fastdllm-dream-prefix-margin-g32b16s16-mended",
    "fastdllm-llada-dual-bs2-thr035-g32b16-mended",
    "fastdllm-llada-dual-fixed-g48b16s15",
    "fastdllm-llada-plain-fixed-manysteps-g16b8s24",
    "fastdllm-llada-prefix-fixed-oneblock-g32b32s13",
    "llada-dkv-decode-c8-b32-s20-uneven",
    "llada-dkv-greedy-w2-c4-b16-s16-bs2",
    "llada-loglik-mc16-bs4",
    "llada-loglik-mc8-bs8-cfg0.5",
    "llada-plain-b8-s24-oversteps",
    "llada-plain-cfg1.5-b16-s32",
    "llada-plain-maskpred-b12-s24",
    "llada-plain-random-b16-s16-bs2",
}


def forward(name):
    """The recorded forward of a checkpoint."""
    with np.load(GOLDEN / f"forward_{name}.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("name", ["llada-tiny", "dream-tiny"])
def test_logits_equal_the_recorded_ones(name):
    model, params = tiny(name)
    recorded = forward(name)
    logits = model.apply({"params": params}, recorded["tokens"].astype(np.int32))
    np.testing.assert_allclose(logits, recorded["logits"], atol=1e-4, rtol=0)


def test_padded_logits_equal_the_recorded_ones():
    model, params = tiny("dream-tiny")
    recorded = forward("dream-tiny")
    valid_BL = recorded["pad_attention_mask"] == 1
    assert not valid_BL.all()
    logits = model.apply({"params": params}, recorded["pad_tokens"].astype(np.int32), valid_BL)
    np.testing.assert_allclose(
        logits[valid_BL], recorded["pad_logits"][valid_BL], atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("name", "prefix"), [("llada-tiny", ""), ("dream-tiny", ""), ("dream-tiny", "pad_")]
)
def test_two_query_subsets_through_the_cache_give_the_recorded_logits(name, prefix):
    model, params = tiny(name)
    recorded = forward(name)
    tokens_BL = jnp.asarray(recorded[f"{prefix}tokens"], jnp.int32)
    valid_BL = jnp.ones(tokens_BL.shape, bool)
    if prefix:
        valid_BL = jnp.asarray(recorded["pad_attention_mask"] == 1)
    batch, length = tokens_BL.shape
    rows = empty_kv(model.config, length, jnp.float32, HeadsFirst)
    cache = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (batch, *leaf.shape)), rows)
    layers = ((0, model.config.num_layers, kv_layer),)
    slots = lay_out(model.config, valid_BL)

    def compute(mask_BL, cache):
        query = queries.pack(mask_BL & valid_BL, slots, valid_BL, tokens_BL.shape[1])
        tokens_BQ = queries.gather(tokens_BL, query.index_BQ)
        hidden, cache, _ = model.apply(
            {"params": params}, tokens_BQ, query, cache, (), layers, method="walk"
        )
        logits = model.apply({"params": params}, hidden, method="unembed")
        return queries.scatter(
            jnp.zeros((*tokens_BL.shape, logits.shape[-1])), logits, query.index_BQ
        ), cache

    # The first forward fills the cache; each subset then reads the other's keys and values from it.
    whole, cache = compute(jnp.ones(tokens_BL.shape, bool), cache)
    subset_BL = jnp.asarray(np.random.default_rng(0).random(tokens_BL.shape) < 0.4)
    first, cache = compute(subset_BL, cache)
    second, _ = compute(~subset_BL, cache)
    wanted = recorded[f"{prefix}logits"]
    for logits, part_BL in ((whole, valid_BL), (first, subset_BL), (second, ~subset_BL)):
        part_BL = np.asarray(part_BL & valid_BL)
        assert part_BL.any()
        np.testing.assert_allclose(logits[part_BL], wanted[part_BL], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name",
    [
        case if case in REPRESENTATIVE else pytest.param(case, marks=pytest.mark.slow)
        for case in CASES
    ],
)
def test_replay(name):
    outcome, detail = replay.replay(read_case(name), CHECKPOINTS)
    jax.clear_caches()  # a process can only hold so many programs
    assert (outcome, detail) == ("passed", "")


class TestReplayRejects:
    """A replay that cannot fail would prove nothing: falsified cases must be found out."""

    @pytest.fixture
    def case(self):
        return copy.deepcopy(read_case("dream-plain-maskgit-s1"))

    def check(self, case, words):
        outcome, detail = replay.replay(case, CHECKPOINTS)
        assert outcome == "failed" and words in detail, (outcome, detail)

    def test_a_token(self, case):
        case["expected"]["tokens"][0][-1] += 1
        self.check(case, "final tokens, row 0, position 24")

    def test_a_history_entry(self, case):
        case["expected"]["history"][0][0][3] += 1
        self.check(case, "step 0, row 0, position 3: token")

    def test_a_computed_set(self, case):
        length = len(case["expected"]["tokens"][0])
        case["expected"]["computed"] = [[list(range(1, length))]]
        self.check(case, "step 0, row 0, position 0: computed")

    def test_a_set_of_one_layer(self):
        case = copy.deepcopy(read_case("dllmorig-llada-g24-b8-steps12-kp4-kr2-rou0.5-bs2"))
        layers = case["expected"]["computed_layers"][1][1]
        dropped = layers[1].pop()
        self.check(case, f"step 1, row 1, layer 1, position {dropped}: computed, unlike")
        layers[1].append(dropped)
        layers.pop()
        self.check(case, f"step 1, row 1: computed sets of {len(layers)} layers for")
        case["expected"]["computed_layers"].pop()
        self.check(case, "11 entries of computed_layers for 12 model forwards")

    def test_missing_entries(self, case):
        case["expected"]["computed"] = [[None, None]]
        self.check(case, "step 0, computed sets of 2 rows for 1")
        case["expected"]["history"] = []
        self.check(case, "0 entries of history for 1 model forwards")

    def test_entries_of_another_shape(self, case):
        case["expected"]["history"] = [[[]]]
        self.check(case, "step 0, shape (1, 16), recorded (1, 0)")
        case["expected"]["history"] = [[row[-1:] for row in case["expected"]["tokens"]]]
        self.check(case, "step 0, shape (1, 16), recorded (1, 1)")

    def test_positions_that_do_not_exist(self, case):
        length = len(case["expected"]["tokens"][0])
        case["expected"]["computed"] = [[[*range(length), length]]]
        self.check(case, "no ascending list of positions")

    def test_a_value_of_the_wrong_type(self, case):
        case["args"]["steps"] = "1"
        self.check(case, "")

    def test_the_number_of_forwards(self, case):
        case["expected"]["nfe"] = 2
        self.check(case, "1 model forwards, recorded 2")

    def test_an_impossible_argument(self, case):
        case["args"]["steps"] = 0
        self.check(case, "steps is 0")

    def test_a_missing_argument(self, case):
        del case["args"]["eps"]
        self.check(case, "argument 'eps'")

    def test_unknown_settings_are_unsupported_not_ignored(self, case):
        for name, value in (("num_return_sequences", 2), ("mask_token_id", 5), ("cfg_scale", 2.0)):
            changed = case | dict(args=case["args"] | {name: value})
            assert replay.replay(changed, CHECKPOINTS) == ("unsupported", f"{name}={value}")
        case["source"]["entry"] = "elsewhere.generate"
        assert replay.replay(case, CHECKPOINTS) == ("unsupported", "entry point elsewhere.generate")

    @pytest.mark.parametrize(
        ("name", "argument", "value", "reason"),
        [
            ("d2fw-dual-dream-g24-b24-entropy-bs1", "cache", {"class": "Other"}, "cache.class="),
            (
                "d2fw-dual-dream-g24-b24-entropy-bs1",
                "cache",
                {"class": "PrefixCache", "use_dual": True, "extra": 1},
                "cache.extra=1",
            ),
            ("dream-dkv-decode-un-c1-entropy-s16", "shift_type", "right", "shift_type=right"),
            ("dream-dkv-decode-un-c1-entropy-s16", "cache_type", "pd", "cache_type=pd"),
            ("fastdllm-llada-dual-fixed-g48b16s15", "remasking", "random", "remasking=random"),
            ("d2fw-dual-dream-g24-b24-entropy-bs1", "strategy", "other", "strategy=other"),
            ("fastdllm-dream-prefix-entropy-g48b16s15", "steps", 3, "steps=3: with one step"),
        ],
    )
    def test_caches_without_a_counterpart_are_unsupported(self, name, argument, value, reason):
        case = read_case(name)
        outcome, detail = replay.replay(
            case | dict(args=case["args"] | {argument: value}), CHECKPOINTS
        )
        assert outcome == "unsupported" and reason in detail, (outcome, detail)

    def test_runs_of_a_defect_are_unsupported(self):
        case = copy.deepcopy(read_case("d2cache-llada-g32-b32-p0.1-k8-w0-bs1-mended"))
        mends = case["source"]["mended"]
        case["source"]["mended"] = [mend for mend in mends if "d2cache.py" not in mend]
        outcome, detail = replay.replay(case, CHECKPOINTS)
        assert outcome == "unsupported" and "records defects" in detail, (outcome, detail)

    def test_an_order_that_leaves_its_block(self):
        case = copy.deepcopy(read_case("llada-dkv-greedy-w8-c4-b12-s6-exhaust"))
        case["order"][0], case["order"][1] = case["order"][1], case["order"][0]
        self.check(case, "The order from position 6 on")


def test_replay_command(tmp_path, capsys):
    good = read_case("dream-plain-maskgit-s1")
    (tmp_path / "good.json").write_text(json.dumps(good))
    arguments = ["--checkpoints", str(CHECKPOINTS), str(tmp_path)]
    assert replay.main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [
        "good: pass",
        "1 passed, 0 failed, 0 unsupported",
    ]

    good["args"]["alg"] = "other"
    (tmp_path / "unsupported.json").write_text(json.dumps(good))
    assert replay.main(arguments) == 1
    assert "unsupported: unsupported: alg=other" in capsys.readouterr().out

    (tmp_path / "broken.json").write_text("{")
    assert replay.main(arguments) == 2
    assert "broken.json is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["llada-tiny", "dream-tiny"])
def test_config_survives_the_way_to_hugging_face_and_back(name):
    model, _ = tiny(name)
    assert models.config_from_hf(models.config_to_hf(model.config)) == model.config

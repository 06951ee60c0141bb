"""Options: what a value can be (names, with arguments of their own), and which become decoding."""

import argparse

import pytest

from dlm_jax import evaluate, generate
from dlm_jax.cli import choices, options
from dlm_jax.cli.options import Named


def test_names_have_arguments_of_their_own():
    text = "none, dual ,d2cache:rollout_p=0.2+sigma=0,none:threshold=0.9+alg=maskgit_plus"
    assert options.named_list(text) == [
        Named("none", "none", {}),
        Named("dual", "dual", {}),
        Named("d2cache:rollout_p=0.2+sigma=0", "d2cache", dict(rollout_p=0.2, sigma=0)),
        Named(
            "none:threshold=0.9+alg=maskgit_plus",
            "none",
            dict(threshold=0.9, alg="maskgit_plus"),
        ),
    ]


def test_arguments_have_types():
    arguments = options.named("dllm:kp=5+sigma=null+stop_until_eos=true+suppress=[1]").arguments
    assert arguments == dict(kp=5, sigma=None, stop_until_eos=True, suppress=[1])
    assert type(arguments["kp"]) is int


def test_one_name_may_occur_with_different_arguments():
    labels = [named.label for named in options.named_list("dllm:kp=5,dllm:kp=6,dllm")]
    assert labels == ["dllm:kp=5", "dllm:kp=6", "dllm"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'' is not a list of different names"),
        ("none,,dual", "'none,,dual' is not a list of different names"),
        ("none,", "'none,' is not a list of different names"),
        ("dual,none, dual", "'dual,none, dual' is not a list of different names"),
        (":kp=5", "':kp=5' is not of the form NAME or NAME:K=V+K=V"),
        ("none,dllm:", "'dllm:' is not of the form NAME or NAME:K=V+K=V"),
        ("dllm:kp", "'kp' is not of the form name=value"),
        ("dllm:kp=5+=3", "'=3' is not of the form name=value"),
    ],
)
def test_what_is_no_list_of_names_is_refused(text, words):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        options.named_list(text)
    assert words in str(error.value)


# --- options that are arguments of the decoding ---------------------------------------------------

EVERYWHERE = {
    *("steps", "schedule", "num_transfer_tokens", "block_length", "strategy"),
    *("alg", "alg_temp", "sigma", "clip_alpha", "threshold", "factor", "gamma"),
    *("temperature", "top_p", "top_k", "min_p", "cfg_scale", "step_shapes"),
}


@pytest.mark.parametrize(
    ("command", "only_here"), [(generate, {"max_forwards"}), (evaluate, set())]
)
def test_options_are_handed_on_by_their_names(command, only_here):
    args = command.parse([])
    assert set(choices.passed(args)) == EVERYWHERE | only_here
    assert choices.overrides(args, None) == {}  # nothing was given
    args = command.parse(["--steps=4", "--top-p=0.5", "--gen-length=8", "--stop-at-eos"])
    assert choices.overrides(args, None) == dict(steps=4, top_p=0.5, stop_until_eos=True)


def test_what_only_the_constructor_takes_is_handed_on_as_well(monkeypatch):
    monkeypatch.setattr(choices, "DecodeConfig", lambda *, steps=None, dream=None: None)
    args = generate.parse(["--steps=4"])
    args.dream = "deep"
    assert choices.overrides(args, None) == dict(steps=4, dream="deep")

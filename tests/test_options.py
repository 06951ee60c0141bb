"""What the value of an option can be: names, names with arguments, pairs."""

import argparse

import pytest

from dlm_jax.cli import options
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

"""The figures of an evaluation by hand, its table and picture."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_jax.cache import make
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.eval import report


def sample(**changes):
    """What the generator measures of a sample."""
    facts = dict(
        tokens=10,
        input_length=20,
        forwards=16,
        last_forward=8,
        positions=64.0,
        seconds=0.5,
        compile_seconds=4.0,
        memory_mib=100.0,
        setup="cpu, batch 4",
    )
    return facts | changes


def row(contender="none", **changes):
    """A row as `evaluation` makes it, of a task whose samples are generated."""
    cache = contender.partition(":")[0]
    values = dict(
        task="tiny_math",
        contender=contender,
        cache=cache,
        scores={"exact_match": [0.5, 0.25]},
        tokens_per_second=20.0,
        decode=dict(gen_length=64, block_length=16, threshold=None),
    )
    return values | changes


# --- measures -------------------------------------------------------------------------------------


def test_measures_by_hand():
    samples = [
        sample(),
        sample(
            tokens=2,
            input_length=30,
            forwards=4,
            last_forward=4,
            positions=32.0,
            seconds=1.5,
            compile_seconds=0.0,
            memory_mib=250.5,
            setup="cpu, batch 1",
        ),
    ]
    assert report.measures(samples) == dict(
        samples=2,
        tokens=12,
        tokens_per_second=6.0,  # 12 tokens in 2 seconds
        tokens_per_step=0.875,  # the mean of 10/8 and 2/4
        latency=1.0,
        forwards=10.0,
        positions=48.0,
        input_length=25.0,
        memory_mib=250.5,
        compile_seconds=4.0,
        setups=["cpu, batch 1", "cpu, batch 4"],
    )


def test_measures_of_empty_answers():
    empty = sample(tokens=0, last_forward=0, seconds=0.5)
    found = report.measures([empty])
    assert (found["tokens_per_second"], found["tokens_per_step"]) == (0.0, 0.0)
    assert report.measures([sample(seconds=0.0)])["tokens_per_second"] is None
    assert report.measures([]) == {}


# --- scores ---------------------------------------------------------------------------------------


def test_scores_have_the_names_and_errors_of_the_harness():
    results = {
        "name": "gsm8k",
        "alias": " - gsm8k",
        "sample_len": 64,
        "exact_match,strict-match": 0.75,
        "exact_match_stderr,strict-match": 0.125,
        "exact_match,flexible-extract": 1,
        "exact_match_stderr,flexible-extract": "N/A",
        "acc,none": 0.5,
        "acc_stderr,none": 0.25,
        "acc_norm,none": 0.625,
        "word_perplexity,none": 12.5,
        "word_perplexity_stderr,none": "N/A",
        "pass@1,create_test": 0.25,
    }
    assert report.scores(results) == {
        "exact_match (strict-match)": [0.75, 0.125],
        "exact_match (flexible-extract)": [1.0, None],
        "acc": [0.5, 0.25],
        "acc_norm": [0.625, None],
        "word_perplexity": [12.5, None],
        "pass@1 (create_test)": [0.25, None],
    }
    assert list(report.scores(results))[0] == "exact_match (strict-match)"


def test_what_was_only_predicted_has_no_scores():
    results = {"alias": "humaneval", "bypass,create_test": 999, "bypass_stderr,create_test": "N/A"}
    assert report.scores(results) == {}


# --- comparison -----------------------------------------------------------------------------------


def test_speed_and_agreement_are_against_none():
    none = row(tokens_per_second=20.0)
    dual = row("dual", tokens_per_second=50.0)
    all_rows = [(none, [["a"], ["b"], ["c"], ["d"]]), (dual, [["a"], ["b"], ["x"], ["d"]])]
    compared = [report.compare(*pair, all_rows) for pair in all_rows]
    assert compared[0] == none | dict(against="none", speedup=1.0, agreement=1.0)
    assert compared[1] == dual | dict(against="none", speedup=2.5, agreement=0.75)


def test_none_that_is_decoded_in_the_same_way_comes_before_the_first():
    parallel = dict(gen_length=64, block_length=16, threshold=0.9)
    all_rows = [
        (row(), [["a"], ["b"]]),
        (row("none:threshold=0.9", decode=parallel, tokens_per_second=40.0), [["a"], ["c"]]),
        (row("dual:threshold=0.9", decode=parallel, tokens_per_second=60.0), [["a"], ["c"]]),
        (row("dual", tokens_per_second=30.0), [["a"], ["b"]]),
    ]
    first, second, third, fourth = (report.compare(*pair, all_rows) for pair in all_rows)
    assert (first["against"], first["speedup"], first["agreement"]) == ("none", 1.0, 1.0)
    assert (second["against"], second["speedup"]) == ("none:threshold=0.9", 1.0)
    assert (third["against"], third["speedup"], third["agreement"]) == (
        "none:threshold=0.9",
        1.5,
        1.0,
    )
    assert third["note"] == "compared with none:threshold=0.9, which is decoded in the same way"
    assert (fourth["against"], fourth["speedup"]) == ("none", 1.5)
    # Nothing is to be said of what is compared with itself.
    assert "note" not in first and "note" not in second and "note" not in fourth


def test_the_first_none_serves_if_all_are_decoded_otherwise_and_that_is_noted():
    guided = dict(gen_length=64, block_length=64, threshold=None)
    all_rows = [
        (row(), [["a"]]),
        (row("none:threshold=0.5", decode=dict(gen_length=64, block_length=16, threshold=0.5)), []),
        (row("d2cache", decode=guided, tokens_per_second=30.0), [["b"]]),
    ]
    compared = report.compare(*all_rows[2], all_rows)
    assert (compared["against"], compared["speedup"], compared["agreement"]) == ("none", 1.5, 0.0)
    assert compared["note"] == (
        "decoded with block_length=64, unlike none: its speed-up and agreement are not the cache's "
        "alone"
    )


def test_without_none_nothing_is_compared():
    dual = row("dual")
    for others in (
        [],
        [(row("prefix"), [["a"]])],
        [(row(task="gsm8k"), [["a"]])],  # of another task
    ):
        assert report.compare(dual, [["a"]], [(dual, [["a"]]), *others]) == dual


def test_what_generates_nothing_is_not_compared():
    scored = dict(task="arc", contender="none", cache="none", scores={"acc": [0.5, None]})
    assert report.compare(scored, [["a"]], [(scored, [["a"]])]) == scored


@pytest.mark.parametrize("speed", [0.0, None])
def test_a_none_that_said_nothing_gives_no_speed_up(speed):
    none, dual = row(tokens_per_second=speed), row("dual")
    all_rows = [(none, [["a"], [""]]), (dual, [["a"], ["b"]])]
    assert report.compare(*all_rows[0], all_rows).get("speedup") is None
    compared = report.compare(*all_rows[1], all_rows)
    assert compared.get("speedup") is None
    assert "inf" not in report.markdown([compared])


# --- table ----------------------------------------------------------------------------------------


def test_a_table():
    rows = [
        row(
            tokens_per_second=20.0,
            speedup=1.0,
            tokens_per_step=1.0,
            agreement=1.0,
            latency=0.5,
            forwards=64.0,
            positions=96.0,
            input_length=30.25,
            memory_mib=1234.5,
            against="none",
        ),
        row(
            "d2cache:sigma=3",
            scores={"exact_match": [0.4375, None]},
            tokens_per_second=41.26,
            speedup=2.063,
            tokens_per_step=1.234,
            agreement=0.875,
            latency=0.24321,
            forwards=60.06,
            positions=40.0,
            input_length=30.25,
            memory_mib=1300.0,
            note="decoded otherwise",
        ),
    ]
    head = "cache             | exact_match     | tokens/s | speed-up | tokens/forward | agreement"
    tail = " | latency | forwards | positions | input | memory   |"
    line = "----------------- | --------------- | -------- | -------- | -------------- | ---------"
    line_tail = " | ------- | -------- | --------- | ----- | -------- |"
    one = "none              | 0.5000 ± 0.2500 | 20.0     | 1.00x    | 1.00           | 100.0%   "
    one_tail = " | 0.500 s | 64.0     | 96.0      | 30.2  | 1234 MiB |"
    two = "d2cache:sigma=3 * | 0.4375          | 41.3     | 2.06x    | 1.23           | 87.5%    "
    two_tail = " | 0.243 s | 60.1     | 40.0      | 30.2  | 1300 MiB |"
    assert report.markdown(rows) == (
        "tiny_math\n\n"
        f"| {head}{tail}\n"
        f"| {line}{line_tail}\n"
        f"| {one}{one_tail}\n"
        f"| {two}{two_tail}\n\n"
        "* d2cache:sigma=3 is decoded otherwise."
    )


def test_a_table_has_no_empty_columns_and_says_what_is_not_scored():
    rows = [
        dict(task="arc", contender="none", cache="none", scores={"acc": [0.5, 0.25]}),
        dict(task="code", contender="none", cache="none", scores={}, tokens_per_second=None),
        dict(task="code", contender="dual", cache="dual", scores={}, tokens_per_second=2.0),
        dict(task="arc", contender="dual", cache="dual", scores={"f1": [1.0, None]}),
    ]
    assert report.markdown(rows) == (
        "arc\n\n"
        "| cache | acc             | f1         |\n"
        "| ----- | --------------- | ---------- |\n"
        "| none  | 0.5000 ± 0.2500 | not scored |\n"
        "| dual  | not scored      | 1.0000     |\n\n"
        "code\n\n"
        "| cache | score      | tokens/s |\n"
        "| ----- | ---------- | -------- |\n"
        "| none  | not scored |          |\n"
        "| dual  | not scored | 2.0      |"
    )


def test_a_title_says_how_many_samples_and_on_what():
    rows = [
        row(samples=64, setups=["cpu, batch 4"], compile_seconds=12.34),
        row("dual", samples=64, setups=["cpu, batch 4", "cpu, batch 8"], compile_seconds=0.0),
    ]
    assert report.markdown(rows) == (
        "tiny_math, 64 samples, on cpu, batch 4 and cpu, batch 8\n\n"
        "| cache | exact_match     | tokens/s | compiling |\n"
        "| ----- | --------------- | -------- | --------- |\n"
        "| none  | 0.5000 ± 0.2500 | 20.0     | 12.3 s    |\n"
        "| dual  | 0.5000 ± 0.2500 | 20.0     | 0.0 s     |"
    )


def test_the_tasks_of_a_group_have_no_tables_of_their_own():
    group = dict(task="mmlu_pro", contender="none", cache="none", scores={"acc": [0.5, None]})
    tasks = [row(task=f"mmlu_pro_{name}", group="mmlu_pro") for name in ("law", "math")]
    assert report.markdown([*tasks, group]) == report.markdown([group])
    assert "law" not in report.markdown([group])


def test_a_note_is_told_once():
    note = "compared with none:steps=8, which is decoded in the same way"
    rows = [row("dual", note=note, task=task) for task in ("gsm8k", "tiny_math")]
    assert report.markdown(rows).count("* dual is compared with none:steps=8") == 1


# --- picture --------------------------------------------------------------------------------------

coordinate = st.integers(0, 6).map(float)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(coordinate, coordinate), max_size=12))
def test_the_frontier_is_what_no_other_point_is_as_good_as(points):
    def beats(other, point):
        return other != point and other[0] >= point[0] and other[1] >= point[1]

    best = report.frontier(points)
    best_by_hand = {p for p in points if not any(beats(other, p) for other in points)}
    assert best == sorted(best_by_hand)


def test_a_frontier():
    assert report.frontier([(1.0, 5.0), (2.0, 3.0), (2.0, 4.0), (3.0, 4.0), (0.5, 1.0)]) == [
        (1.0, 5.0),
        (3.0, 4.0),
    ]
    assert report.frontier([]) == []


def test_a_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need the extra plot")
    rows = [
        row(),
        row("dual", tokens_per_second=50.0, scores={"exact_match": [0.4375, None]}),
        row("prefix", tokens_per_second=None),
        row("d2cache", scores={}),
        row(task="gsm8k", scores={"exact_match (strict-match)": [0.5, 0.1], "other": [1.0, None]}),
        dict(task="arc", contender="none", cache="none", scores={"acc": [0.5, None]}),
    ]
    before = json.dumps(rows)
    path = tmp_path / "pareto.png"
    report.plot(rows, path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) > 10_000
    assert json.dumps(rows) == before
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (1140, 1260)  # two tasks, 7.6 x 4.2 inches each, 150 dots per inch


# --- the settings of a decoding -------------------------------------------------------------------


def test_the_settings_of_a_strategy_stand_beside_its_name():
    told = report.fields(DecodeConfig(gen_length=8, strategy="klass", threshold=0.9))
    wanted = dict(strategy="klass", rule="threshold", threshold=0.9, kl_history_length=2)
    assert wanted.items() <= told.items() and told["gen_length"] == 8
    assert json.loads(json.dumps(told))["kl_threshold"] == 0.01
    assert "threshold" not in report.fields(DecodeConfig())


def test_a_note_names_the_strategy_and_nothing_that_is_off():
    plain = DecodeConfig(gen_length=8)
    rows = [
        (row(cache.name, cache=cache.name, decode=report.fields(plain.for_cache(cache))), [["a"]])
        for cache in (make("none"), make("dkv-greedy"))
    ]
    note = report.compare(*rows[1], rows)["note"]
    assert note.startswith("decoded with strategy=random, unlike none: ")

"""Responses that survive a kill, and requests answered in batches by one process or several."""

import collections
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import CHECKPOINTS

from dlm_jax import checkpoint, distributed
from dlm_jax.batching.batches import Request, complete
from dlm_jax.batching.fingerprint import fingerprint
from dlm_jax.batching.responses import Responses, digest
from dlm_jax.weights import converted, layout


@pytest.fixture
def opened():
    """Opens responses, and closes them at the end."""
    files = []

    def open_responses(*args, **kwargs) -> Responses:
        files.append(Responses(*args, **kwargs))
        return files[-1]

    yield open_responses
    for file in files:
        file.close()


# --- responses ------------------------------------------------------------------------------------


def test_responses_are_found_again_by_the_next_object(tmp_path, opened):
    folder = tmp_path / "new" / "folder"
    first = opened(folder)
    first.add("a", {"text": "drei Äpfel\n\u2028🍎", "tokens": 3, "seconds": 0.25})
    first.add("b", {"log_likelihood": float("-inf"), "greedy": False})
    first.add("a", {"text": "later"})
    first.close()
    second = opened(folder)
    assert "a" in second and "b" in second and "c" not in second
    assert second["a"] == {"text": "later"}
    assert second["b"] == {"log_likelihood": float("-inf"), "greedy": False}


def test_a_response_is_on_disk_when_add_returns(tmp_path, opened):
    opened(tmp_path).add("a", {"text": "3 apples"})
    text = (tmp_path / "responses-0.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n") and json.loads(text)["response"] == {"text": "3 apples"}


def test_whatever_json_can_hold_is_kept(tmp_path, opened):
    first = opened(tmp_path)
    first.add("a", {"text": "half a pair: \ud800"})
    first.close()
    assert opened(tmp_path)["a"] == {"text": "half a pair: \ud800"}


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    responses = Responses()
    responses.add("a", 1)
    responses.close()
    assert responses["a"] == 1 and "b" not in responses
    assert list(tmp_path.iterdir()) == []


def test_a_kill_within_a_line_loses_only_that_response(tmp_path, opened):
    values = {"a": {"text": "first"}, "b": {"text": "zweite: ä"}, "c": {"text": "drei 🍎"}}
    whole = opened(tmp_path / "whole")
    for key, value in values.items():
        whole.add(key, value)
    whole.close()
    *before, last = (tmp_path / "whole" / "responses-0.jsonl").read_bytes().splitlines(True)
    for cut in range(len(last)):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "responses-0.jsonl").write_bytes(b"".join(before) + last[:cut])
        resumed = opened(folder)
        assert resumed["a"] == values["a"] and resumed["b"] == values["b"]
        if "c" in resumed:
            assert resumed["c"] == values["c"]
        resumed.add("d", {"text": "after"})
        resumed.close()
        again = opened(folder)
        assert [again[key] for key in "abd"] == [values["a"], values["b"], {"text": "after"}]
        assert "c" not in again or again["c"] == values["c"]
        again.add("c", values["c"])
        again.close()
        assert opened(folder)["c"] == values["c"], cut


def test_runs_that_are_killed_one_after_the_other_each_lose_one_response(tmp_path, opened):
    path = tmp_path / "responses-0.jsonl"
    for number in range(3):
        run = opened(tmp_path)
        run.add(f"whole {number}", number)
        run.add("torn", "lost")
        run.close()
        path.write_bytes(path.read_bytes()[:-9])
    last = opened(tmp_path)
    assert [last[f"whole {number}"] for number in range(3)] == [0, 1, 2]
    assert "torn" not in last


def test_the_responses_of_other_processes_are_read_and_left_alone(tmp_path, opened):
    for process in (0, 1, 10):
        responses = opened(tmp_path, process=process)
        responses.add(f"of {process}", process)
        responses.close()
    torn = tmp_path / "responses-1.jsonl"
    torn.write_bytes(torn.read_bytes() + b'{"key": "to')
    before = torn.read_bytes()
    third = opened(tmp_path, process=3)
    assert [third[f"of {process}"] for process in (0, 1, 10)] == [0, 1, 10]
    third.add("mine", 3)
    assert torn.read_bytes() == before
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"responses-{process}.jsonl" for process in (0, 1, 3, 10)}


def test_processes_write_at_the_same_time(tmp_path, opened):
    first, second = opened(tmp_path, process=0), opened(tmp_path, process=1)
    first.add("a", 1)
    second.add("b", 2)
    assert "b" not in first and "a" not in second  # until they are read again
    first.close()
    again = opened(tmp_path, process=0)
    assert (again["a"], again["b"]) == (1, 2)


@pytest.mark.parametrize(
    "line",
    [
        "not JSON",
        '{"doc_id": 0, "resps": []}',
        '["key", "response"]',
        '{"key": ["a"], "response": 1}',
        "17",
        '{"response": 1}',
    ],
)
def test_a_file_with_something_else_is_refused_in_one_sentence(tmp_path, opened, line):
    path = tmp_path / "responses-0.jsonl"
    good = '{"key": "a", "response": 1}\n'
    path.write_text(f"{good}{line}\n{good}")
    with pytest.raises(ValueError) as error:
        Responses(tmp_path)
    assert str(error.value) == (
        f"{path}, line 2, is no response; take another folder, or delete the line."
    )
    # The advice can be followed at once, and not only when the error is forgotten.
    path.write_text(good)
    assert opened(tmp_path)["a"] == 1


def test_a_folder_in_which_a_run_is_writing_is_refused(tmp_path, opened):
    running = opened(tmp_path)
    running.add("a", 1)
    with pytest.raises(ValueError) as error:
        Responses(tmp_path)
    assert str(error.value) == (
        f"Another run, or another model of this process, is writing to {tmp_path}; wait for it, or "
        "take another folder."
    )
    running.add("b", 2)
    running.close()
    running.close()  # once more does no harm
    after = opened(tmp_path)
    assert (after["a"], after["b"]) == (1, 2)


def test_a_digest_tells_parts_apart():
    parts = [
        (),
        ("",),
        ("ab",),
        ("a", "b"),
        (["a", "b"],),
        ("b", "a"),
        (1,),
        ("1",),
        (1.0,),
        (None,),
        ("null",),
        ([1, 2], [3]),
        ([1], [2, 3]),
        ({"a": 1},),
        ({"a": 2},),
        ("ä",),
        ("\ud800",),
        ("\ud801",),
    ]
    found = [digest(*part) for part in parts]
    assert len(set(found)) == len(parts)
    assert all(len(key) == 32 and set(key) <= set("0123456789abcdef") for key in found)


def test_a_digest_stays_the_same():
    # SHA-256 of ["a", 1, {"x": null, "y": [2.5]}]; another value would lose everybody's responses.
    assert digest("a", 1, {"y": [2.5], "x": None}) == "b1aba6745aba23af303447a4e350ebe0"
    assert digest("a", 1, {"x": None, "y": (2.5,)}) == digest("a", 1, {"y": [2.5], "x": None})


def copy_of(source: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_the_fingerprint_of_a_directory_changes_with_its_weights(tmp_path):
    directory = copy_of(CHECKPOINTS / "llada-tiny", tmp_path / "model")
    before = fingerprint(directory)
    (directory / "README.md").write_text("not weights")
    assert fingerprint(directory) == before
    weights = next(directory.glob("*.safetensors"))
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(weights, ns=(1, 1))
    assert fingerprint(directory) != before
    config = directory / layout.CONFIG
    now = fingerprint(directory)
    config.write_text(config.read_text() + "\n")
    assert fingerprint(directory) != now


def test_the_fingerprint_of_a_converted_directory_is_that_of_the_checksums(tmp_path):
    entry = converted.Entry((2, 3), checkpoint.as_dtype("float32"), "00c0ffee")
    folders = [tmp_path / name for name in ("first", "same", "other")]
    for folder in folders:
        folder.mkdir()
        other = entry._replace(crc32="00c0ffef") if folder.name == "other" else entry
        converted.write_metadata(folder, {"embed/embedding": other})
    first, same, other = map(fingerprint, folders)
    assert first == same != other
    for name in (layout.CONFIG, layout.GENERATION, "tokenizer.json", "chat_template.jinja"):
        before = fingerprint(folders[0])
        (folders[0] / name).write_text("{}")
        assert fingerprint(folders[0]) != before


# --- batches --------------------------------------------------------------------------------------


def request(key: str, size: int = 1, group: str = "one") -> Request:
    return Request(key, group, size, f"work of {key}")


class Answers:
    """Answers requests, and remembers the batches."""

    def __init__(self) -> None:
        self.batches = []

    def __call__(self, group, batch):
        assert all(request.group == group for request in batch)
        self.batches.append([request.key for request in batch])
        return [dict(text=f"answer to {request.work}") for request in batch]


def wanted(keys):
    return [dict(text=f"answer to work of {key}") for key in keys]


def test_answers_come_in_the_order_of_the_requests_and_the_largest_are_made_first():
    answers = Answers()
    requests = [request("a", 2), request("b", 5), request("c", 1), request("d", 9), request("e", 5)]
    found = complete(requests, answers, Responses(), batch_size=2, title="", quiet=True)
    assert found == wanted("abcde")
    assert answers.batches == [["d", "b"], ["e", "a"], ["c"]]


def test_groups_are_never_mixed():
    answers = Answers()
    requests = [
        request("a", 1, "one"),
        request("b", 2, "two"),
        request("c", 3, "one"),
        request("d", 4, "two"),
        request("e", 5, "one"),
    ]
    found = complete(requests, answers, Responses(), batch_size=2, title="", quiet=True)
    assert found == wanted("abcde")
    assert answers.batches == [["e", "c"], ["a"], ["d", "b"]]


def test_of_several_with_one_key_one_is_answered():
    answers = Answers()
    requests = [request(key) for key in "abacaba"]
    found = complete(requests, answers, Responses(), batch_size=8, title="", quiet=True)
    assert found == wanted("abacaba")
    assert answers.batches == [["a", "b", "c"]]


def test_what_is_known_is_not_asked_again():
    responses, answers = Responses(), Answers()
    responses.add("b", dict(text="known"))
    for batches in ([["a", "c"]], []):
        answers.batches = []
        found = complete(
            [request(key) for key in "abc"], answers, responses, batch_size=4, title="", quiet=True
        )
        assert [response["text"] for response in found] == [
            "answer to work of a",
            "known",
            "answer to work of c",
        ]
        assert answers.batches == batches
    assert complete([], answers, responses, batch_size=4, title="", quiet=True) == []


def test_a_failure_loses_nothing_that_was_answered_before(tmp_path, opened):
    class Failing(Answers):
        def __call__(self, group, batch):
            if len(self.batches) == 2:
                raise RuntimeError("RESOURCE_EXHAUSTED")
            return super().__call__(group, batch)

    requests = [request(key, size) for key, size in zip("abcdefg", range(7), strict=True)]
    killed = opened(tmp_path)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        complete(requests, Failing(), killed, batch_size=2, title="", quiet=True)
    killed.close()
    answers = Answers()
    found = complete(requests, answers, opened(tmp_path), batch_size=3, title="", quiet=True)
    assert found == wanted("abcdefg")
    assert answers.batches == [["c", "b", "a"]]


def test_the_progress_bar_tells_of_the_speed_and_can_be_silenced(capsys):
    def answer(group, batch):
        return [dict(tokens=10, seconds=0.5) for _ in batch]

    requests = [request(key) for key in "abcde"]
    complete(requests, answer, Responses(), batch_size=2, title="some work", quiet=True)
    assert capsys.readouterr() == ("", "")
    complete(requests, answer, Responses(), batch_size=2, title="some work")
    out, err = capsys.readouterr()
    assert out == ""
    assert "some work: 100%" in err and "5/5" in err and "20.0 tokens/s" in err


class Cluster:
    """Processes of a cluster as threads, each with a `dlm_jax.distributed` of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.count = count
        self._here = threading.local()
        self._here.index = 0
        self._barrier = threading.Barrier(count, timeout=30)
        self._values = [""] * count
        monkeypatch.setattr(distributed, "index", lambda: self._here.index)
        monkeypatch.setattr(distributed, "count", lambda: count)
        monkeypatch.setattr(distributed, "gather", self._gather)

    def _gather(self, value):
        self._values[self._here.index] = json.dumps(value)
        self._barrier.wait()
        values = [json.loads(value) for value in self._values]
        self._barrier.wait()
        return values

    def run(self, work):
        """What every process gets of `work(index)`."""

        def process(index):
            self._here.index = index
            try:
                return work(index)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(process, range(self.count)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    count=st.integers(1, 4),
    batch_size=st.integers(1, 4),
    keys=st.lists(st.integers(0, 15), max_size=24),
    known=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 15)), max_size=8),
)
def test_processes_share_the_work_and_all_get_everything(count, batch_size, keys, known):
    requests = [request(str(key), key * 7 % 5, f"group {key % 3}") for key in keys]
    size = {request.key: request.size for request in requests}
    everyone = [Responses() for _ in range(count)]
    for process, key in known:
        everyone[process % count].add(str(key), wanted([key])[0])
    answers = [Answers() for _ in range(count)]
    with pytest.MonkeyPatch.context() as monkeypatch:
        cluster = Cluster(monkeypatch, count)
        results = cluster.run(
            lambda i: complete(
                requests, answers[i], everyone[i], batch_size=batch_size, title="", quiet=True
            )
        )
    assert results == [wanted(keys)] * count
    shares = [[key for batch in each.batches for key in batch] for each in answers]
    asked = collections.Counter(key for share in shares for key in share)
    missing = {str(key) for key in keys} - {str(key) for _, key in known}
    assert asked == dict.fromkeys(missing, 1)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for each, responses, share in zip(answers, everyone, shares, strict=True):
        assert all(key in responses for key in share)
        by_group = collections.defaultdict(list)
        for batch in each.batches:
            assert len({int(key) % 3 for key in batch}) == 1
            by_group[int(batch[0]) % 3].append(batch)
        for batches in by_group.values():
            assert all(len(batch) == batch_size for batch in batches[:-1])
            sizes = [size[key] for batch in batches for key in batch]
            assert sizes == sorted(sizes, reverse=True)


def test_what_one_process_knew_is_neither_asked_nor_missed(monkeypatch, tmp_path, opened):
    folders = [opened(tmp_path / "here"), opened(tmp_path / "there", process=1)]
    folders[1].add("b", dict(text="known there"))
    answers = [Answers(), Answers()]
    found = Cluster(monkeypatch, 2).run(
        lambda i: complete(
            [request(key, size) for key, size in (("a", 1), ("b", 2), ("c", 3), ("d", 4))],
            answers[i],
            folders[i],
            batch_size=1,
            title="",
            quiet=True,
        )
    )
    texts = [response["text"] for response in found[0]]
    assert texts == [
        "answer to work of a",
        "known there",
        "answer to work of c",
        "answer to work of d",
    ]
    assert found[1] == found[0]
    assert [each.batches for each in answers] == [[["d"], ["a"]], [["c"]]]


def test_only_the_first_process_shows_its_progress(monkeypatch, capsys):
    requests = [request(key) for key in "abcd"]
    Cluster(monkeypatch, 2).run(
        lambda i: complete(requests, Answers(), Responses(), batch_size=1, title="work")
    )
    bars = capsys.readouterr().err
    assert "work: 100%" in bars and "4/4" in bars and bars.count("4/4") == 1

"""Prompts from the command line, files and standard input: what is read, and what is refused."""

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_jax import generate
from dlm_jax.cli import prompts
from dlm_jax.cli.prompts import QUESTION, Prompt

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Again"},
]


def read(*argv: str) -> list[Prompt]:
    return prompts.read(generate.parse(list(argv)))


def texts(*argv: str) -> list[str | None]:
    return [prompt.text for prompt in read(*argv)]


@pytest.fixture
def piped(monkeypatch):
    """Puts bytes into standard input."""

    def pipe(data: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))

    return pipe


def test_prompts_come_in_the_order_of_their_kinds(tmp_path, piped):
    whole, each = tmp_path / "whole.txt", tmp_path / "each.jsonl"
    whole.write_text("two\nlines\n")
    each.write_text('"one"\n\n{"prompt": "two", "answer": 2}\n[5, 6]\n')
    piped(b"from a pipe\n")
    found = read("first", "--prompt", "-", "--prompt-file", str(whole), "--prompt-file", str(each))
    wanted = ["first", "from a pipe", "two\nlines", "one", "two", None]
    assert [prompt.text for prompt in found] == wanted
    assert found[-1].ids == (5, 6)
    assert [p.place for p in found[3:]] == [f"{each}, line {n}," for n in (1, 3, 4)]
    assert texts() == [QUESTION]


def test_a_line_brings_a_conversation_ids_seed_and_length(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(
        json.dumps({"messages": TALK, "id": "x", "seed": 5, "gen_length": 7, "label": None})
        + "\n"
        + json.dumps({"prompt_ids": [1, 2], "id": 3, "prompt": None})
    )
    talk, ids = read("--prompt-file", str(file))
    assert talk.messages == tuple(TALK) and talk.title == "Again"
    assert (talk.id, talk.seed, talk.gen_length) == ("x", 5, 7)
    assert talk.fields == {"id": "x", "messages": TALK}
    assert ids.ids == (1, 2) and ids.fields == {"id": 3, "prompt": [1, 2]} and ids.title == "1 2"


LISTS = {
    "lines of objects": ('{"prompt": "a"}\n{"prompt": "b"}\n', ["a", "b"]),
    "one object": ('{"prompt": "a"}', ["a"]),
    "an object with the prompt last": ('{"id": 1, "prompt": "a"}\n', ["a"]),
    "lines of ids": ("[1, 2]\n[3]", [None, None]),
    "lines of strings": ('"a"\n"b"', ["a", "b"]),
    "an indented object": ('{\n  "prompt": "a"\n}', ["a"]),
    "a list of strings": ('["a",\n "b"]', ["a", "b"]),
    "a list of objects": ('[{"prompt": "a"}, "b"]', ["a", "b"]),
    "a list of ids": ("[[1, 2], [3]]", [None, None]),
}
TEXTS = ["{ let x; }", '"quoted"', "[MASK] b", '{"prompt"', "[a]", "5", "5\n6", "true", "a\n[1]"]
NEITHER = ['{"a": 1}', "[1, 2]", "[]", '{"question": "a"}\n{"question": "b"}', '{\n"a": 1\n}']


@pytest.mark.parametrize("case", LISTS)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "marked"])
def test_a_list_is_known_by_its_content(case, mark, tmp_path, piped):
    content, wanted = LISTS[case]
    file = tmp_path / "prompts.txt"
    file.write_bytes(mark + content.encode())
    assert texts("--prompt-file", str(file)) == wanted
    piped(mark + content.encode())
    assert texts("-") == wanted
    # Who wants the JSON itself can have it.
    assert texts("--prompt-file", str(file), "--prompt-format", "text") == [content.strip("\n")]


@pytest.mark.parametrize("content", TEXTS)
def test_what_only_looks_like_a_list_is_a_text(content, piped):
    piped(content.encode())
    assert texts("-") == [content]


@pytest.mark.parametrize("content", NEITHER)
def test_json_of_no_prompts_is_asked_about(content, piped):
    piped(content.encode())
    with pytest.raises(ValueError, match="Standard input is JSON, but none of prompts"):
        read("-")
    piped(content.encode())
    assert texts("-", "--prompt-format", "text") == [content]


def test_formats_by_name_and_by_option(tmp_path):
    content = '["a", "b"]\n\n["c"]\n'
    file = tmp_path / "x.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="is not JSON: Extra data.* --prompt-format jsonl"):
        read("--prompt-file", str(file))
    lines = texts("--prompt-file", str(file), "--prompt-format", "lines")
    assert lines == ['["a", "b"]', '["c"]']
    assert texts("--prompt-file", str(file), "--prompt-format=text") == [content.removesuffix("\n")]


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path, piped):
    for name in ("a.txt", "a.jsonl", "a.json", "ids.json"):
        content = {"a.txt": "Hi", "a.jsonl": '"Hi"', "a.json": '["Hi"]', "ids.json": "[[1]]"}[name]
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        if name != "ids.json":
            assert texts("--prompt-file", str(tmp_path / name)) == ["Hi"]
    assert read("--prompt-ids", str(tmp_path / "ids.json"))[0].ids == (1,)
    piped(b"\xef\xbb\xbfHi\xc3\xa4")
    assert texts("-") == ["Hi\xe4"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1))
def test_only_a_newline_ends_a_line(tmp_path_factory, contents):
    contents = [text for text in contents if text.strip()] or ["a\u2028b\u2029c\x85d\x0ce"]
    file = tmp_path_factory.mktemp("lines") / "a.jsonl"
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in contents]
    file.write_bytes("\r\n".join(lines).encode())
    assert texts("--prompt-file", str(file)) == contents


WRONG = {
    "no json": ("{", "line 2, is not JSON: Expecting property name"),
    "no prompt": ("{}", 'must be a string or an object with a string as "prompt"'),
    "two kinds": ('{"prompt": "a", "prompt_ids": [1]}', "only one of them"),
    "a number": ("3", 'must be a string or an object with a string as "prompt"'),
    "a number in it": ('{"prompt": 3}', 'an object with a string as "prompt", not 3'),
    "a blank": ('{"prompt": " "}', "is blank"),
    "half a pair": ('{"prompt": "\\ud800"}', "no valid Unicode"),
    "half a pair of a user": (
        '{"messages": [{"role": "user", "content": "\\ud800"}]}',
        "no valid Unicode",
    ),
    "no ids": ('{"prompt_ids": [1, true]}', "no list of token ids"),
    "empty ids": ('{"prompt_ids": []}', "at least one token"),
    "no messages": ('{"messages": []}', '"messages" that are no list'),
    "messages": ('{"messages": "Hi"}', '"messages" that are no list'),
    "a role": ('{"messages": [{"role": "tool", "content": "a"}]}', "system, user, assistant"),
    "no content": ('{"messages": [{"role": "user"}]}', "system, user, assistant"),
    "the last turn": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        "a turn of the assistant; the last one must be the user's",
    ),
    "seed": ('{"prompt": "a", "seed": -1}', '-1 as "seed"; it must be a whole number from 0'),
    "a true seed": ('{"prompt": "a", "seed": true}', 'True as "seed"'),
    "length": ('{"prompt": "a", "gen_length": 0}', '0 as "gen_length"'),
    "id": ('{"prompt": "a", "id": [1]}', '[1] as "id"'),
    "deep": ("[" * 100_000, "is nested too deeply"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_line_that_is_wrong_is_named_or_skipped(case, tmp_path):
    content, wanted = WRONG[case]
    file = tmp_path / "a.jsonl"
    file.write_text(f'"good"\n{content}\n"better"')
    with pytest.raises(ValueError) as error:
        read("--prompt-file", str(file))
    assert wanted in str(error.value) and f"{file}, line 2," in str(error.value)
    found = read("--prompt-file", str(file), "--skip-invalid")
    assert [prompt.text for prompt in found] == ["good", None, "better"]
    assert wanted in str(found[1].error)


def test_a_line_that_is_wrong_keeps_its_id(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"id": 7, "prompt": "a", "seed": -1}\n{"id": [1], "prompt": "a"}\n{')
    found = read("--prompt-file", str(file), "--skip-invalid")
    assert [prompt.id for prompt in found] == [7, None, None]
    assert [prompt.fields for prompt in found] == [{"id": 7}, {}, {}]


def test_an_empty_prompt_is_one_and_an_empty_file_is_not(tmp_path, piped):
    assert texts("--prompt", "") == [""]
    file = tmp_path / "a.jsonl"
    file.write_text('""')
    assert texts("--prompt-file", str(file)) == [""]
    piped(b"\n")
    with pytest.raises(ValueError, match="Standard input is empty"):
        read("-")
    for content in ("", "\n \n"):
        file.write_text(content)
        with pytest.raises(ValueError, match="holds no prompt"):
            read("--prompt-file", str(file))


def test_closed_standard_input_is_told(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ValueError, match="Standard input is closed"):
        read("-")

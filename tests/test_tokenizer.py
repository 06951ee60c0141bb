"""Tokenizers in both layouts, chat templates, padding, and text from ids; all without a network."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from dlm_jax import tokenizer as tk

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "<|begin|>", "<|mask|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary of all bytes and a few merges."""
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    return vocab, merges


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def two_files(tmp_path) -> Path:
    """Dream's layout: vocab.json, merges.txt and a class that only its own code defines."""
    directory = tmp_path / "two_files"
    directory.mkdir()
    vocab, merges = byte_pairs()
    (directory / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    added = {
        str(len(vocab) + i): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token != "<tool_call>",
        }
        for i, token in enumerate(SPECIAL)
    }
    settings = {
        "add_bos_token": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<|begin|>", "<|mask|>"],
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "bos_token": "<|begin|>",
        "chat_template": TEMPLATE,
        "eos_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "DreamTokenizer",
        "unk_token": None,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


@pytest.fixture
def one_file(tmp_path) -> Path:
    """LLaDA's layout: tokenizer.json; here one that begins plain text with a token of its own."""
    directory = tmp_path / "one_file"
    directory.mkdir()
    vocab, merges = byte_pairs()
    backend = Tokenizer(BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    begin = ("<|begin|>", backend.token_to_id("<|begin|>"))
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[begin]
    )
    backend.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": True,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return directory


@pytest.fixture
def tok(two_files):
    return tk.open_tokenizer(two_files)


def test_two_files_keep_special_tokens_whole(tok):
    first = len(byte_pairs()[0])
    assert tok.convert_tokens_to_ids(SPECIAL) == list(range(first, first + len(SPECIAL)))
    (ids,) = tk.encode(tok, ["hello<|mask|><|mask|> hello<tool_call>"], chat=False)
    mask, call = first + 5, first + 3
    hello, blank_hello = tok.convert_tokens_to_ids(["hello", "Ġhello"])
    assert ids == [hello, mask, mask, blank_hello, call]
    assert (tok.eos_token_id, tok.mask_token_id) == (first, mask)


def test_one_file_reads_its_template_from_a_file(one_file):
    tok = tk.open_tokenizer(one_file)
    assert tk.has_chat_template(tok)
    begin = tok.convert_tokens_to_ids("<|begin|>")
    assert tk.encode(tok, ["hello"], chat=False) == [[begin, tok.convert_tokens_to_ids("hello")]]
    # In a conversation the template writes all special tokens, and nothing is put before them.
    (ids,) = tk.encode(tok, ["hello"], chat=True)
    assert ids[0] == tok.convert_tokens_to_ids("<|im_start|>")
    assert begin not in ids


def test_chat_is_the_template(tok):
    (ids,) = tk.encode(tok, ["hello"], chat=True)
    written = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert tok.decode(ids, skip_special_tokens=False) == written
    assert ids.count(tok.convert_tokens_to_ids("<|im_start|>")) == 2
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "he"},
        {"role": "user", "content": "ll"},
    ]
    longer = tk.encode_chat(tok, messages)
    assert tok.decode(longer).count("<|im_start|>user\n") == 2
    assert longer[: len(ids)] == ids


def test_a_directory_without_a_tokenizer_has_none(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert tk.open_tokenizer(tmp_path) is None
    assert not tk.has_chat_template(None)


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_damaged_files_are_named(two_files, name):
    (two_files / name).write_text("{")
    with pytest.raises(ValueError, match="two_files cannot be read"):
        tk.open_tokenizer(two_files)


def test_half_a_tokenizer_is_refused(two_files):
    (two_files / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor vocab\.json"):
        tk.open_tokenizer(two_files)


def test_every_file_that_matters_is_listed(two_files, one_file, tmp_path):
    """A checkpoint is copied with `FILES`; the copy must be the same tokenizer."""
    for directory in (two_files, one_file):
        copy = tmp_path / "copy"
        copy.mkdir()
        for name in tk.FILES:
            if (directory / name).exists():
                shutil.copyfile(directory / name, copy / name)
        text = "hello <|mask|> and more"
        for chat in (False, True):
            wanted = tk.encode(tk.open_tokenizer(directory), [text], chat=chat)
            assert tk.encode(tk.open_tokenizer(copy), [text], chat=chat) == wanted
        shutil.rmtree(copy)


def test_pad_is_on_the_left_up_to_the_bucket():
    ids_BP, mask_BP = tk.pad([[1, 2, 3], [4]], 9, bucket=4)
    assert ids_BP.dtype == np.int32 and mask_BP.dtype == bool
    assert ids_BP.tolist() == [[9, 1, 2, 3], [9, 9, 9, 4]]
    assert mask_BP.tolist() == [[False, True, True, True], [False, False, False, True]]


@pytest.mark.parametrize(
    ("length", "limit", "slots"), [(1, None, 4), (4, None, 4), (5, None, 8), (5, 6, 6), (7, 6, 7)]
)
def test_pad_rounds_up_within_the_limit(length, limit, slots):
    ids_BP, mask_BP = tk.pad([[5] * length], 9, bucket=4, limit=limit)
    assert ids_BP.shape == mask_BP.shape == (1, slots)
    assert mask_BP.sum() == length


def test_neighbouring_lengths_share_a_bucket():
    shapes = {tk.pad([[1] * length], 0)[0].shape for length in range(1, tk.BUCKET + 1)}
    assert shapes == {(1, tk.BUCKET)}


def test_decode_ends_at_the_first_eos_and_drops_special_tokens(tok):
    eos, hello = tok.eos_token_id, tok.convert_tokens_to_ids("hello")
    end = tok.convert_tokens_to_ids("<|im_end|>")
    ids = np.array([hello, end, hello, eos, hello, eos], np.int32)
    assert tk.decode(tok, ids, eos) == "hellohello"
    assert tk.decode(tok, ids) == "hellohellohello"
    assert tk.decode(tok, [eos], eos) == ""
    assert tk.until_eos(ids, eos) == [hello, end, hello]


def test_blanks_are_left_alone(one_file):
    """`transformers` would turn "hello ." into "hello." for a tokenizer that says so."""
    tok = tk.open_tokenizer(one_file)
    (ids,) = tk.encode(tok, ["hello ."], chat=False)
    assert tk.decode(tok, ids) == "hello ."


def test_pieces_join_to_the_text(tok):
    text = "hello é hello 你好<|im_end|>"
    (ids,) = tk.encode(tok, [text], chat=False)
    pieces = tk.pieces(tok, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    assert pieces[0] == "hello" and "你" in pieces and "" in pieces


def test_pieces_of_broken_text(tok):
    (ids,) = tk.encode(tok, ["你"], chat=False)
    assert tk.pieces(tok, ids[:2]) == ["", "\N{REPLACEMENT CHARACTER}"]
    assert tk.pieces(tok, []) == []


def test_opening_says_nothing_and_leaves_the_environment_alone(two_files):
    code = (
        "import os, sys\n"
        "from dlm_jax.tokenizer import open_tokenizer\n"
        "assert 'transformers' not in sys.modules\n"
        "before = dict(os.environ)\n"
        f"open_tokenizer({str(two_files)!r})\n"
        "assert dict(os.environ) == before\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("TRANSFORMERS")},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_masks_are_written_with_the_tokenizers_own_text(tok):
    mask = tok.convert_tokens_to_ids("<|mask|>")
    text = tk.write_masks(tok, "hello [MASK][MASK*2] <|mask|> [mask]", mask, limit=4)
    assert text == "hello <|mask|><|mask|><|mask|> <|mask|> [mask]"
    assert tk.encode(tok, [text], chat=False)[0].count(mask) == 4
    for wrong in ("[MASK*0]", "[MASK*5]", "[MASK*]", "[MASK*-1]", "[MASK*two]", "[MASK*9e9]"):
        with pytest.raises(
            ValueError, match=f"{re.escape(repr(wrong))} must say how many .* 1 to 4"
        ):
            tk.write_masks(tok, f"hello {wrong}", mask, limit=4)
    with pytest.raises(ValueError, match="no text for the mask token, 5000; give the prompts as"):
        tk.write_masks(tok, "[MASK]", 5000, limit=4)


def test_a_token_is_a_text_or_an_id(tok):
    assert tk.token_id(tok, "<|endoftext|>") == tok.eos_token_id
    assert tk.token_id(tok, " hello") == tok.convert_tokens_to_ids("Ġhello")
    assert tk.token_id(tok, "id:12") == tk.token_id(None, "id:12") == 12
    # A digit is a text as any other.
    assert tk.token_id(tok, "5") == tok.convert_tokens_to_ids("5") != 5
    with pytest.raises(ValueError, match=r"'12' is 2 tokens, .*; an id is written id:12\."):
        tk.token_id(tok, "12")
    with pytest.raises(ValueError, match=r"'hello hello' is 2 tokens, .* exactly one"):
        tk.token_id(tok, "hello hello")
    with pytest.raises(ValueError, match="needs a tokenizer"):
        tk.token_id(None, "hello")


def test_frequencies_of_a_corpus(tmp_path):
    file = tmp_path / "counts.json"
    file.write_text(json.dumps({"num_token": 8, "p_baseline_dict": {"2": 4, "0": 0}}))
    shares = tk.frequencies(file, 4)
    assert shares.dtype == np.float32 and shares.tolist() == [0, 0.125, 0.5, 0.125]
    file.write_text("[0.5, 0.25, 0, 0.25]")
    assert tk.frequencies(str(file), 4).tolist() == [0.5, 0.25, 0, 0.25]


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("{", "is not JSON"),
        ("3", "must hold a list of shares, or an object"),
        ('{"num_token": 4}', "must hold a list of shares, or an object"),
        ('{"num_token": 0, "p_baseline_dict": {}}', "must hold a list of shares, or an object"),
        ('{"num_token": "4", "p_baseline_dict": {}}', "must hold a list of shares, or an object"),
        ('{"num_token": 4, "p_baseline_dict": {"4": 1}}', "token '4'; ids must lie in 0 to 3"),
        ('{"num_token": 4, "p_baseline_dict": {"a": 1}}', "token 'a'; ids must lie in 0 to 3"),
        ('{"num_token": 4, "p_baseline_dict": {"1": 5}}', "has 5 for token 1; .* from 0 to 4"),
        ('{"num_token": 4, "p_baseline_dict": {"1": null}}', "has None for token 1"),
        ("[0.5, 0.5]", "lists 2 shares; it must have one for each of the 4 tokens"),
        ("[0.5, 0.5, 0, -1]", "has -1 for token 3; it must be a number from 0 to 1"),
        ("[0.5, 0.5, 0, NaN]", "has nan for token 3"),
    ],
)
def test_frequencies_that_are_none(tmp_path, content, wanted):
    file = tmp_path / "counts.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=wanted):
        tk.frequencies(file, 4)


# --- byte order marks, chat templates -------------------------------------------------------------


def test_a_byte_order_mark_is_no_part_of_a_text(two_files, one_file, tmp_path):
    (tmp_path / "shares.json").write_text("[0.5, 0.5]", encoding="utf-8-sig")
    assert tk.frequencies(tmp_path / "shares.json", 2).tolist() == [0.5, 0.5]
    for directory in (two_files, one_file):
        wanted = tk.encode(tk.open_tokenizer(directory), ["hello"], chat=True)
        for name in tk.FILES:
            if (directory / name).exists():
                data = (directory / name).read_bytes()
                (directory / name).write_bytes(b"\xef\xbb\xbf" + data)
        tok = tk.open_tokenizer(directory)
        assert tk.encode(tok, ["hello"], chat=True) == wanted
        assert tok.name_or_path == str(directory)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ messages[0].content.none.at.all }}", "has no attribute 'none'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages + 1 }}", "can only concatenate list"),
    ],
)
def test_a_chat_template_that_fails_is_named(tok, two_files, template, reason):
    tok.chat_template = template
    with pytest.raises(tk.TemplateError) as error:
        tk.encode(tok, ["hello"], chat=True)
    told = str(error.value)
    assert told.startswith(f"The chat template of {two_files} cannot put the conversation: ")
    assert reason in told and "\n" not in told and told.endswith(".")

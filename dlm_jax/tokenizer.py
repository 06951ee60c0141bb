"""Between text and token ids: the first and the last step, outside the decoding loop.

    text -encode-> rows of ids -pad-> ids_BP, mask_BP -> [decoding] -> ids -decode-> text

Tokenizers are read from a directory with Hugging Face's `transformers`, which is imported only when
the first one is opened. No code of a checkpoint is run and nothing is fetched.
"""

import codecs
import contextlib
import itertools
import json
import math
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any, SupportsIndex

import numpy as np

BUCKET = 32
"""Prompt slots come in multiples of this: prompts of like length share a compiled program."""

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""All files that a tokenizer may consist of; a checkpoint is copied together with them."""

MASKS = re.compile(r"\[MASK(?:\*([^\]]*))?\]")
"""How a text says where tokens are to be filled in: `[MASK]`, or `[MASK*5]` for five of them."""

ID = re.compile(r"id:([0-9]{1,9})")
"""How an option names a token by its id, since any digits are a text as well."""

Tokenizer = Any
"""A `transformers` tokenizer. Its class is not named, so that nothing imports it early."""
Ids = Iterable[SupportsIndex]
"""Token ids: a list, or a NumPy or JAX array."""


class TemplateError(ValueError):
    """A conversation that the chat template cannot put; one sentence says why."""


def open_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer | None:
    """Opens the tokenizer in a checkpoint directory.

    `tokenizer.json` (LLaDA) is taken as it is. `vocab.json` with `merges.txt` (Dream, which names a
    class of its own that copies Qwen2's) is read as Qwen2's byte-level BPE. Added and special
    tokens and the chat template come from the other files in either case.

    Returns:
      The tokenizer, or None if the directory holds none.

    Raises:
      ValueError: there are tokenizer files, but none that can be read.
    """
    directory = pathlib.Path(directory)
    if (directory / "tokenizer.json").is_file():
        name = "PreTrainedTokenizerFast"
    elif (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        name = "Qwen2TokenizerFast"
    elif any((directory / name).is_file() for name in FILES):
        raise ValueError(
            f"{directory} has tokenizer files, but neither tokenizer.json nor vocab.json with "
            "merges.txt; one of them is needed."
        )
    else:
        return None
    try:
        kind = getattr(_transformers(), name)
        with _without_marks(directory) as readable:
            tokenizer = kind.from_pretrained(readable, local_files_only=True)
    except Exception as error:  # whatever the parsers raise on a damaged file
        raise ValueError(f"The tokenizer in {directory} cannot be read: {error}") from error
    tokenizer.name_or_path = str(directory)
    template = tokenizer.chat_template
    if template is not None and not isinstance(template, str | dict):
        raise ValueError(f"The chat template in {directory} is {template!r}; it must be a text.")
    return tokenizer


@contextlib.contextmanager
def _without_marks(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder with the same files, none of which begins with a byte order mark."""

    def marked(path: pathlib.Path) -> bool:
        with path.open("rb") as file:
            return file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8

    paths = [directory / name for name in FILES if (directory / name).is_file()]
    if not any(map(marked, paths)):
        yield directory
        return
    with tempfile.TemporaryDirectory() as folder:
        for path in paths:
            data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
            (pathlib.Path(folder) / path.name).write_bytes(data)
        yield pathlib.Path(folder)


def has_chat_template(tokenizer: Tokenizer | None) -> bool:
    """Whether prompts can be put as a conversation."""
    return bool(getattr(tokenizer, "chat_template", None))


def encode(tokenizer: Tokenizer, prompts: Sequence[str], *, chat: bool) -> list[list[int]]:
    """Token ids of each prompt: as one user message each if `chat`, otherwise as plain text."""
    if chat:
        return [encode_chat(tokenizer, [{"role": "user", "content": text}]) for text in prompts]
    return [tokenizer(text, verbose=False)["input_ids"] for text in prompts]


def encode_chat(tokenizer: Tokenizer, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a conversation, up to where the assistant's next answer begins.

    Args:
      messages: `{"role": "user" | "assistant" | "system", "content": text}`, oldest first.

    Raises:
      TemplateError: the chat template cannot put them.
    """
    text = conversation(tokenizer, messages, add_generation_prompt=True)
    # The template writes the special tokens itself.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def beginning(tokenizer: Tokenizer, eos_id: int) -> int:
    """The token that a text out of nothing begins with; `eos_id` where there is no other."""
    bos_id = tokenizer.bos_token_id
    return eos_id if bos_id is None else bos_id


def conversation(tokenizer: Tokenizer, messages: Sequence[dict[str, str]], **how: bool) -> str:
    """The text of a conversation; see `encode_chat`. `how` it ends, the tokenizer knows."""
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **how)
    except Exception as error:  # whatever the code in a template raises
        reason = str(error) or type(error).__name__
        raise TemplateError(
            f"The chat template of {tokenizer.name_or_path} cannot put the conversation: "
            f"{' '.join(reason.split()).rstrip('.')}."
        ) from error


def write_masks(tokenizer: Tokenizer, text: str, mask_id: int, *, limit: int) -> str:
    """Puts the tokenizer's own text for a mask where `[MASK]` or `[MASK*5]` stands.

    Args:
      tokenizer: knows that text.
      text: a prompt.
      mask_id: the model's mask token.
      limit: the most masks that can be of use.

    Raises:
      ValueError: the number of masks is none, or the tokenizer has no text for them.
    """
    mask = tokenizer.convert_ids_to_tokens(mask_id)
    if mask is None or tokenizer(mask, add_special_tokens=False)["input_ids"] != [mask_id]:
        raise ValueError(
            f"The tokenizer has no text for the mask token, {mask_id}; give the prompts as ids."
        )

    def written(match: re.Match[str]) -> str:
        count = "1" if match[1] is None else match[1].strip()
        if not count.isdecimal() or not 1 <= float(count) <= limit:
            raise ValueError(
                f"{match[0]!r} must say how many masks it stands for, 1 to {limit}, as [MASK*5]."
            )
        return mask * int(count)

    return MASKS.sub(written, text)


def token_id(tokenizer: Tokenizer | None, text: str) -> int:
    """The id of one token, which is given as its text, or as `id:5`.

    Raises:
      ValueError: the text is not exactly one token.
    """
    if given := ID.fullmatch(text):
        return int(given[1])
    if tokenizer is None:
        raise ValueError(
            f"{text!r} needs a tokenizer, and there is none; give the token's id, as id:5."
        )
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) != 1:
        known = f"; an id is written id:{text}" if text.isdecimal() else ""
        raise ValueError(f"{text!r} is {len(ids)} tokens, {ids}; it must be exactly one{known}.")
    return ids[0]


def unused(
    tokenizer: Tokenizer, vocab_size: int, needed: Iterable[int] = ()
) -> tuple[tuple[int, int], ...]:
    """Ranges of ids, `(first, behind the last)`, that the tokenizer has no token for.

    Args:
      tokenizer: may have fewer tokens than the model, whose vocabulary is often padded.
      vocab_size: ids end there.
      needed: ids that are left out of the ranges.
    """
    has_V = np.zeros(vocab_size, bool)
    known = np.fromiter((*tokenizer.get_vocab().values(), *needed), np.int64)
    has_V[known[known < vocab_size]] = True
    (edges,) = np.nonzero(np.diff(has_V, prepend=True, append=True))
    return tuple((int(first), int(behind)) for first, behind in edges.reshape(-1, 2))


def frequencies(path: str | os.PathLike[str], vocab_size: int) -> np.ndarray:
    """The share of each token in a corpus, from a JSON file.

    The file holds a list of all shares, or counts as the corpus files of PC-Sampler
    (arXiv 2508.13021) do: `{"num_token": N, "p_baseline_dict": {"<token id>": count, ...}}`. A
    token that is not listed counts as if it had occurred once.

    Returns:
      float32 `[V]`, for the argument `token_freq` of `diffusion_generate`.

    Raises:
      ValueError: the file holds something else; one sentence says where.
    """
    try:
        data = json.loads(pathlib.Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if isinstance(data, list):
        if len(data) != vocab_size:
            raise ValueError(
                f"{path} lists {len(data)} shares; it must have one for each of the {vocab_size} "
                "tokens."
            )
        total, counts = 1, dict(enumerate(data))
    else:
        total, counts = _counts(path, data, vocab_size)
    for token, count in counts.items():
        if not _is_number(count) or not 0 <= count <= total:
            raise ValueError(
                f"{path} has {count!r} for token {token}; it must be a number from 0 to {total}."
            )
    shares = np.full(vocab_size, 1 / total, np.float32)
    shares[list(counts)] = [count / total for count in counts.values()]
    return shares


def _counts(
    path: str | os.PathLike[str], data: Any, vocab_size: int
) -> tuple[int | float, dict[int, Any]]:
    """Size of a corpus, and the counts of the tokens that are listed."""
    data = data if isinstance(data, dict) else {}
    listed, total = data.get("p_baseline_dict"), data.get("num_token", 0)
    if not isinstance(listed, dict) or not _is_number(total) or total < 1:
        raise ValueError(
            f'{path} must hold a list of shares, or an object with the corpus size as "num_token" '
            'and the counts of its tokens as "p_baseline_dict".'
        )
    for token in listed:
        if not token.isdecimal() or int(token) >= vocab_size:
            raise ValueError(
                f"{path} has a count for token {token!r}; ids must lie in 0 to {vocab_size - 1}."
            )
    return total, {int(token): count for token, count in listed.items()}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -math.inf < value < math.inf


def pad(
    rows: Sequence[Sequence[int]], pad_id: int, *, bucket: int = BUCKET, limit: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Left-pads rows of token ids to a common length, a multiple of `bucket`.

    Padding is invisible to the model, so the bucket changes no token; it only makes prompts of
    similar length share one compiled program.

    Args:
      rows: token ids.
      pad_id: id at the padding.
      bucket: the common length is the smallest multiple of it that holds the longest row.
      limit: padding stops here (a row may still be longer), so that prompt and answer together stay
        within the model's context.

    Returns:
      `ids_BP` (int32) and `mask_BP` (bool), which is true at the rows' own tokens.
    """
    longest = max(len(row) for row in rows)
    width = slots(longest, bucket)
    if limit is not None:
        width = max(longest, min(width, limit))
    ids_BP = np.full((len(rows), width), pad_id, np.int32)
    mask_BP = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        ids_BP[i, width - len(row) :] = row
        mask_BP[i, width - len(row) :] = True
    return ids_BP, mask_BP


def slots(length: int, bucket: int = BUCKET) -> int:
    """The slots that a prompt of so many tokens gets: a multiple of `bucket`."""
    return max(1, -(-length // bucket)) * bucket


def until_eos(ids: Ids, eos_id: int | Collection[int]) -> list[int]:
    """The ids before the first `eos_id`, or the first of several."""
    ends = eos_id if isinstance(eos_id, Collection) else (eos_id,)
    return list(itertools.takewhile(lambda token: token not in ends, map(int, ids)))


def decode(tokenizer: Tokenizer, ids: Ids, eos_id: int | Collection[int] | None = None) -> str:
    """Text of token ids, up to the first `eos_id` if given, without special tokens."""
    ids = [int(token) for token in ids] if eos_id is None else until_eos(ids, eos_id)
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def cut(text: str, stops: Iterable[str]) -> str:
    """The text before the first of the stop strings."""
    ends = [text.find(stop) for stop in stops]
    return text[: min((end for end in ends if end >= 0), default=None)]


def answer_text(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    stops: Iterable[str] = (),
    filled: Sequence[bool] | None = None,
) -> str:
    """Text of an answer, without special tokens and without what follows a stop text.

    A stop text may be or hold a special token. Where only some tokens were filled in, the others
    are never cut, and a stop text among them alone says nothing: every run of tokens that were
    filled in ends where the first stop text that is at least partly in it begins.

    Args:
      tokenizer: has the text of the tokens.
      ids: the tokens.
      stops: texts at which to cut.
      filled: which of the tokens the model has put there; None means all.
    """
    stops, plain = list(stops), decode(tokenizer, ids)
    whole = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if not any(stop in text for stop in stops for text in (whole, plain)):
        return plain
    special = _special_ids(tokenizer)
    new = [True] * len(ids) if filled is None else filled
    ends: list[tuple[int, int]] = []  # where a run of filled tokens is cut, and where it ends
    for fill, begin, end in _runs(tokenizer, ids, new, whole):
        if fill:
            ends.append((_first_stop(whole, stops, begin, end), end))
    kept = ""
    for is_special, begin, end in _runs(tokenizer, ids, [i in special for i in ids], whole):
        if not is_special:
            cuts = [part for part in ends if part[0] < end and part[1] > begin]
            for cut_at, behind in cuts:
                kept += whole[begin : max(begin, cut_at)]
                begin = behind
            kept += whole[begin:end]
    return cut(kept, stops) if all(new) else kept


def _runs(
    tokenizer: Tokenizer, ids: Sequence[int], kinds: Sequence[bool], whole: str
) -> Iterator[tuple[bool, int, int]]:
    """Runs of tokens of one kind, and where in the text of all tokens each begins and ends."""
    count = begin = 0
    for kind, run in itertools.groupby(kinds):
        count += len(list(run))
        text = tokenizer.decode(
            ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        # A character whose bytes come from both sides belongs to the next run.
        end = len(whole) if count == len(ids) else len(os.path.commonprefix([text, whole]))
        yield kind, begin, end
        begin = end


def _first_stop(whole: str, stops: Iterable[str], begin: int, end: int) -> int:
    """Where the first stop text begins that has letters in a part of a text; else its end."""
    found = [whole.find(stop, max(0, begin - len(stop) + 1)) for stop in stops]
    return max(begin, min((at for at in found if 0 <= at < end), default=end))


def _special_ids(tokenizer: Tokenizer) -> set[int]:
    """The tokens that are left out of a text."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(token for token, what in added if what.special)}


def pieces(tokenizer: Tokenizer, ids: Ids) -> list[str]:
    """The text that each token adds; a character made of several tokens belongs to the last."""
    texts: list[str] = []
    pending: list[int] = []
    for i in ids:
        pending.append(int(i))
        text = tokenizer.decode(pending, clean_up_tokenization_spaces=False)
        broken = text.endswith("\N{REPLACEMENT CHARACTER}") and len(pending) < 4  # UTF-8 bytes
        texts.append("" if broken else text)
        if not broken:
            pending = []
    if pending:
        texts[-1] = text
    return texts


def _transformers() -> ModuleType:
    """Imports `transformers` without its advice to install PyTorch, which is not needed."""
    switch = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    if "transformers" in sys.modules or switch in os.environ:
        import transformers

        return transformers
    os.environ[switch] = "1"
    try:
        import transformers
    finally:
        del os.environ[switch]
    return transformers

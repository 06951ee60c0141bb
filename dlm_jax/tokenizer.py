"""Between text and token ids: the first and the last step, outside the decoding loop.

    text -encode-> rows of ids -pad-> ids_BP, mask_BP -> [decoding] -> ids -decode-> text

Tokenizers are read from a directory with Hugging Face's `transformers`, which is imported only when
the first one is opened. No code of a checkpoint is run and nothing is fetched.
"""

import itertools
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Sequence
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

Tokenizer = Any
"""A `transformers` tokenizer. Its class is not named, so that nothing imports it early."""
Ids = Iterable[SupportsIndex]
"""Token ids: a list, or a NumPy or JAX array."""


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
        return getattr(_transformers(), name).from_pretrained(directory, local_files_only=True)
    except Exception as error:  # whatever the parsers raise on a damaged file
        raise ValueError(f"The tokenizer in {directory} cannot be read: {error}") from error


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
    """
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    # The template writes the special tokens itself.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def beginning(tokenizer: Tokenizer, eos_id: int) -> int:
    """The token that a text out of nothing begins with; `eos_id` where there is no other."""
    bos_id = tokenizer.bos_token_id
    return eos_id if bos_id is None else bos_id


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
    """The id of one token, which is given as its text or as a decimal number, its id.

    Raises:
      ValueError: the text is not exactly one token.
    """
    if text.isdecimal():
        return int(text)
    if tokenizer is None:
        raise ValueError(f"{text!r} needs a tokenizer, and there is none; give the token's id.")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"{text!r} is {len(ids)} tokens, {ids}; it must be exactly one.")
    return ids[0]


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
        data = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
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


def until_eos(ids: Ids, eos_id: int) -> list[int]:
    """The ids before the first `eos_id`."""
    return list(itertools.takewhile(lambda token: token != eos_id, map(int, ids)))


def decode(tokenizer: Tokenizer, ids: Ids, eos_id: int | None = None) -> str:
    """Text of token ids, up to the first `eos_id` if given, without special tokens."""
    ids = [int(token) for token in ids] if eos_id is None else until_eos(ids, eos_id)
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def cut(text: str, stops: Iterable[str]) -> str:
    """The text before the first of the stop strings."""
    ends = [text.find(stop) for stop in stops]
    return text[: min((end for end in ends if end >= 0), default=None)]


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

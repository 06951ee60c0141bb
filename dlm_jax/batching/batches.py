"""Requests of unequal size, answered in batches, by one process or several, and never twice.

    requests -> not yet answered -> this process's share -> sorted, in batches -> answers, in order

`complete` sorts by size, which lets neighbours share a compiled shape, and puts the largest first,
so that a lack of memory shows at once. `in_order` is for whoever reads along.
"""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from dlm_jax import distributed
from dlm_jax.batching.responses import Responses, digest


class Request(NamedTuple):
    """Something to answer.

    Attributes:
      key: identifies all that the response depends on.
      group: requests of a group can share a batch.
      size: those of like size share a compiled shape.
      work: what is to be done, for the function that answers.
    """

    key: str
    group: Any
    size: int
    work: Any


Respond = Callable[[Any, Sequence[Request]], Sequence[dict[str, Any]]]
"""Group and requests to their responses; a response may hold `tokens` and `seconds`."""


def complete(
    requests: Sequence[Request],
    answer: Respond,
    responses: Responses,
    *,
    batch_size: int,
    title: str,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Answers all requests; every process of a cluster gets all responses, in their order.

    Every process must call this with the same requests.

    Args:
      requests: in any order. Of several with one key, one is answered.
      answer: answers a batch.
      responses: what is known already, and where responses are kept as they come.
      batch_size: the most requests of a batch.
      title: what the progress bar calls them.
      quiet: whether to show no progress bar.

    Raises:
      ValueError: the processes do not have the same requests.
    """
    if len(set(distributed.gather(digest([request.key for request in requests])))) > 1:
        raise ValueError(
            "The processes have different requests; start all with the same arguments, weights and "
            "data."
        )
    known = [request.key for request in requests if request.key in responses]
    elsewhere = set().union(*distributed.gather(known))
    pending = {r.key: r for r in requests if r.key not in elsewhere}
    shared = sorted(pending.values(), key=lambda r: -r.size)
    with tqdm(
        total=len(requests),
        initial=sum(r.key in elsewhere for r in requests),
        desc=title,
        disable=quiet or distributed.index() != 0,
    ) as bar:
        tokens, seconds = 0, 0.0
        mine = _batches(shared[distributed.index() :: distributed.count()], batch_size)
        for batch in answered(mine, answer, responses):
            for request in batch:
                tokens += responses[request.key].get("tokens", 0)
                seconds += responses[request.key].get("seconds", 0.0)
            if tokens and seconds > 0:
                bar.set_postfix_str(f"{tokens / seconds:.1f} tokens/s", refresh=False)
            bar.update(min(len(batch) * distributed.count(), len(requests) - bar.n))
    found = {r.key: responses[r.key] for r in requests if r.key in responses}
    if distributed.count() > 1:
        found = {key: value for part in distributed.gather(found) for key, value in part.items()}
    return [found[request.key] for request in requests]


def _batches(requests: Sequence[Request], batch_size: int) -> Iterator[list[Request]]:
    """Batches of one group each, in the order of the requests within a group."""
    groups = collections.defaultdict(list)
    for request in requests:
        groups[request.group].append(request)
    for group in groups.values():
        for low in range(0, len(group), batch_size):
            yield group[low : low + batch_size]


def in_order(
    requests: Sequence[Request], rows: Callable[[Any, int], int]
) -> Iterator[list[Request]]:
    """Batches of one group each, so that answers to the first requests come first.

    Args:
      requests: what is to be answered. Of several with one key, one is.
      rows: how many rows a batch of this group gets, of so many that are left.
    """
    waiting: dict[Any, dict[str, Request]] = collections.defaultdict(dict)
    for request in requests:
        waiting[request.group].setdefault(request.key, request)
    for request in requests:
        left = waiting[request.group]
        if request.key in left:
            keys = list(itertools.islice(left, rows(request.group, len(left))))
            yield [left.pop(key) for key in keys]


def answered(
    batches: Iterable[list[Request]], answer: Respond, responses: Responses
) -> Iterator[list[Request]]:
    """Answers batch after batch; each is told once its responses are kept."""
    for batch in batches:
        for request, response in zip(batch, answer(batch[0].group, batch), strict=True):
            responses.add(request.key, response)
        yield batch

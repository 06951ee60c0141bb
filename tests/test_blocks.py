"""Which masks a step may fill, against a slow definition; windows in whole generations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny_models import prompts, small

from dlm_jax.cache import NoCache
from dlm_jax.decoding.blocks import Blocks, Window
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.loop import diffusion_generate
from dlm_jax.geometry import Geometry

MASK = 9
often = settings(max_examples=60, deadline=None, derandomize=True)


def geometry(prompt: int, blocks: int, block: int, *, infill=False, most=1) -> Geometry:
    """Of so many blocks; none where there is nothing to generate."""
    return Geometry(
        prompt=prompt,
        gen=blocks * block,
        block=block if blocks else 0,
        steps=None,
        shift=0,
        infill=infill,
        most_per_step=most,
    )


@st.composite
def layouts(draw, most_blocks: int = 4):
    """A geometry, and one row on it: tokens of which about half are masks, behind padding."""
    infill = draw(st.booleans())
    blocks = draw(st.integers(0 if infill else 1, most_blocks))
    geo = geometry(draw(st.integers(1, 4)), blocks, draw(st.integers(1, 4)), infill=infill)
    tokens_L = draw(hnp.arrays(np.int32, geo.length, elements=st.sampled_from([1, 2, MASK, MASK])))
    valid_L = np.arange(geo.length) >= draw(st.integers(0, geo.prompt - 1))
    return geo, tokens_L, valid_L


def block_of(geo: Geometry, slot: int) -> int:
    """The block that a slot belongs to; the prompt is filled with the first one."""
    return max(slot - geo.prompt, 0) // geo.block if geo.block else 0


def slow_masked(geo: Geometry, tokens_L, valid_L) -> list[int]:
    slots = range(geo.length) if geo.infill else range(geo.prompt, geo.length)
    return [slot for slot in slots if tokens_L[slot] == MASK and valid_L[slot]]


def slow_eligible(geo: Geometry, masked: list[int], block: int) -> list[int]:
    if block >= geo.num_blocks:
        return []
    return [slot for slot in masked if block_of(geo, slot) <= block]


def masked_of(blocks: Blocks, tokens_L, valid_L) -> jax.Array:
    return blocks.masked(jnp.asarray(tokens_L), jnp.asarray(valid_L), MASK)


def where(set_L) -> list[int]:
    return np.flatnonzero(set_L).tolist()


class TestBlocks:
    GEO = geometry(3, 2, 3)
    TOKENS = np.int32([MASK, 1, MASK, MASK, 2, MASK, 1, MASK, MASK])

    def test_by_hand(self):
        valid_L = np.arange(9) >= 1
        for infill, masked, first, counts in (
            (False, [3, 5, 7, 8], [3, 5], [2, 2]),
            (True, [2, 3, 5, 7, 8], [2, 3, 5], [3, 2]),  # what is padding is no mask
        ):
            blocks = Blocks(dataclasses.replace(self.GEO, infill=infill))
            masked_L = masked_of(blocks, self.TOKENS, valid_L)
            assert where(masked_L) == masked
            for block, expected in enumerate([first, masked, [], []]):
                assert where(blocks.eligible(masked_L, jnp.int32(block))) == expected
            assert blocks.count(masked_L).tolist() == counts
            for block, expected in enumerate([*counts, 0]):
                assert blocks.count_in(masked_L, jnp.int32(block)) == expected
            assert blocks.sizes == ((6, 3) if infill else (3, 3))
            assert not blocks.narrow

    def test_only_the_prompt(self):
        blocks = Blocks(geometry(4, 0, 1, infill=True))
        masked_L = masked_of(blocks, np.int32([MASK, MASK, 1, MASK]), np.arange(4) >= 1)
        assert where(masked_L) == where(blocks.eligible(masked_L, jnp.int32(0))) == [1, 3]
        assert where(blocks.eligible(masked_L, jnp.int32(1))) == []
        assert (blocks.count(masked_L).tolist(), blocks.sizes) == ([2], (4,))

    @often
    @given(layout=layouts())
    def test_definition(self, layout):
        geo, tokens_L, valid_L = layout
        blocks, masked = Blocks(geo), slow_masked(*layout)
        masked_L = masked_of(blocks, tokens_L, valid_L)
        assert where(masked_L) == masked
        counts = [sum(block_of(geo, slot) == b for slot in masked) for b in range(geo.num_blocks)]
        assert blocks.count(masked_L).tolist() == counts
        for block in range(geo.num_blocks + 2):
            eligible_L = blocks.eligible(masked_L, jnp.int32(block))
            assert where(eligible_L) == slow_eligible(geo, masked, block)
        for block, count in enumerate([*counts, 0]):
            assert blocks.count_in(masked_L, jnp.int32(block)) == count

    @often
    @given(layout=layouts())
    def test_what_follows_from_it(self, layout):
        """Blocks share the masks; nothing is eligible earlier that is not later; sizes bound."""
        geo, tokens_L, valid_L = layout
        blocks = Blocks(geo)
        masked_L = masked_of(blocks, tokens_L, valid_L)
        counts = blocks.count(masked_L)
        assert len(counts) == len(blocks.sizes) == geo.num_blocks
        assert counts.sum() == masked_L.sum()
        assert (counts <= jnp.asarray(blocks.sizes)).all()
        assert sum(blocks.sizes) == geo.fillable
        before_L = np.zeros(geo.length, bool)
        for block in range(geo.num_blocks):
            now_L = np.asarray(blocks.eligible(masked_L, jnp.int32(block)))
            assert (before_L <= now_L).all() and (now_L <= np.asarray(masked_L)).all()
            assert now_L.sum() == counts[: block + 1].sum()
            before_L = now_L
        everywhere_L = masked_of(blocks, np.full_like(tokens_L, MASK), np.ones_like(valid_L))
        assert blocks.count(everywhere_L).tolist() == list(blocks.sizes)

    @often
    @given(layout=layouts(), seed=st.integers(0, 99))
    def test_other_rows_and_other_tokens_have_no_say(self, layout, seed):
        """Mapped over a batch, it is what it is of each row; only where the masks are counts."""
        geo, tokens_L, valid_L = layout
        blocks = Blocks(geo)
        others_L = np.where(tokens_L == MASK, MASK, 3 + seed % 5).astype(np.int32)
        masked_BL = jax.vmap(lambda row_L: masked_of(blocks, row_L, valid_L))(
            jnp.stack([tokens_L, others_L, np.full_like(tokens_L, MASK)])
        )
        assert where(masked_BL[0]) == where(masked_BL[1]) == slow_masked(*layout)


class TestWindow:
    def test_by_hand(self):
        blocks = Window(geometry(2, 1, 6), size=2)
        tokens_L, valid_L = np.int32([1, 1, MASK, 1, MASK, MASK, 1, MASK]), np.ones(8, bool)
        masked_L = masked_of(blocks, tokens_L, valid_L)
        assert where(masked_L) == [2, 4, 5, 7]
        assert where(blocks.eligible(masked_L, jnp.int32(0))) == [2, 4]
        assert where(blocks.eligible(masked_L, jnp.int32(1))) == []
        # It slides as they are filled, from wherever.
        assert where(blocks.eligible(masked_L.at[4].set(False), jnp.int32(0))) == [2, 5]
        assert where(blocks.eligible(masked_L.at[2].set(False), jnp.int32(0))) == [4, 5]
        # There are as many masks as without it.
        assert blocks.count(masked_L).tolist() == [4] and blocks.sizes == (6,)

    @often
    @given(layout=layouts(most_blocks=1), size=st.integers(1, 9))
    def test_definition(self, layout, size):
        geo, tokens_L, valid_L = layout
        blocks, masked = Window(geo, size), slow_masked(*layout)
        masked_L = masked_of(blocks, tokens_L, valid_L)
        assert where(masked_L) == masked
        for block in range(3):
            eligible_L = blocks.eligible(masked_L, jnp.int32(block))
            assert where(eligible_L) == slow_eligible(geo, masked, block)[:size]
        plain = Blocks(geo)
        assert blocks.count(masked_L).tolist() == plain.count(masked_L).tolist()
        assert blocks.sizes == plain.sizes

    @often
    @given(layout=layouts(most_blocks=1), size=st.integers(1, 4), data=st.data())
    def test_slides_until_nothing_is_left(self, layout, size, data):
        """Whatever is filled, what was open stays open, and all masks have their turn."""
        geo, tokens_L, valid_L = layout
        blocks = Window(geo, size)
        masked_L, before = masked_of(blocks, tokens_L, valid_L), set()
        for _ in range(int(masked_L.sum())):
            eligible = where(blocks.eligible(masked_L, jnp.int32(0)))
            assert before <= set(eligible) and len(eligible) == min(size, int(masked_L.sum()))
            filled = data.draw(st.sampled_from(eligible))
            masked_L, before = masked_L.at[filled].set(False), set(eligible) - {filled}
        assert not masked_L.any()

    def test_needs_one_block(self):
        for infill in (False, True):
            with pytest.raises(ValueError, match="here are 2; leave block_length out"):
                Window(geometry(3, 2, 3, infill=infill), size=2)
        Window(geometry(3, 1, 6), size=2)
        Window(geometry(3, 0, 1, infill=True), size=2)

    def test_is_narrow_where_a_step_wants_more(self):
        for size, most, expected in ((2, 1, False), (2, 2, False), (2, 3, True), (1, 2, True)):
            assert Window(geometry(2, 1, 6, most=most), size).narrow == expected
            assert not Blocks(geometry(2, 1, 6, most=most)).narrow


@dataclasses.dataclass(frozen=True)
class Sliding(NoCache):
    """A cache method that takes the blocks for its own division."""

    size: int = 3

    def blocks(self, blocks: Blocks) -> Blocks:
        return Window(blocks.geo, self.size)


@pytest.mark.parametrize("per_step", [1, 2, 5], ids="{} a step".format)
def test_a_generation_fills_its_window(per_step):
    """Every step fills as many as it wants, and the window has, of its leftmost masks."""
    gen, size, prompt = 10, 3, prompts(2, 4)
    model, params = small("llada")
    decode = DecodeConfig(gen_length=gen, schedule="fixed", num_transfer_tokens=per_step)
    key = jax.random.key(0)
    out = diffusion_generate(params, model, prompt, key=key, decode=decode, cache=Sliding(size))
    forwards = -(-gen // min(per_step, size))
    assert out.nfe == forwards and (out.tokens != model.config.mask_id).all()
    for row in np.asarray(out.committed_at[:, 4:]):
        for step in range(forwards):
            open_ = np.flatnonzero(row >= step)[:size]
            filled = np.flatnonzero(row == step)
            assert set(filled) <= set(open_)
            assert len(filled) == min(per_step, len(open_))
    plain = diffusion_generate(params, model, prompt, key=key, decode=decode)
    assert (plain.committed_at != out.committed_at).any()

"""Draws the denoising in a terminal while it happens: masks, fresh tokens, how sure the model is.

`Canvas.draw` is called by `Engine.run`; nothing here influences a result.
"""

import math
import textwrap
import time
from collections.abc import Sequence
from types import TracebackType

from rich.color import Color
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.style import Style
from rich.table import Table
from rich.text import Text

from dlm_jax.answers import Snapshot
from dlm_jax.checkpoint import Checkpoint
from dlm_jax.tokenizer import decode, pieces

SHOW_SECONDS = 5.0
"""A generation is stretched to about this long, or it would be over before it is seen."""
SLOWEST = 0.15
"""But no frame is held longer than this, in seconds."""
WIDTH, PROMPT_LENGTH = 100, 300
"""Most columns that are used, and most letters that are shown of a prompt."""
MASK, END = "\N{MEDIUM SHADE}", "\N{MIDDLE DOT}"
"""What stands for a mask (repeated) and for a special token."""
UNSURE, HALF_SURE, SURE = (235, 87, 87), (242, 191, 76), (92, 200, 120)
"""Colours (red, green, blue) of the confidences 0, 1/2 and 1."""
PROMPT_STYLE, GIVEN_STYLE, MASK_STYLE = Style(bold=True), Style(dim=True), Style(color="grey42")
END_STYLE, FRAME_STYLE, DONE_STYLE = (Style(color=f"grey{level}") for level in (30, 35, 85))


class Canvas:
    """A picture of a batch being denoised; a context manager around `Engine.run`."""

    def __init__(
        self,
        console: Console,
        prompts: Sequence[str],
        rows: Sequence[Sequence[int]],
        checkpoint: Checkpoint,
    ) -> None:
        """Draws nothing yet.

        Args:
          console: where to draw.
          prompts: a title for every row.
          rows: the prompts' token ids.
          checkpoint: knows the special tokens and their text.
        """
        config, tokenizer = checkpoint.config, checkpoint.tokenizer
        self._prompts = [
            textwrap.shorten(text, PROMPT_LENGTH, placeholder=" ...") for text in prompts
        ]
        self._config, self._tokenizer = config, tokenizer
        self._special = {config.eos_id, *config.more_eos_ids, config.pad_id, config.mask_id}
        if tokenizer is not None:
            self._special |= set(tokenizer.all_special_ids)
        self._mask = self._mask_picture(rows)
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="crop")
        self._width = min(console.width, WIDTH)
        self._shown = 0.0

    def __enter__(self) -> "Canvas":
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def draw(self, snapshot: Snapshot) -> None:
        """Shows one snapshot, and holds it so that it can be seen."""
        masks = sum(snapshot.pending)
        committed = sum(step >= 0 for row in snapshot.committed_at for step in row)
        pause = self._shown + min(SLOWEST, SHOW_SECONDS / (masks + committed)) - time.monotonic()
        if pause > 0:
            time.sleep(pause)
        panels = [
            Panel(
                Group(Text(prompt, PROMPT_STYLE), self._row(snapshot, i)),
                border_style=FRAME_STYLE,
                padding=(0, 1),
                width=self._width,
            )
            for i, prompt in enumerate(self._prompts)
        ]
        foot = self._foot(snapshot.step + 1, masks, committed)
        self._live.update(Group(*panels, foot), refresh=True)
        self._shown = time.monotonic()

    def _row(self, snapshot: Snapshot, i: int) -> Text:
        """One row of the canvas as coloured text."""
        ids, committed_at = snapshot.ids[i], snapshot.committed_at[i]
        sureness = _sureness(snapshot.confidence[i])
        text = Text()
        for position, piece in enumerate(self._pieces(ids)):
            fresh = committed_at[position] == snapshot.step
            colour = _colour(sureness[position])
            if ids[position] == self._config.mask_id and snapshot.pending[i]:
                text.append(self._mask, MASK_STYLE)
            elif ids[position] in self._special:
                # Dots go to the next line by themselves, not with the word before them.
                text.append(" " * (position > 0 and ids[position - 1] not in self._special))
                style = Style(color=colour, bold=True) if fresh else END_STYLE
                text.append(END, style)
            elif committed_at[position] < 0:
                text.append(piece, GIVEN_STYLE)
            elif fresh:
                text.append(piece, Style(color="black", bgcolor=colour, bold=True))
            else:
                text.append(piece, Style(color=colour))
        return text

    def _pieces(self, ids: list[int]) -> list[str]:
        """The text of every token; a mask ends the run that is decoded together."""
        if self._tokenizer is None:
            return [f"{token} " for token in ids]
        texts: list[str] = []
        run: list[int] = []
        for token in [*ids, self._config.mask_id]:
            if token == self._config.mask_id:
                texts += [*pieces(self._tokenizer, run), ""]
                run = []
            else:
                run.append(token)
        return texts[:-1]

    def _mask_picture(self, rows: Sequence[Sequence[int]]) -> str:
        """A mask about as wide as a token of the prompts, so that the text does not jump."""
        width = 4.0
        if self._tokenizer is not None:
            text = "".join(decode(self._tokenizer, row) for row in rows)
            width = len(text) / sum(len(row) for row in rows)
        width = min(max(round(width), 1), 6)
        return MASK if width == 1 else " " + MASK * (width - 1)

    def _foot(self, forwards: int, masks: int, committed: int) -> RenderableType:
        """Progress, and what the colours mean."""
        legend = Text(" unsure ", MASK_STYLE)
        for tenth in range(11):
            legend.append("\N{LOWER HALF BLOCK}", Style(color=_colour(tenth / 10)))
        legend.append(" sure  ", MASK_STYLE).append(" new ", Style(reverse=True)).append(" ")
        foot = Table.grid(expand=True, padding=(0, 1))
        foot.add_column()
        foot.add_column(ratio=1)
        foot.add_column(justify="right")
        foot.width = self._width
        foot.add_row(
            Text(f" forward {forwards:>3}, {masks:>3} masks left", style="bold"),
            ProgressBar(
                total=masks + committed,
                completed=committed,
                style=FRAME_STYLE,
                complete_style=DONE_STYLE,
                finished_style=DONE_STYLE,
            ),
            legend,
        )
        return foot


def _sureness(confidence: Sequence[float]) -> list[float]:
    """Confidences between 0 and 1; negative entropies, which are not, by their exponential."""
    return [math.exp(value) if value <= 0 else min(value, 1.0) for value in confidence]


def _colour(sureness: float) -> Color:
    low, high = (UNSURE, HALF_SURE) if sureness < 0.5 else (HALF_SURE, SURE)
    share = 2 * sureness - (sureness >= 0.5)
    return Color.from_rgb(*(a + (b - a) * share for a, b in zip(low, high, strict=True)))

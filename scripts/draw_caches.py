"""Draws which positions each cache method computes, in a real generation of a model.

    python scripts/draw_caches.py --out docs/caches
    python scripts/draw_caches.py --out /tmp/caches --model dream-tiny-math --caches prefix,dual

One picture per method, `<out>/<method>.png`: positions from left to right, model forwards from top
to bottom. Needs matplotlib (`pip install '.[plot]'`). The methods run with their defaults, except
where these are made for sequences that are much longer than the picture (`_PARAMETERS`).
"""

import argparse
import dataclasses
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import dlm_jax
from dlm_jax import DecodeConfig, cache, checkpoint, compilation, files, tokenizer
from dlm_jax.cache import CacheMethod
from dlm_jax.cli.options import check_matplotlib
from dlm_jax.cli.prompts import QUESTION

_PARAMETERS: dict[str, dict[str, Any]] = {
    "dkv-greedy": dict(cache_steps=4),
    "dllm": dict(kp=16, kr=4),
    "d2cache": dict(current_k=8),
}

# Okabe and Ito's palette, which the colour-blind can tell apart.
_REUSED, _COMPUTED, _DECODED = "#e9e9e9", "#0072b2", "#e69f00"


@dataclasses.dataclass(frozen=True)
class Picture:
    """What is drawn: one row of one generation.

    Attributes:
      title: the method and its parameters.
      share_TL: share of the layers that computed each position in each forward.
      committed_at_L: forward in which each position was decoded; -1 in the prompt.
      layers: layers of the model.
      prompt: positions of the prompt.
      block: positions of a block.
    """

    title: str
    share_TL: np.ndarray
    committed_at_L: np.ndarray
    layers: int
    prompt: int
    block: int


def trace(
    loaded: checkpoint.Checkpoint, method: CacheMethod, text: str, decode: DecodeConfig
) -> Picture:
    """Generates an answer to one prompt and keeps what was computed for it."""
    rows = tokenizer.encode(loaded.tokenizer, [text], chat=True)
    ids, mask = tokenizer.pad(rows, loaded.config.pad_id, bucket=1)
    out = dlm_jax.diffusion_generate(
        loaded.params,
        loaded.model,
        ids,
        mask,
        key=jax.random.key(0),
        decode=decode,
        cache=method,
        record=("computed", "computed_layers"),
    )
    out = jax.device_get(out)
    assert out.computed is not None and out.computed_layers is not None
    share_TL = out.computed_layers[: out.nfe, 0].mean(axis=1)
    assert ((share_TL > 0) <= out.computed[: out.nfe, 0]).all()
    parameters = dataclasses.asdict(method)
    told = [f"{name}={_brief(value)}" for name, value in parameters.items() if value is not None]
    if decode.strategy.ordered:
        told.append("random order")
    return Picture(
        title=f"{method.name}: {', '.join(told)}" if told else method.name,
        share_TL=share_TL,
        committed_at_L=out.committed_at[0],
        layers=loaded.config.num_layers,
        prompt=ids.shape[1],
        block=decode.geometry(prompt=ids.shape[1], shift=loaded.config.shift).block,
    )


def draw(picture: Picture, path: Path) -> None:
    """Writes the picture; a file that is there already is replaced only by a whole one."""
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    share_TL = picture.share_TL
    forwards, length = share_TL.shape
    reused, computed, decoded = (np.array(to_rgb(name)) for name in (_REUSED, _COMPUTED, _DECODED))

    def shade(share: np.ndarray) -> np.ndarray:
        return reused + share[..., None] * (computed - reused)

    cells_TLC = shade(share_TL)
    cells_TLC[np.arange(forwards)[:, None] == picture.committed_at_L] = decoded

    figure = Figure(figsize=(6.0, 3.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    edges = (-0.5, length - 0.5, forwards - 0.5, -0.5)
    axes.imshow(cells_TLC, extent=edges, aspect="auto", interpolation="nearest")
    for border in range(picture.prompt + picture.block, length, picture.block):
        axes.axvline(border - 0.5, color="white", linewidth=0.8)
        axes.axvline(border - 0.5, color="black", linewidth=0.8, linestyle=(0, (4, 4)))
    axes.axvline(picture.prompt - 0.5, color="white", linewidth=2.4)
    axes.axvline(picture.prompt - 0.5, color="black", linewidth=1.2)
    axes.set_xlabel("position", fontsize=8)
    axes.set_ylabel("denoising step", fontsize=8)
    axes.tick_params(labelsize=7)
    above = dict(transform=axes.get_xaxis_transform(), fontsize=7, ha="center", va="bottom")
    axes.text(picture.prompt / 2 - 0.5, 1.01, "prompt", **above)
    axes.text((picture.prompt + length) / 2 - 0.5, 1.01, "generated, in blocks", **above)
    axes.set_title(picture.title, fontsize=9, loc="left", pad=14)
    mean = share_TL.sum(axis=1).mean()
    axes.set_title(f"{mean:.0f} of {length} positions a step", fontsize=8, loc="right", pad=14)

    shares = np.unique(share_TL[share_TL > 0])
    if (share_TL == 0).any():
        shares = np.append(0.0, shares)
    shown = shares if len(shares) <= 4 else shares[[0, len(shares) // 2, -1]]
    mixed = bool(((shares > 0) & (shares < 1)).any())
    handles = [
        Patch(color=shade(share), label=_label(share, picture.layers, mixed=mixed))
        for share in shown
    ]
    handles.append(Patch(color=decoded, label="decoded in this step"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=7)

    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    files.write(path, image.getvalue())


def _label(share: float, layers: int, *, mixed: bool) -> str:
    """What the legend says; `mixed` if some positions are computed by some of the layers only."""
    if not share:
        return "reused"
    if not mixed:
        return "computed"
    return "all layers" if share == 1 else f"{round(share * layers)} of {layers} layers"


def _brief(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for the pictures")
    parser.add_argument("--model", default="llada-tiny-math", help="as for dlm_jax.generate")
    parser.add_argument("--caches", default="all", help="names, separated by commas; all")
    parser.add_argument("--prompt", default=QUESTION)
    parser.add_argument("--gen-length", type=int, default=64)
    parser.add_argument("--block-length", type=int, default=16)
    compilation.add_option(parser.add_argument)
    args = parser.parse_args(argv)
    compilation.use_cache(args.compile_cache)
    names = list(cache.METHODS) if args.caches == "all" else args.caches.split(",")
    try:
        compilation.check_devices()
        check_matplotlib()
        files.check_folder(args.out, "--out")
        loaded = dlm_jax.load(args.model)
        usual = DecodeConfig.for_model(
            loaded.config, gen_length=args.gen_length, block_length=args.block_length
        )
        methods = [cache.make(name, **_PARAMETERS.get(name, {})) for name in names]
        for method in methods:
            path = args.out / f"{method.name}.png"
            draw(trace(loaded, method, args.prompt, usual.for_cache(method)), path)
            print(path, flush=True)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

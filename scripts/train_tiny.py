"""Trains the embedded models on arithmetic word problems, and measures how many they solve.

    python scripts/train_tiny.py --family llada --work runs/llada-tiny-math
    python scripts/train_tiny.py --family llada --evaluate 500

The first command trains a tokenizer and a model from nothing and writes them to
`dlm_jax/assets/llada-tiny-math` in the Hugging Face layout of the family. It may be interrupted at
any time: started again, it goes on from the last state in `--work` and ends with the same weights.
The second command solves 500 held-out problems with the written model.

The loss is that of supervised fine-tuning in LLaDA (arXiv 2502.09992): only the response is
masked, and `<|endoftext|>` fills it up to the end of its canvas. Instead of masking each token with
probability t, exactly m tokens are masked, m uniform from 1 to the canvas length, which has the
same expectation and less variance (their equation 6).
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from optax.contrib import MuonDimensionNumbers
from tiny_recipe import (
    ASSISTANT,
    EOS,
    MASK,
    RECIPES,
    USER,
    Recipe,
    batches,
    draw,
    encode_facts,
    encode_problems,
    encode_prompts,
    train_tokenizer,
)
from tokenizers import Tokenizer

from dlm_jax import Config, DecodeConfig, Transformer, compilation, diffusion_generate, load
from dlm_jax.arithmetic import Problem, extract_answer
from dlm_jax.files import check_folder, write, write_json
from dlm_jax.models import config_to_hf, params_to_hf
from dlm_jax.tokenizer import pad, until_eos
from dlm_jax.typing import Array, Bool, Float, Int, Params

ASSETS = Path(__file__).resolve().parent.parent / "dlm_jax" / "assets"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + message['content'] + '<|endoftext|>' }}"
    "{% else %}{{ '<|user|>' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


FAMILIES: dict[str, dict[str, Any]] = {
    "llada": dict(norm_eps=1e-5, qkv_bias=False, shift=0),
    "dream": dict(norm_eps=1e-6, qkv_bias=True, shift=1),
}
"""Family -> the constants in which its models differ."""


class State(NamedTuple):
    """What a training step changes."""

    step: Int[Array, ""]
    params: Params
    ema: Params
    opt_state: Any


# --- model and loss -------------------------------------------------------------------------------


def make_config(recipe: Recipe, tokenizer: Tokenizer) -> Config:
    """The model of a recipe."""
    return Config(
        family=recipe.family,
        vocab_size=tokenizer.get_vocab_size(),
        width=recipe.width,
        mlp_width=recipe.mlp_width,
        num_layers=recipe.layers,
        num_heads=recipe.heads,
        num_kv_heads=recipe.kv_heads,
        head_dim=recipe.width // recipe.heads,
        rope_theta=10_000.0,
        tied_head=False,
        max_length=256,
        mask_id=tokenizer.token_to_id(MASK),
        eos_id=tokenizer.token_to_id(EOS),
        pad_id=tokenizer.token_to_id(EOS),
        **FAMILIES[recipe.family],
    )


def init_params(model: Transformer, seed: int) -> Params:
    """Initial parameters: those of the modules, with smaller residual branches and a zero head."""
    params = model.init(jax.random.key(seed), jnp.zeros((1, 8), jnp.int32))["params"]
    branch = (2 * model.config.num_layers) ** -0.5

    def rescale(path: tuple[Any, ...], leaf: Array) -> Array:
        names = [key.key for key in path]
        if names[0] == "head":
            return jnp.zeros_like(leaf)
        return leaf * branch if names[-2] in ("o", "down") else leaf

    return jax.tree.map_with_path(rescale, params)


def masked_loss(
    model: Transformer,
    params: Params,
    key: Array,
    tokens_BL: Int[Array, "B L"],
    start_B: Int[Array, " B"],
    target_BL: Bool[Array, "B L"],
    hidden_BL: Bool[Array, "B L"],
    min_canvas: int,
) -> Float[Array, ""]:
    """Mean over rows of the mean cross entropy of m masked response tokens."""
    batch, length = tokens_BL.shape
    canvas_key, count_key, order_key = jax.random.split(key, 3)
    slot_1L = jnp.arange(length)[None, :]
    # What lies behind a row's canvas is padding, which nobody attends to.
    canvas_B = jax.random.randint(canvas_key, (batch,), min_canvas, length - start_B + 1)
    valid_BL = slot_1L < (start_B + canvas_B)[:, None]
    response_BL = valid_BL & (slot_1L >= start_B[:, None]) & target_BL
    # Stratified: row i of B draws the masked fraction from [i / B, (i + 1) / B).
    stratum_B = jnp.arange(batch, dtype=jnp.float32)
    fraction_B = (stratum_B + jax.random.uniform(count_key, (batch,))) / batch
    count_B = 1 + (fraction_B * jnp.sum(response_BL, axis=-1, dtype=jnp.float32)).astype(jnp.int32)
    order_BL = jnp.where(response_BL, jax.random.uniform(order_key, (batch, length)), jnp.inf)
    rank_BL = jnp.argsort(jnp.argsort(order_BL, axis=-1), axis=-1)
    masked_BL = response_BL & (rank_BL < count_B[:, None])

    noisy_BL = jnp.where(masked_BL | hidden_BL, model.config.mask_id, tokens_BL)
    logits_BLV = model.apply({"params": params}, noisy_BL, valid_BL)
    logits_BLV = jnp.roll(logits_BLV, model.config.shift, axis=1)
    loss_BL = optax.softmax_cross_entropy_with_integer_labels(logits_BLV, tokens_BL)
    loss_B = jnp.sum(loss_BL, axis=-1, where=masked_BL) / count_B.astype(jnp.float32)
    return jnp.mean(loss_B)


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    decay_steps = max(1, round(recipe.decay * recipe.steps))
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, recipe.learning_rate, recipe.warmup),
            optax.constant_schedule(recipe.learning_rate),
            optax.linear_schedule(recipe.learning_rate, 0.0, decay_steps),
        ],
        [recipe.warmup, recipe.steps - decay_steps],
    )

    def matrices(params: Params) -> Any:
        """Which axes of a parameter are a matrix's inputs and outputs; None: no matrix."""

        def axes(path: tuple[Any, ...], leaf: Array) -> MuonDimensionNumbers | None:
            names = [key.key for key in path]
            if names[-1] != "kernel" or names[0] == "head":
                return None
            inputs = 2 if names[-2] == "o" else 1
            return MuonDimensionNumbers(tuple(range(inputs)), tuple(range(inputs, leaf.ndim)))

        return jax.tree.map_with_path(axes, params)

    muon = optax.contrib.muon(
        schedule,
        adam_b2=0.98,
        weight_decay=recipe.weight_decay,
        consistent_rms=0.2,  # updates as large as AdamW's, hence one learning rate for both
        muon_weight_dimension_numbers=matrices,
    )
    return optax.chain(optax.clip_by_global_norm(recipe.clip), muon)


@functools.cache
def make_step(model: Transformer, recipe: Recipe) -> Callable[..., tuple[State, Array]]:
    """The compiled training step, `(state, *batch) -> (state, loss)`."""
    optimizer = make_optimizer(recipe)

    def step(
        state: State, tokens_BL: Array, start_B: Array, target_BL: Array, hidden_BL: Array
    ) -> tuple[State, Array]:
        key = jax.random.fold_in(jax.random.key(recipe.seed + 1), state.step)
        batch = (tokens_BL.astype(jnp.int32), start_B.astype(jnp.int32), target_BL, hidden_BL)
        loss, grads = jax.value_and_grad(
            lambda params: masked_loss(model, params, key, *batch, recipe.min_canvas)
        )(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        age = state.step.astype(jnp.float32)
        decay = jnp.minimum(recipe.ema, (1.0 + age) / (10.0 + age))
        ema = jax.tree.map(lambda old, new: old + (1.0 - decay) * (new - old), state.ema, params)
        return State(state.step + 1, params, ema, opt_state), loss

    return jax.jit(step, donate_argnums=0)


# --- evaluation -----------------------------------------------------------------------------------


def solve(
    model: Transformer,
    params: Params,
    tokenizer: Tokenizer,
    drawn: list[Problem],
    gen_length: int,
    batch: int = 50,
) -> list[str]:
    """Answers by plain decoding: no cache, one block, the surest token of each step."""
    decode = DecodeConfig(gen_length=gen_length, alg="low_confidence")
    texts = []
    for low in range(0, len(drawn), batch):
        chunk = drawn[low : low + batch]
        rows = encode_prompts(tokenizer, chunk + chunk[:1] * (batch - len(chunk)))
        prompt_BP, mask_BP = pad(rows, model.config.pad_id, bucket=48)
        out = diffusion_generate(
            params, model, prompt_BP, mask_BP, key=jax.random.key(0), decode=decode
        )
        for ids in np.asarray(out.tokens)[: len(chunk), prompt_BP.shape[1] :]:
            texts.append(tokenizer.decode(until_eos(ids.tolist(), model.config.eos_id)))
    return texts


def accuracy(drawn: list[Problem], texts: list[str]) -> float:
    """Fraction of the answers with the right final number."""
    return float(
        np.mean([extract_answer(t) == p.result for p, t in zip(drawn, texts, strict=True)])
    )


def evaluate(directory: Path, count: int, seed: int, gen_length: int) -> None:
    """Prints what a written model makes of held-out problems; the last line is JSON."""
    opened = load(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    drawn = draw(seed, "heldout", count)
    texts = solve(opened.model, opened.params, tokenizer, drawn, gen_length)
    by_template: dict[str, list[bool]] = {}
    for problem, text in zip(drawn, texts, strict=True):
        right = extract_answer(text) == problem.result
        by_template.setdefault(problem.template, []).append(right)
        if not right:
            print(f"wrong: {problem.question}\n  answer: {text}\n  wanted: {problem.answer}")
    for name, rights in sorted(by_template.items()):
        print(f"{name:16} {sum(rights):4} of {len(rights):4}")
    result = dict(accuracy=accuracy(drawn, texts), problems=count, seed=seed, gen_length=gen_length)
    print(json.dumps(result))


# --- files ----------------------------------------------------------------------------------------


def export(directory: Path, config: Config, params: Params, tokenizer: Tokenizer) -> None:
    """Writes a model and its tokenizer in the Hugging Face layout, weights in float32."""
    special = {"eos_token": EOS, "pad_token": EOS, "mask_token": MASK}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": [USER, ASSISTANT],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_length,
        "padding_side": "left",
    }
    tensors = params_to_hf(config, jax.device_get(params))
    write_json(directory / "config.json", config_to_hf(config))
    write(directory / "model.safetensors", safetensors.numpy.save(tensors, {"format": "pt"}))
    write(directory / "tokenizer.json", (tokenizer.to_str(pretty=True) + "\n").encode())
    write_json(directory / "tokenizer_config.json", special | settings)
    write_json(directory / "special_tokens_map.json", special)


def check_recipe(work: Path, recipe: Recipe) -> None:
    """Keeps the recipe beside the state, and refuses to go on with another one.

    The number of steps may change while the learning rate is still constant: until then nothing
    depends on it.
    """
    path, wanted = work / "recipe.json", dataclasses.asdict(recipe)
    found = json.loads(path.read_text(encoding="utf-8-sig")) if path.exists() else wanted
    for name, value in wanted.items():
        if name != "steps" and found.get(name) != value:
            raise ValueError(
                f"{work} holds a run with {name} {found.get(name)}, not {value}; "
                "choose another --work."
            )
    write_json(path, wanted)


# --- training -------------------------------------------------------------------------------------


def train(
    recipe: Recipe,
    work: Path,
    out: Path,
    *,
    log_every: int = 100,
    test_every: int = 500,
    tests: int = 100,
    stop_at: int | None = None,
) -> State:
    """Trains from the last state in `work`, or from nothing, and writes the model to `out`.

    Args:
      recipe: what to train.
      work: directory of the state and of `log.jsonl` (losses, accuracy on held-out problems).
      out: directory of the model; written with every saved state.
      log_every: steps between two losses in the log.
      test_every: steps between two saved states, each tested.
      tests: held-out problems that are solved each time.
      stop_at: stops after this step, as an interruption would.

    Raises:
      ValueError: `work` holds a run with another recipe.
    """
    check_recipe(work, recipe)
    drawn = draw(recipe.seed, "train", recipe.problems)
    tested = draw(recipe.seed + 1, "heldout", tests)
    tokenizer = train_tokenizer(drawn[: recipe.tokenizer_problems], recipe.vocab_size)
    tokens, starts = encode_problems(tokenizer, drawn, max(recipe.length, recipe.long_length))
    facts = encode_facts(tokenizer, drawn[: recipe.tokenizer_problems])
    config = make_config(recipe, tokenizer)
    model = Transformer(config)

    params = init_params(model, recipe.seed)
    state = State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=make_optimizer(recipe).init(params),
    )
    saved = work / "state.msgpack"
    if saved.exists():
        state = flax.serialization.from_bytes(state, saved.read_bytes())
        state = jax.tree.map(jnp.asarray, state)

    def log(**entry: Any) -> None:
        line = json.dumps(entry)
        print(line, flush=True)
        with (work / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    train_step = make_step(model, recipe)
    losses, since = [], time.perf_counter()
    first = int(state.step)
    for step, batch in enumerate(
        batches(tokens, starts, facts, tokenizer, recipe, first), first + 1
    ):
        state, loss = train_step(state, *batch)
        losses.append(loss)
        if step % log_every == 0:
            mean, seconds = float(np.mean(jax.device_get(losses))), time.perf_counter() - since
            log(step=step, loss=round(mean, 5), step_ms=round(1000 * seconds / len(losses), 1))
            losses, since = [], time.perf_counter()
        if step % test_every == 0 or step == recipe.steps:
            write(saved, flax.serialization.to_bytes(state))
            export(out, config, state.ema, tokenizer)
            texts = solve(model, state.ema, tokenizer, tested, gen_length=40)
            log(step=step, accuracy=round(accuracy(tested, texts), 4))
            since = time.perf_counter()
        if step == stop_at:
            break
    return state


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description="Trains or evaluates an embedded model on arithmetic word problems."
    )
    add = parser.add_argument
    add("--family", choices=FAMILIES, default="llada", help="model family (default: llada)")
    add("--work", type=Path, help="directory of a training run, to start or to go on with")
    add("--out", type=Path, help="directory of the model (default: that of the embedded model)")
    add("--steps", type=int, help="training steps (default: those of the recipe)")
    add("--seed", type=int, default=0, help="of the training or of the evaluation (default: 0)")
    add("--evaluate", type=int, metavar="N", help="solve N held-out problems instead of training")
    add("--gen-length", type=int, default=40, help="canvas of the evaluation (default: 40)")
    compilation.add_option(parser.add_argument)
    args = parser.parse_args()
    compilation.use_cache(args.compile_cache)
    out = args.out or ASSETS / f"{args.family}-tiny-math"
    try:
        compilation.check_devices()
        if args.evaluate is not None:
            if args.evaluate < 1:
                raise ValueError(f"--evaluate is {args.evaluate}; it must be at least 1.")
            evaluate(out, args.evaluate, args.seed, args.gen_length)
            return 0
        if args.work is None:
            raise ValueError("Training needs a directory for its state; give one with --work.")
        check_folder(args.work, "--work")
        check_folder(out, "--out")
        recipe = dataclasses.replace(RECIPES[args.family], seed=args.seed)
        if args.steps is not None:
            recipe = dataclasses.replace(recipe, steps=args.steps)
        if recipe.steps < 1:
            raise ValueError(f"--steps is {recipe.steps}; it must be at least 1.")
        train(recipe, args.work, out)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; the same command goes on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The model class for lm-evaluation-harness: `lm_eval.simple_evaluate(model="dlm_jax", ...)`.

Instance --encode--> Request --batches.complete--> Engine, log_likelihood --cut--> responses
"""

import collections
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

import dlm_jax
from dlm_jax import checkpoint as checkpoint_lib
from dlm_jax import distributed, sharding, tokenizer
from dlm_jax.batching.batches import Request, complete
from dlm_jax.batching.fingerprint import fingerprint
from dlm_jax.batching.responses import Responses, digest
from dlm_jax.checkpoint import Checkpoint
from dlm_jax.eval import arguments, defaults
from dlm_jax.eval.arguments import Settings
from dlm_jax.eval.defaults import Recipe
from dlm_jax.eval.runners import Generator, Pair, Prompt, Scorer
from dlm_jax.models import Config
from dlm_jax.weights import hub

log = logging.getLogger(__name__)


class DiffusionLM(TemplateLM):
    """A masked diffusion language model that answers the requests of lm-evaluation-harness.

    In a cluster (`dlm_jax.distributed`) every process makes one with the same arguments and gives
    it the same requests; each answers its share, and all get all responses.

    Attributes:
      checkpoint: model, parameters and tokenizer.
      measured: task -> what was measured of each generated sample, see `runners.Generator`.
    """

    def __init__(
        self,
        pretrained: str = "llada-tiny-math",
        *,
        cache: str | None = "none",
        batch_size: int | str = 1,
        dtype: str | None = None,
        variant: str | float | None = None,
        mesh: Mesh | str | None = None,
        add_bos: bool | str = True,
        seed: int = 0,
        responses: str | Path | Responses | None = None,
        check_greedy: bool | str = False,
        checkpoint: Checkpoint | None = None,
        adapter: str | Path | None = None,
        attention: str = "auto",
        token_freq: np.ndarray | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
        settings: Settings | None = None,
        **named: Any,
    ) -> None:
        """Opens the model; nothing is compiled yet.

        Args:
          pretrained: a checkpoint directory, or the name of an embedded model or of one on the hub.
          cache: name of the cache method; None is `none`, as lm-eval reads that.
          batch_size: samples that each part of the mesh's data axis decodes at a time.
          dtype: dtype of the parameters; None keeps what is stored.
          variant: `base`, `inst` or `1.5`, on which `defaults` depend; None tells it by the name.
          mesh: local devices, as `data=4+model=2` or a `jax.sharding.Mesh` with these axes; None
            divides the batch among all.
          add_bos: whether a prompt that does not begin with the beginning-of-text token gets one.
          seed: of everything that is drawn.
          responses: a folder in which responses are kept, so that a killed run can be resumed.
          check_greedy: whether `loglikelihood` also generates, to tell if the continuation is what
            the model would say; otherwise it is reported not to be.
          checkpoint: what `pretrained` names, with its adapter, if it is open already.
          adapter: directory of a LoRA adapter that is merged into the model.
          attention: see `dlm_jax.load`.
          token_freq: see `diffusion_generate`.
          device: must be None.
          max_batch_size: must be None.
          settings: what is given of cache, decoding and likelihoods, sorted; stands for `cache` and
            `named`.
          named: the same as lm-eval hands it over: arguments of `DecodeConfig`, parameters of the
            cache method, and `estimator`, `log_type`, `mc_num` and `mc_batch_size` of likelihoods,
            which `arguments.sort_out` tells apart. What is not given is as in `defaults`.

        Raises:
          ValueError, OSError: what is wrong, in one sentence.
        """
        super().__init__()
        if device is not None or max_batch_size is not None:
            raise ValueError(
                "device and max_batch_size are not for this model: JAX chooses the devices, and "
                "batch_size says how many samples make a batch."
            )
        if settings is None:
            settings = arguments.sort_out("none" if cache is None else cache, named)
        elif named or cache not in (None, "none"):
            raise ValueError("settings is given, which stands for all others; leave them out.")
        add_bos, check_greedy = (
            arguments.yes_or_no(name, value)
            for name, value in (("add_bos", add_bos), ("check_greedy", check_greedy))
        )
        directory = checkpoint_lib.find(pretrained)
        config = checkpoint_lib.inspect(directory, adapter).config
        self.tokenizer: Any = checkpoint_lib.open_tokenizer(directory, config)
        if self.tokenizer is None:
            raise ValueError(f"{pretrained} has no tokenizer; evaluation is about text.")
        variant = defaults.variant(variant, directory, self.tokenizer)
        if not isinstance(mesh, Mesh):
            mesh = sharding.make_mesh(mesh and mesh.replace("+", ","))
        seed = arguments.whole("seed", seed, least=0)
        self.measured: dict[str, list[dict[str, Any]]] = {}
        self._rows = arguments.whole("batch_size", batch_size) * mesh.shape[sharding.DATA]
        self._add_bos = add_bos
        self._check_greedy = check_greedy
        self._recipe = Recipe(config, variant, settings)
        self._likelihood = arguments.estimate(config, settings)
        if not isinstance(responses, Responses):
            folder = None if responses is None else Path(responses)
            responses = Responses(folder, process=distributed.index())
        self._responses = responses
        self.checkpoint = checkpoint or checkpoint_lib.load(
            directory,
            dtype=dtype,
            shardings=sharding.param_shardings(config, mesh),
            adapter=adapter,
            attention=attention,
        )
        dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(self.checkpoint.params)})
        freq = None if token_freq is None else digest(np.asarray(token_freq).tolist())
        # Copies of the weights on several hosts differ in the time of their files.
        weights = distributed.gather(fingerprint(directory, adapter))[0]
        self._identity = (dlm_jax.__version__, weights, dtypes, attention, freq, seed)
        self._generator = Generator(self.checkpoint, mesh, seed, token_freq)
        self._scorer = Scorer(
            self.checkpoint,
            mesh,
            seed,
            self._likelihood,
            greedy=self._generator if check_greedy else None,
        )
        self._name = hub.name_of(directory)

    def close(self) -> None:
        """Lets other models and runs write to the folder of responses."""
        self._responses.close()

    # --- text and tokens --------------------------------------------------------------------------

    @property
    def config(self) -> Config:
        return self._recipe.config

    @property
    def eot_token_id(self) -> int:
        return self.config.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        return tokenizer.beginning(self.tokenizer, self.eot_token_id)

    @property
    def max_length(self) -> int:
        return self.config.max_length

    @property
    def tokenizer_name(self) -> str:
        return self._name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; with a beginning-of-text token unless there is one, or none is wanted."""
        bos = self.tokenizer.bos_token
        if self._add_bos and add_special_tokens is not False and bos:
            string = string if string.startswith(bos) else bos + string
        ids = self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        # A document may speak of the mask token; nobody wants that filled in, or the run to end.
        return [token for token in ids if token != self.config.mask_id]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation, up to the next answer or to the end of its last message."""
        return tokenizer.conversation(
            self.tokenizer,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # --- generation -------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers prompts; the text ends at the end-of-text token or the first stop string."""
        asked, notes = [], collections.Counter()
        for instance in requests:
            group, prompt, noted = self._prompt(instance)
            asked.append((group, prompt))
            notes.update((instance.task_name, note) for note in noted)
        for (task, note), count in notes.items():
            log.warning("%s, %d prompts: %s", task, count, note)
        work = self._numbered(asked)
        responses = complete(
            work,
            functools.partial(self._generator, rows=min(self._rows, len(work))),
            self._responses,
            batch_size=self._rows,
            title="generate_until",
            quiet=disable_tqdm,
        )
        measured = collections.defaultdict(list)
        for instance, response in zip(requests, responses, strict=True):
            self.cache_hook.add_partial("generate_until", instance.args, response["text"])
            facts = {name: value for name, value in response.items() if name != "text"}
            measured[instance.task_name].append(facts)
        self.measured |= measured
        return [response["text"] for response in responses]

    def _prompt(self, instance: Instance) -> tuple[Any, Prompt, list[str]]:
        """How a request is decoded, what is asked, and what of the request is not heeded."""
        request: Any = instance.args
        context, gen_kwargs = request
        wishes = arguments.wishes(gen_kwargs)
        group = self._recipe.plan(instance.task_name or "", wishes)
        ids = self.tok_encode(context) or [self.prefix_token_id]
        length = group[0].gen_length
        room = self.config.room(length)
        notes = []
        if len(ids) > room:
            notes.append("their beginnings are cut off to fit")
        given = self._recipe.settings.decode
        if "gen_length" not in given and wishes.get("gen_length", length) != length:
            wished = wishes["gen_length"]
            notes.append(
                f"{length} tokens are generated, not {wished}; give the model gen_length={wished}"
            )
        unknown = arguments.unknown(gen_kwargs)
        if unknown:
            notes.append(f"no meaning here has {', '.join(sorted(unknown))}")
        return group, Prompt(ids[-room:], tuple(arguments.stops(gen_kwargs)), 0), notes

    # --- likelihood -------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods, estimated as for the model family, and whether they are greedy."""
        # The estimator of Dream never scores the last token of a sequence.
        end = [self.eot_token_id] if self._likelihood.estimator == "mc_rate" else []
        pairs = []
        for _, prompt, continuation in requests:
            answer = continuation[-self.config.room(len(end)) :] + end
            room = self.config.room(len(answer))
            pair = Pair(prompt[-room:] if room else [], answer, len(end), 0)
            pairs.append((self._scorer.group(pair), pair))
        work = self._numbered(pairs)
        responses = complete(
            work,
            functools.partial(self._scorer, rows=min(self._rows, len(work))),
            self._responses,
            batch_size=self._rows,
            title="loglikelihood",
            quiet=disable_tqdm,
        )
        results = [(response["log_likelihood"], response["greedy"]) for response in responses]
        for (texts, _, _), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole texts, in windows of the model's context."""
        windows, owners = [], []
        for owner, instance in enumerate(requests):
            text: str = instance.args[0]
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 2,  # leaves room for an end
                context_len=1,
            )
            for window in map(make_disjoint_window, rolling):
                windows.append((None, *window))
                owners.append(owner)
        sums = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm) if windows else []
        for owner, (score, _) in zip(owners, scores, strict=True):
            sums[owner] += score
        for instance, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", instance.args, total)
        return sums

    # --- requests ---------------------------------------------------------------------------------

    def _numbered(self, work: Sequence[tuple[Any, Prompt | Pair]]) -> list[Request]:
        """Requests with keys: the same work asked for twice is two requests.

        What is drawn depends on the work and on how often it was asked for before, and not on how
        it is decoded, so that two methods can be compared.
        """
        seen: collections.Counter[str] = collections.Counter()
        requests = []
        for group, asked in work:
            content = digest(asked)
            noise = digest(content, seen[content])
            how = group if isinstance(asked, Prompt) else (self._likelihood, self._check_greedy)
            key = digest(self._identity, [repr(part) for part in how], noise)
            asked = asked._replace(noise=int(noise[:8], 16))
            size = sum(len(part) for part in asked[:2] if isinstance(part, list))
            requests.append(Request(key, group, size, asked))
            seen[content] += 1
        return requests


register_model("dlm_jax")(DiffusionLM)

"""One run of the command, from sound options to its output: what `dlm_jax.evaluate` imports late.

options -> tasks, contenders -> DiffusionLM, lm_eval.simple_evaluate for each -> rows -> report
"""

import argparse
import dataclasses
import json
import logging
import platform
import random
import re
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import lm_eval
import numpy as np
from jax.sharding import Mesh
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

import dlm_jax
from dlm_jax import checkpoint as checkpoint_lib
from dlm_jax import distributed, files, sharding, tokenizer
from dlm_jax.batching.fingerprint import fingerprint
from dlm_jax.batching.responses import Responses, digest
from dlm_jax.cache import CacheMethod
from dlm_jax.checkpoint import Checkpoint
from dlm_jax.cli import choices
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.eval import arguments, defaults, report, tasks
from dlm_jax.eval.arguments import Settings
from dlm_jax.eval.defaults import Recipe
from dlm_jax.eval.model import DiffusionLM
from dlm_jax.eval.report import Row

LOGGERS = ("lm_eval", "datasets", "httpx")
"""They tell of every step; the command says itself what goes on."""
LONGEST_NAME = 200
"""Of a file, in bytes, with room for what is added while it is written."""


class Contender(NamedTuple):
    """A cache method that is compared with others.

    Attributes:
      label: how it is called: what the user wrote.
      settings: all that the user decides about it.
    """

    label: str
    settings: Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Tasks and contenders that fit the model, ready for the long work.

    Attributes:
      args: the options.
      manager: finds tasks.
      tasks: name that was asked for -> the tasks in it, of which a group has several.
      contenders: what is compared.
      plans: how a contender decodes a task that asks it to generate.
      checkpoint: the model, on `mesh`.
      mesh: local devices.
      variant: of the model, see `defaults`.
      chat: whether prompts are put as a conversation.
      token_freq: see `diffusion_generate`.
      responses: keeps what the model says.
    """

    args: argparse.Namespace
    manager: TaskManager
    tasks: dict[str, dict[str, Task]]
    contenders: list[Contender]
    plans: dict[tuple[str, str], tuple[DecodeConfig, CacheMethod]]
    checkpoint: Checkpoint
    mesh: Mesh
    variant: str
    chat: bool
    token_freq: np.ndarray | None
    responses: Responses

    @classmethod
    def prepare(cls, args: argparse.Namespace) -> "Evaluation":
        """Checks all that tasks and model decide, and then loads the model.

        Raises:
          ValueError, OSError: what is wrong, in one sentence.
        """
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        mesh = sharding.make_mesh(args.mesh)
        directory = checkpoint_lib.find(args.model)
        config = checkpoint_lib.inspect(directory, args.adapter).config
        tok = checkpoint_lib.open_tokenizer(directory, config)
        if tok is None:
            raise ValueError(f"{args.model} has no tokenizer; evaluation is about text.")
        variant = defaults.variant(args.variant, directory, tok)
        chat = _use_chat(args, tok, variant)
        manager, found = _find_tasks(args)
        contenders = _contenders(args, tok)
        token_freq, plans = None, {}
        for contender in contenders:
            arguments.estimate(config, contender.settings)
            recipe = Recipe(config, variant, contender.settings)
            for task in _leaves(found):
                if task.OUTPUT_TYPE == "generate_until":
                    wishes = arguments.wishes(task.config.generation_kwargs or {})
                    plan = recipe.plan(task.task_name, wishes)
                    plans[contender.label, task.task_name] = plan
                    token_freq = choices.token_freq(args, config, plan[0])
        if distributed.index() == 0:
            told = "as a conversation" if chat else "as plain text"
            print(f"variant {variant}, prompts {told} ...", file=sys.stderr, flush=True)
        responses = Responses(args.output, process=distributed.index())
        opened = checkpoint_lib.load(
            directory,
            dtype=args.dtype,
            shardings=sharding.param_shardings(config, mesh),
            adapter=args.adapter,
            attention=args.attention,
        )
        return cls(
            args=args,
            manager=manager,
            tasks=found,
            contenders=contenders,
            plans=plans,
            checkpoint=opened,
            mesh=mesh,
            variant=variant,
            chat=chat,
            token_freq=token_freq,
            responses=responses,
        )

    def run(self) -> None:
        """Evaluates all and tells of it: one process of a cluster does, with all their results."""
        measured: list[tuple[Row, list[Any]]] = []
        for contender in self.contenders:
            model = self._model(contender.settings)
            for name, leaves in self.tasks.items():
                if distributed.index() == 0:
                    print(f"{name}, {contender.label} ...", file=sys.stderr, flush=True)
                results = self._evaluate(model, name)
                measured += self._rows(name, list(leaves), contender, model, results)
        if distributed.index() == 0:
            rows = [report.compare(row, responses, measured) for row, responses in measured]
            print(report.markdown(rows))
            if self.args.output is not None:
                self._write(rows)
        self.responses.close()
        distributed.barrier("end")

    def _model(self, settings: Settings) -> DiffusionLM:
        args = self.args
        return DiffusionLM(
            args.model,
            batch_size=args.batch_size,
            variant=self.variant,
            mesh=self.mesh,
            add_bos=args.add_bos,
            seed=args.seed,
            responses=self.responses,
            check_greedy=args.check_greedy,
            checkpoint=self.checkpoint,
            adapter=args.adapter,
            attention=args.attention,
            token_freq=self.token_freq,
            settings=settings,
        )

    def _evaluate(self, model: DiffusionLM, name: str) -> Mapping[str, Any]:
        """One task or group, answered by all processes and scored by one of them."""
        unsafe = any(getattr(task, "UNSAFE_CODE", False) for task in self.tasks[name].values())
        scored = distributed.index() == 0 and (self.args.allow_code_execution or not unsafe)
        evaluate: Any = lm_eval.simple_evaluate  # whose decorator hides its parameters
        results = evaluate(
            model=model,
            tasks=[name],
            num_fewshot=self.args.num_fewshot,
            limit=self.args.limit,
            system_instruction=self.args.system,
            apply_chat_template=self.chat,
            fewshot_as_multiturn=self.args.fewshot_as_multiturn and self.chat,
            task_manager=self.manager,
            random_seed=self.args.task_seed,
            numpy_random_seed=self.args.task_seed,
            torch_random_seed=self.args.task_seed,
            fewshot_random_seed=self.args.task_seed,
            predict_only=not scored,
            confirm_run_unsafe_code=True,  # what is unsafe is scored only if that is allowed
        )
        assert results is not None  # every process is the first of its own
        return results

    def _rows(
        self,
        name: str,
        leaves: list[str],
        contender: Contender,
        model: DiffusionLM,
        results: Mapping[str, Any],
    ) -> list[tuple[Row, list[Any]]]:
        """Rows of the report, each with the responses to its samples: tasks, and then a group."""
        total = results.get("groups", {}).get(name)
        rows = []
        for task in leaves:
            samples = results["samples"][task]
            if self.args.output is not None and distributed.index() == 0:
                self._keep(f"samples-{task}-{contender.label}", samples)
            responses = {sample["doc_id"]: sample["resps"] for sample in samples}
            row = self._row(task, contender, results["results"][task], model, [task])
            row |= dict(
                num_fewshot=results["n-shot"].get(task),
                version=results["versions"].get(task),
                higher_is_better=results["higher_is_better"].get(task),
            )
            if total is not None and row["scores"].keys() <= report.scores(total).keys():
                row |= dict(group=name)  # the table of the group says it all
            rows.append((row, [responses[doc_id] for doc_id in sorted(responses)]))
        if total is not None:
            together = [response for _, responses in rows for response in responses]
            rows.append((self._row(name, contender, total, model, leaves), together))
        return rows

    def _row(
        self,
        name: str,
        contender: Contender,
        results: Mapping[str, Any],
        model: DiffusionLM,
        leaves: list[str],
    ) -> Row:
        """What is known of a task, or of the tasks of a group together."""
        row = dict(
            task=name,
            contender=contender.label,
            cache=contender.settings.cache,
            scores=report.scores(results),
            **report.measures([s for leaf in leaves for s in model.measured.get(leaf, [])]),
        )
        if (contender.label, leaves[0]) in self.plans:
            decode, method = self.plans[contender.label, leaves[0]]
            row |= dict(decode=report.fields(decode), parameters=dataclasses.asdict(method))
        return row

    def _keep(self, name: str, samples: list[Any]) -> None:
        """Writes samples, one per line."""
        lines = (json.dumps(sample, default=str, ensure_ascii=False) for sample in samples)
        safe = re.sub(r"[^\w.=+-]+", "_", name)
        if len(safe.encode()) > LONGEST_NAME:
            safe = f"{safe[: LONGEST_NAME // 4]}-{digest(name)}"
        files.write(
            self.args.output / f"{safe}.jsonl", "".join(f"{line}\n" for line in lines).encode()
        )

    def _write(self, rows: list[Row]) -> None:
        """Writes results.json and pareto.png."""
        device = jax.devices()[0]
        args = {name: value for name, value in vars(self.args).items() if value is not None}
        params = jax.tree.leaves(self.checkpoint.params)
        machine = dict(
            device=device.device_kind,
            devices=jax.local_device_count(),
            processes=distributed.count(),
            dtypes=sorted({str(leaf.dtype) for leaf in params}),
            python=platform.python_version(),
            jax=jax.__version__,
            lm_eval=lm_eval.__version__,
            dlm_jax=dlm_jax.__version__,
        )
        model = dict(
            variant=self.variant,
            weights=fingerprint(checkpoint_lib.find(self.args.model), self.args.adapter),
            chat=self.chat,
        )
        result = dict(arguments=args, model=model, machine=machine, rows=rows)
        text = json.dumps(result, indent=2, default=str, ensure_ascii=False)
        files.write(self.args.output / "results.json", (text + "\n").encode())
        if any(row["scores"] and row.get("tokens_per_second") for row in rows):
            report.plot(rows, self.args.output / "pareto.png")


def _use_chat(args: argparse.Namespace, tok: Any, variant: str) -> bool:
    """Whether prompts are put as a conversation."""
    can = tokenizer.has_chat_template(tok)
    if args.chat and not can:
        raise ValueError(f"The tokenizer of {args.model} has no chat template; leave --chat out.")
    chat = (can and variant == "inst") if args.chat is None else args.chat
    if args.system is not None and not chat:
        raise ValueError("--system is about a conversation; add --chat.")
    return chat


def _find_tasks(args: argparse.Namespace) -> tuple[TaskManager, dict[str, dict[str, Task]]]:
    """Finds and loads the tasks by name.

    Raises:
      ValueError: there is no such task, it cannot be loaded, or its outcome would be lost.
    """
    folders = [tasks.PATH, *([] if args.include_path is None else [args.include_path])]
    own = TaskManager(include_path=tasks.PATH, include_defaults=False).all_subtasks
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not set(args.tasks) <= set(manager.all_subtasks):  # a group may hold tasks of lm-eval
        if distributed.index() == 0:
            print("reading lm-evaluation-harness's tasks ...", file=sys.stderr, flush=True)
        manager = TaskManager(include_path=folders)  # reads thousands of files
    found = {}
    for name in args.tasks:
        if name not in manager.all_tasks:
            raise ValueError(
                f"There is no task {name!r}; it must be one of lm-evaluation-harness or of this "
                f"package: {', '.join(own)}."
            )
        try:
            # Some data sets are shuffled when they are loaded, and kept like that.
            random.seed(args.task_seed)
            np.random.seed(args.task_seed)  # noqa: NPY002 (what tasks draw from)
            found[name] = dict(manager.load([name])["tasks"])
        except Exception as error:  # whatever data sets and task modules raise
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise ValueError(f"The task {name} cannot be loaded: {reason}") from error
    for task in _leaves(found):
        unsafe = getattr(task, "UNSAFE_CODE", False)
        if unsafe and not args.allow_code_execution and args.output is None:
            raise ValueError(
                f"{task.task_name} is scored by running the programs that the model writes; allow "
                "that with --allow-code-execution, or keep them with --output."
            )
    return manager, found


def _leaves(found: Mapping[str, Mapping[str, Task]]) -> list[Task]:
    return [task for tasks in found.values() for task in tasks.values()]


def _contenders(args: argparse.Namespace, tok: Any) -> list[Contender]:
    """What is compared, each with what the options say where it says nothing itself."""
    decode = choices.overrides(args, tok)
    if args.gen_length is not None:
        decode["gen_length"] = args.gen_length
    likelihood = dict(
        estimator=args.estimator,
        log_type=args.log_type,
        mc_num=args.mc_num,
        batch_size=args.mc_batch_size,
    )
    likelihood = {name: value for name, value in likelihood.items() if value is not None}
    if args.compare is None:
        asked = [(args.cache, Settings(cache=args.cache, cache_args=args.cache_args))]
    else:
        asked = [(label, arguments.sort_out(name, own)) for label, name, own in args.compare]
    return [Contender(label, own.over(decode, likelihood)) for label, own in asked]

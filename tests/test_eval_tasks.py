"""The tasks for lm-evaluation-harness, on samples in the format of the real data sets."""

import dataclasses
import itertools
import json
import random
import re
from pathlib import Path

import datasets
import lm_eval
import pytest
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from dlm_jax import arithmetic
from dlm_jax.eval import code, sandbox
from dlm_jax.eval.tasks import PATH

SAMPLES = Path(__file__).parent / "eval_samples"
NAMES = {
    "gsm8k",
    "humaneval",
    "humaneval_64",
    "humaneval_64_instruct",
    "humaneval_instruct",
    "math-500",
    "mbpp",
    "mbpp_instruct",
    "tiny_math",
}
STOPS = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (SAMPLES / f"{name}.jsonl").read_text().splitlines()]


def samples(path: str, name: str | None = None, **_) -> dict[str, datasets.Dataset]:
    """Stands for `datasets.load_dataset`, with its splits and without a network or a cache."""
    match path, name:
        case "openai/gsm8k", "main":
            rows = read("gsm8k")
            splits = {"train": rows[1:], "test": rows[:1]}
        case "HuggingFaceH4/MATH-500", "default":
            splits = {"test": read("math-500")}
        case "openai/openai_humaneval", None:
            splits = {"test": read("humaneval")}
        case "google-research-datasets/mbpp", "full":
            rows = read("mbpp")
            splits = {"prompt": rows[3::-1], "test": rows[4:]}
        case _:
            raise AssertionError(f"no samples of {path}, {name}")
    return {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager(include_path=PATH, include_defaults=False)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", samples)


def load(manager: TaskManager, name: str):
    task = manager.load([name])["tasks"][name]
    task.set_fewshot_seed(seed=42)
    return task


def template(messages: list[dict], *, add_generation_prompt: bool) -> str:
    text = "".join(f"<{m['role']}>{m['content']}" for m in messages)
    return text + ("<assistant>" if add_generation_prompt else "")


def prompts(task, **settings) -> list[str]:
    task.build_all_requests(**settings)
    return [instance.args[0] for instance in task.instances]


def stops(task) -> list[str]:
    return task.config.generation_kwargs["until"]


def scores(task, doc_id: int, *responses: str) -> dict[str, dict[str, float]]:
    """Filter -> metric -> score of a problem for these responses."""
    task.build_all_requests()
    for instance in task.instances:
        instance.resps = list(responses) if instance.doc_id == doc_id else [""] * len(responses)
    task.apply_filters()
    instance = task.instances[doc_id]
    return {
        name: task.process_results(instance.doc, [filtered])
        for name, filtered in instance.filtered_resps.items()
    }


def test_every_task_is_found_by_name(manager):
    assert set(manager.all_tasks) == NAMES


def test_only_the_sandbox_runs_programs():
    for file in [*PATH.rglob("*.yaml"), *PATH.rglob("*.py")]:
        text = file.read_text()
        assert not re.search(r"code_eval|hf_evaluate|import evaluate|tasks\.(humaneval|mbpp)", text)
        assert not re.search(r"\b(exec|eval)\(", text)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_loading_runs_nothing_and_only_code_is_unsafe(manager, name, monkeypatch):
    monkeypatch.setattr(sandbox, "run", None)
    monkeypatch.setattr(sandbox, "run_all", None)
    task = load(manager, name)
    assert getattr(task, "UNSAFE_CODE", False) == name.startswith(("humaneval", "mbpp"))
    assert all(task.higher_is_better().values()) and task.config.metadata["version"]


# tiny_math


def test_tiny_math_is_the_held_out_split():
    drawn = itertools.islice(arithmetic.problems(2026, "heldout"), 500)
    lines = (PATH / "tiny_math" / "heldout.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [dataclasses.asdict(p) for p in drawn]


def test_tiny_math_asks_the_question_alone(manager, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    task = load(manager, "tiny_math")
    problems = [*itertools.islice(arithmetic.problems(2026, "heldout"), 500)]
    assert prompts(task) == [problem.question for problem in problems]
    assert [task.doc_to_target(doc) for doc in task.test_docs()] == [p.answer for p in problems]
    assert stops(task) == []


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("9 * 7 = 63. #### 8", 1),
        ("#### 8 #### 9", 1),
        ("####8", 1),
        ("#### 008", 1),
        ("#### 8.", 1),
        ("#### 9 #### 8", 0),
        ("#### 80", 0),
        ("#### -8", 0),
        ("8", 0),
        ("### 8", 0),
        ("", 0),
        ("#### " + "8" * 5000, 0),
    ],
)
def test_tiny_math_counts_the_first_result(tiny_math, response, score):
    assert tiny_math.test_docs()[0]["result"] == 8
    assert scores(tiny_math, 0, response) == {"first-number": {"exact_match": score}}


@pytest.fixture(scope="module")
def tiny_math(manager):
    task = load(manager, "tiny_math")
    task.dataset = {"test": task.dataset["test"].select(range(2))}
    return task


# gsm8k


def test_gsm8k_prompts(manager):
    task = load(manager, "gsm8k")
    assert task.config.num_fewshot == 5 and stops(task) == ["Question:", "</s>", "<|im_end|>"]
    first, *shots = [(doc["question"], doc["answer"]) for doc in read("gsm8k")]
    question = f"Question: {first[0]}\nAnswer:"
    task.set_config("num_fewshot", 0)
    assert prompts(task) == [question]
    task.set_config("num_fewshot", 2)
    drawn = random.Random(42).sample(shots, 2)
    examples = [(f"Question: {q}\nAnswer:", answer) for q, answer in drawn]
    assert prompts(task) == ["".join(f"{q} {a}\n\n" for q, a in examples) + question]
    chat = dict(apply_chat_template=True, chat_template=template)
    task.set_fewshot_seed(seed=42)
    turns = "".join(f"<user>{q}<assistant>{a}" for q, a in examples)
    assert prompts(task, fewshot_as_multiturn=True, **chat) == [
        f"{turns}<user>{question}<assistant>"
    ]
    task.set_fewshot_seed(seed=42)
    assert prompts(task, fewshot_as_multiturn=False, **chat) == [
        "<user>" + "".join(f"{q} {a}\n\n" for q, a in examples) + f"{question}<assistant>"
    ]


@pytest.mark.parametrize(
    ("response", "strict", "flexible"),
    [
        ("12 * 100 is it.\n#### 1,200", 1, 1),
        ("#### 1200", 1, 1),
        ("#### 1200.", 1, 1),
        ("#### $1,200", 0, 1),
        ("It costs $1,200.", 0, 1),
        ("\\boxed{1200}", 0, 1),
        ("1200 dollars, that is 12", 0, 0),
        ("#### 1200 #### 7", 1, 0),
        ("#### 7\n#### 1200", 0, 1),
        ("####1200", 0, 1),
        ("#### 1200.00", 0, 0),
        ("#### -1200", 0, 0),
        ("no number", 0, 0),
        ("", 0, 0),
    ],
)
def test_gsm8k_scores(gsm8k, response, strict, flexible):
    assert scores(gsm8k, 0, response) == {
        "strict-match": {"exact_match": strict},
        "flexible-extract": {"exact_match": flexible},
    }


@pytest.fixture(scope="module")
def gsm8k(manager):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", samples)
        task = load(manager, "gsm8k")
    task.set_config("num_fewshot", 0)
    task.dataset = {"train": task.dataset["train"], "test": task.dataset["train"].select([0])}
    assert task.test_docs()[0]["answer"].endswith("#### 1,200")
    return task


# math-500


@pytest.fixture(scope="module")
def math_500(manager):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", samples)
        return load(manager, "math-500")


def test_math_500_prompts(math_500):
    assert math_500.config.num_fewshot == 4 and stops(math_500) == ["Problem:"]
    *shots, problem, end = prompts(math_500)[0].split("\n\nProblem:\n")[-1].partition("\n\n")
    assert shots == [read("math-500")[0]["problem"]] and (problem, end) == ("\n\n", "Solution:")
    prompt = prompts(math_500)[0]
    assert prompt.startswith("Problem:\nFind the domain of the expression")
    assert prompt.count("Problem:\n") == prompt.count("\n\nSolution:") == 5
    assert prompt.count(". I hope it is correct.\n\nProblem:\n") == 4
    assert prompt.count("\nSolution: ") == 4
    chat = dict(apply_chat_template=True, chat_template=template)
    turns = prompts(math_500, fewshot_as_multiturn=True, **chat)[0]
    assert turns.count("\n\nSolution:<assistant>") == 5 and turns.count("<user>Problem:\n") == 5
    assert prompts(math_500, fewshot_as_multiturn=False, **chat)[0] == (
        f"<user>{prompt}<assistant>"
    )


FINAL = "Final Answer: The final answer is {}. I hope it is correct."


@pytest.mark.parametrize(
    ("doc_id", "response", "exact", "verified"),
    [
        (0, FINAL.format("$\\frac{3}{4}$"), 1, 1),
        (0, FINAL.format("$\\frac34$"), 1, 1),
        (0, FINAL.format("$0.75$"), 1, 1),
        (0, FINAL.format("$\\frac{6}{8}$"), 1, 1),
        (0, "The sum is $\\boxed{\\frac{3}{4}}$.", 0, 1),
        (0, "Final Answer: The final answer is $\\frac{3}{4}$. ", 1, 1),
        (0, FINAL.format("$\\frac{4}{3}$"), 0, 0),
        (1, FINAL.format("$7$"), 1, 1),
        (1, FINAL.format("$x = 7$"), 1, 1),
        (1, "$\\boxed{-7}$", 0, 0),
        (1, "\\boxed{", 0, 0),
        (1, "", 0, 0),
        (2, FINAL.format("$[1,3)$"), 1, 1),
        (2, FINAL.format("$[1,3]$"), 0, 0),
    ],
)
def test_math_500_scores(math_500, doc_id, response, exact, verified):
    assert scores(math_500, doc_id, response) == {
        "none": {"exact_match": exact, "math_verify": verified}
    }


# humaneval


def test_humaneval_prompts(manager):
    docs = read("humaneval")
    task = load(manager, "humaneval")
    assert prompts(task) == [doc["prompt"] for doc in docs] and stops(task) == []
    assert task.doc_to_target(docs[1]) == f"{docs[1]['test']}\ncheck(double)"
    for name in ("humaneval_instruct", "humaneval_64_instruct"):
        task = load(manager, name)
        asked = (
            "Write a solution to the following problem and make sure that it passes the tests:\n"
            f"```python\n{docs[1]['prompt']}\n```\n"
        )
        begun = f"Here is the completed function:\n```python\n{docs[1]['prompt']}\n"
        assert prompts(task)[1] == asked + begun and stops(task) == STOPS
        chat = dict(apply_chat_template=True, chat_template=template)
        assert prompts(task, **chat)[1] == f"<user>{asked}<assistant>{begun}"


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("    return word * 2\n", 1),
        ("    return word * 2\n```\nThis repeats the word. ```python\nx", 1),
        ("```python\ndef double(word):\n    return word + word\n```\nDone.", 1),
        ("```python\ndef double(word):\n    return word + word", 1),
        ("    return twice(word)\n\ndef twice(x):\n    return x * n\n\nn = 2\nraise X\n", 1),
        ("    return word * 2\n\nprint(double('a'))\nassert False\nhere it is:", 1),
        ("    return word\n", 0),
        ("    return word * 2)\n", 0),
        ("  return word * 2\n", 0),
        ("    pass\n", 0),
        ("    raise SystemExit(0)\n    return 1", 0),
        ("", 0),
    ],
)
def test_humaneval_scores(humaneval, response, score):
    assert scores(humaneval, 1, response) == {"create_test": {"pass@1": score}}


@pytest.fixture(scope="module")
def humaneval(manager):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", samples)
        return load(manager, "humaneval")


def test_canonical_solutions_pass(manager, humaneval):
    for i, doc in enumerate(read("humaneval")):
        found = scores(humaneval, i, doc["canonical_solution"])
        assert found == {"create_test": {"pass@1": 1}}
    task = load(manager, "mbpp")
    for i, doc in enumerate(read("mbpp")[4:]):
        assert scores(task, i, doc["code"]) == {"none": {"pass_at_1": 1}}


def test_humaneval_64_estimates_pass_at_k(manager):
    task = load(manager, "humaneval_64")
    assert task.config.repeats == 64 and stops(task) == STOPS
    sampling = {k: task.config.generation_kwargs[k] for k in ("do_sample", "temperature", "top_p")}
    assert sampling == dict(do_sample=True, temperature=0.2, top_p=0.95)
    right, wrong = "    return word * 2", "    return word"
    found = scores(task, 1, *[right] * 3, *[wrong] * 5)
    expected = {f"pass@{k}": sandbox.pass_at_k(8, 3, k) for k in (2, 8)}  # 16 and more: too many
    assert found == {"create_test": expected}


# mbpp


def mbpp_doc(task_id: int) -> dict:
    return next(doc for doc in read("mbpp") if doc["task_id"] == task_id)


def test_mbpp_prompts(manager):
    task = load(manager, "mbpp")
    assert task.config.num_fewshot == 3 and stops(task) == ["[DONE]"]

    def question(doc):
        tests = "\n".join(doc["test_list"])
        return (
            "You are an expert Python programmer, and here is your task: "
            f"{doc['text']} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
        )

    shots = [mbpp_doc(task_id) for task_id in (2, 3, 4)]
    expected = "".join(f"{question(doc)}{doc['code']}\n[DONE]\n\n" for doc in shots)
    assert prompts(task)[0] == expected + question(mbpp_doc(11))


def test_mbpp_instruct_prompts(manager):
    task = load(manager, "mbpp_instruct")
    assert task.config.num_fewshot == 3 and stops(task) == []

    def question(doc):
        tests = "\n".join(doc["test_list"])
        return (
            "You are an expert Python programmer, and here is your task:\n"
            f"{doc['text']}\nYour code should pass these tests:\n{tests}"
        )

    shots = [mbpp_doc(task_id) for task_id in (2, 3, 4)]
    fence = "\n```python\n"
    asked = question(mbpp_doc(11))
    expected = "".join(f"{question(doc)}{fence}{doc['code']}\n```\n\n" for doc in shots)
    assert prompts(task)[0] == expected + asked + fence
    chat = dict(apply_chat_template=True, chat_template=template, fewshot_as_multiturn=True)
    turns = "".join(f"<user>{question(doc)}<assistant>{fence}{doc['code']}\n```" for doc in shots)
    assert prompts(task, **chat)[0] == f"{turns}<user>{asked}<assistant>{fence}"


@pytest.mark.parametrize(
    ("response", "base", "instruct"),
    [
        ("def cube(x):\n  return x ** 3", 1, 0),
        ("def cube(x):\n  return x ** 3\n```\nIt cubes.", 0, 1),
        ("\ndef cube(x):\n  return x ** 3\n```", 0, 1),
        ("```python\ndef cube(x):\n  return x ** 3\n```", 0, 1),
        ("def cube(x):\n  return x\n```\n```python\ndef cube(x):\n  return x ** 3\n```", 0, 0),
        ("def cube(x):\n  return x", 0, 0),
        ("exit(0)", 0, 0),
        ("", 0, 0),
    ],
)
def test_mbpp_scores(mbpp, response, base, instruct):
    plain, fenced = mbpp
    assert scores(plain, 0, response) == {"none": {"pass_at_1": base}}
    assert scores(fenced, 0, response) == {"extract_code": {"pass_at_1": instruct}}


@pytest.fixture(scope="module")
def mbpp(manager):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", samples)
        return load(manager, "mbpp"), load(manager, "mbpp_instruct")


# Whole evaluations


class Canned(LM):
    """Answers every request with the same text."""

    def __init__(self, text: str):
        super().__init__()
        self.text = text

    def generate_until(self, requests, disable_tqdm=False):
        return [self.text for _ in requests]

    def loglikelihood(self, requests):
        raise NotImplementedError

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError


def evaluate(manager: TaskManager, name: str, text: str, **settings) -> dict:
    return lm_eval.simple_evaluate(
        Canned(text), tasks=[name], task_manager=manager, bootstrap_iters=1, **settings
    )


def test_an_evaluation_with_programs(manager):
    with pytest.raises(ValueError, match="unsafe"):
        evaluate(manager, "humaneval", "")
    results = evaluate(manager, "humaneval", "    return word * 2", confirm_run_unsafe_code=True)
    assert results["results"]["humaneval"]["pass@1,create_test"] == 0.5
    assert results["results"]["humaneval"]["pass@1_stderr,create_test"] == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["humaneval", "humaneval_instruct", "mbpp", "mbpp_instruct"])
def test_without_permission_nothing_is_run(manager, name, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a program was run")

    for function in ("run", "run_all", "_start"):
        monkeypatch.setattr(sandbox, function, refuse)
    text = "def cube(x):\n  return x ** 3\n```"
    settings = dict(confirm_run_unsafe_code=True)
    results = evaluate(manager, name, text, predict_only=True, **settings)
    assert [sample["resps"] for sample in results["samples"][name]] == [[[text]]] * 2
    assert results["results"][name]["bypass," + results["samples"][name][0]["filter"]] == 999
    with pytest.raises(AssertionError, match="a program was run"):
        evaluate(manager, name, text, **settings)


def test_an_evaluation_of_tiny_math_has_an_error(manager):
    results = evaluate(manager, "tiny_math", "#### 8", limit=20)["results"]["tiny_math"]
    share = sum(p.result == 8 for p in itertools.islice(arithmetic.problems(2026, "heldout"), 20))
    assert results["exact_match,first-number"] == pytest.approx(share / 20)
    assert 0 < results["exact_match_stderr,first-number"] < 0.2


# From a text to a program


def test_sanitise_keeps_what_the_function_needs():
    text = (
        "Here is the code:\n"
        "import os, math\n"
        "from typing import List\n"
        "@functools.cache\n"
        "def helper(x): return x + SHIFT; print('never')\n"
        "SHIFT: int = 3; unused = 4\n"
        "a, b = 1, 2\n"
        "def stub():\n"
        "    'Says nothing.'\n"
        "def f(x):\n"
        "    'é'\n"
        "    return Box(helper(x) + a).y\n"
        "class Box:\n"
        "    def __init__(self, y): self.y = y\n"
        "def f(x):\n"
        "    return 0\n"
        "f(3)\n"
        "if f(3): SHIFT = 5\n"
        "That was the code."
    )
    assert code.sanitise(text, "f") == (
        "import os, math\n"
        "from typing import List\n"
        "@functools.cache\n"
        "def helper(x): return x + SHIFT; print('never')\n"
        "SHIFT: int = 3\n"
        "a, b = 1, 2\n"
        "def f(x):\n"
        "    'é'\n"
        "    return Box(helper(x) + a).y\n"
        "class Box:\n"
        "    def __init__(self, y): self.y = y"
    )
    assert code.sanitise(text, "stub") == "import os, math\nfrom typing import List"
    assert code.sanitise("x = 1\n" * 100 + "def f(): return 1", "f") == ""


def size(text: str) -> int:
    return sum(1 for line in text.split("\n") if line.strip())


def longest_of_all(text: str) -> int:
    """The size of the longest run of lines that is Python, by trying all of them."""
    lines = text.split("\n")
    runs = ("\n".join(lines[i:j]) for i, j in itertools.combinations(range(len(lines) + 1), 2))
    return max((size(run) for run in runs if code._parse(run) is not None), default=0)


JUNK = (
    *("(", "'''", "Here it is:", "```", "    return x", "else:", "try:", "  x = (1,", "def f(x):"),
    *("\\", "x = 1 \\", "x = [", "@dec", "class A:", "if x:", "  ", "\tx=1", "except E:", ")"),
    *("match x:", "  case 1:", "async", "f'{", "f(a for a in b,", "print 3", "    # c", "'x", "é"),
)


def test_the_longest_block_is_the_longest():
    draw = random.Random(0)
    source = Path(arithmetic.__file__).read_text().split("\n")
    for _ in range(150):
        start = draw.randrange(len(source))
        lines = source[start : start + draw.randint(1, 14)]
        for _ in range(draw.randint(0, 4)):
            i = draw.randrange(len(lines))
            lines[i : i + draw.randint(0, 1)] = [draw.choice(JUNK)]
        text = "\n".join(lines)
        block = code.longest_block(text)
        assert block in text and size(block) == longest_of_all(text)


@pytest.mark.parametrize(
    "line",
    [
        *JUNK,
        *("", "\0", "\ud800", "\r", "\x0c", "x = 1 is 1", "'\\d'", "9" * 5000, "-" * 500 + "1"),
        *("(" * 5000, "a" + ".b" * 500, "[" * 150 + "]" * 150, "not " * 500 + "x"),
    ],
)
def test_no_text_is_too_much(line):
    for count in (1, 40):
        text = "\n".join([line] * count)
        assert isinstance(code.sanitise(f"{text}\ndef f(): return 1\n{text}", "f"), str)
        assert isinstance(code.cut_fences(text) + code.first_block(text), str)


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("a\n```\nb", "a\n"),
        ("```python\na\n```\nb", "a\n"),
        ("So:\n```python\na\n```\nb\n```python\nc", "a\n"),
        ("a\n```\n```python\nb\n```", "a\n"),
        ("```python", ""),
        ("```\na\n```", ""),
        ("a", "a"),
    ],
)
def test_cut_fences(text, inside):
    assert code.cut_fences(text) == inside

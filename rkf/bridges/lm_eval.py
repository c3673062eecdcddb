"""Importing this module adds the model "rkf" to EleutherAI's lm-evaluation-harness; `rkf eval tasks` runs it.

    import rkf.bridges.lm_eval
    lm_eval.simple_evaluate(model="rkf", model_args="path=model.rkf", tasks=["hellaswag"])

As a program it is the harness's own command line with this model added:

    python -m rkf.bridges.lm_eval --model rkf --model_args path=model.rkf --tasks hellaswag

Texts are encoded as the harness's `hf` model does, so scores can be compared. Requests run together in the engine:
their common beginnings are computed once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from numpy.typing import NDArray
from tqdm import tqdm

from rkf.errors import UsageError
from rkf.eval.perplexity import negative_log_likelihood
from rkf.runtime.chooser import Chooser
from rkf.runtime.engine import Request
from rkf.runtime.generate import AnswerText, Limits
from rkf.runtime.model import load
from rkf.runtime.sampling import Sampling

F32 = NDArray[np.float32]
Encoded = tuple[tuple[str, str], list[int], list[int]]  # context and continuation, as texts and as tokens
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@register_model("rkf")
class RkfLM(TemplateLM):
    """A model in an .rkf file. path: the file; the other arguments are those of `rkf.load`.

    batch_size: requests that run together. max_length: tokens of a request, by default the model's context.
    add_bos_token: begin every text with the token that begins texts, as `hf` does on request.
    """

    def __init__(
        self,
        path: str,
        *,
        batch_size: int | str = 16,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.model = load(path, **{name: options[name] for name in options.keys() - {"max_batch_size", "device"}})
        self.batch_size = 16 if batch_size == "auto" else int(batch_size)
        self.max_length = max_length or self.model.config.context_length
        self.max_gen_toks, self.add_bos_token = max_gen_toks, add_bos_token

    @property
    def eot_token_id(self) -> int:
        if not self.model.config.eos_ids:
            raise UsageError("the model names no token that ends a text, which the task needs")
        return self.model.config.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        bos = self.model.config.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's cache of rendered prompts: it differs where templates do."""
        return f"rkf-{abs(hash(self.model.tokenizer.template))}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        bos = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return self.model.tokenizer.encode(string, bos=bos)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.model.tokenizer.render(chat_history, add_generation_prompt=add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: list[Encoded], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        scores = [_Score(context, continuation, self.max_length) for _, context, continuation in requests]
        self._run(scores, disable_tqdm)
        return [score.result() for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        found = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(("", ""), *make_disjoint_window(window)) for window in windows]
            found.append(sum(score for score, _ in self._loglikelihood_tokens(parts, disable_tqdm=disable_tqdm)))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        answers = [self._answer(*request.args) for request in requests]
        self._run(answers, disable_tqdm)
        return [answer.text for answer in answers]

    def _answer(self, context: str, given: dict[str, Any]) -> _Answer:
        wanted = normalize_gen_kwargs(given, self.max_gen_toks)
        stop, most = handle_stop_sequences(wanted.pop("until"), None), int(wanted.pop("max_gen_toks"))
        if most >= self.max_length:
            raise UsageError(f"max_gen_toks {most}: expected less than the length of a request, {self.max_length}")
        ids = self.tok_encode(context)[-(self.max_length - most) :]
        sampling = Sampling(**{name: wanted[name] for name in _SAMPLING if name in wanted})
        limits = Limits(most, self.model.config.eos_ids, tuple(each for each in stop if each))
        text = AnswerText(self.model.tokenizer.stream(ids), limits.stop)
        return _Answer(limits.request(ids, Chooser(sampling, len(ids))), text)

    def _run(self, tasks: Sequence[_Score | _Answer], disable_tqdm: bool) -> None:
        """Run the requests of all tasks to their ends, `batch_size` at a time."""
        engine, waiting, running = self.model.engine, deque(tasks), list[_Score | _Answer]()
        with tqdm(total=len(tasks), disable=disable_tqdm, desc="rkf") as bar:
            while waiting or running:
                while waiting and len(running) < self.batch_size:
                    running.append(waiting.popleft())
                    engine.submit(running[-1].request)
                engine.step()
                for task in running:
                    if task.done():
                        engine.cancel(task.request)
                        bar.update()
                running = [task for task in running if not task.request.ended]


class _Score:
    """The log-likelihood of a continuation, added up while the engine computes its tokens. Nothing is generated."""

    def __init__(self, context: list[int], continuation: list[int], most: int) -> None:
        if not continuation:
            raise UsageError("a continuation has no token: it merges with its context")
        ids = (context + continuation)[-(most + 1) :]
        self._targets = ids[-len(continuation) :]
        self._first = len(ids) - len(self._targets) - 1  # logits after this position predict the first target
        self._total, self._greedy = 0.0, True
        self.request = Request(ids[:-1], self._last, most=len(ids), ahead=2, scores=self._score, scored=self._first)

    def done(self) -> bool:
        """Whether nothing is left to compute. Raises the error that ended the request."""
        return bool(self.request.take())

    def result(self) -> tuple[float, bool]:
        """The log-likelihood, and whether every token was the most likely one."""
        return self._total, self._greedy

    def _score(self, position: int, logits: F32) -> None:
        target = self._targets[position - self._first]
        self._total -= float(negative_log_likelihood(logits[None], np.array([target]))[0])
        self._greedy &= int(logits.argmax()) == target

    def _last(self, logits: F32, ids: Sequence[int]) -> int:
        self._score(len(ids) - 1, logits)
        return self._targets[-1]


class _Answer:
    """A text that grows while the engine computes its tokens. text: all of it, once `done`."""

    def __init__(self, request: Request, stream: AnswerText) -> None:
        self.request, self._stream, self.text = request, stream, ""

    def done(self) -> bool:
        """Read the new tokens. Raises the error that ended the request."""
        self.text += self._stream.push(self.request.take())[0]
        if not self._stream.stopped and not self.request.ended:
            return False
        self.text += self._stream.finish()
        return True


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()

"""EleutherAI's lm-eval on a model of ours, in this process: everything that it can measure, on any runner.

>>> results = lm_eval.simple_evaluate(model=HarnessModel(LLM("log/")), tasks=["arc_easy"])

Needs the package ``lm-eval``. Windows of a rolling log likelihood do not overlap, as in ``nanogpt eval --loss``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM

from nanogpt.eval.scoring import continuation_logprobs, following_logprobs, start_tokens
from nanogpt.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanogpt.llm import LLM

_MAX_NEW_TOKENS = 256  # what the harness's own models take where a task says nothing


class HarnessModel(LM):  # type: ignore[misc]
    """An ``LLM`` as the harness calls it. Requests are computed one after the other."""

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        self.llm = llm

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return [self._loglikelihood(*request.args) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return [self._rolling(request.args[0]) for request in requests]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return [self._generate(*request.args) for request in requests]

    def _loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        # The harness's convention: white space at the context's end belongs to the continuation's first token.
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        before = self.llm.tokenizer.encode(stripped)
        together = self.llm.tokenizer.encode(stripped + continuation)
        token_ids = together[len(before) :]
        context_ids = before or start_tokens(self.llm)
        if not token_ids or not context_ids:
            return 0.0, True
        logprobs, greedy = continuation_logprobs(self.llm, context_ids, token_ids)
        return float(logprobs.sum()), bool(greedy.all())

    def _rolling(self, text: str) -> float:
        token_ids = [*start_tokens(self.llm), *self.llm.tokenizer.encode(text)]
        window = self.llm.config.block_size
        starts = range(0, len(token_ids) - 1, window)
        return sum(float(following_logprobs(self.llm, token_ids[i : i + window + 1])[0].sum()) for i in starts)

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        stops = options.get("until") or []
        wanted = int(options.get("max_gen_toks", _MAX_NEW_TOKENS))
        params = SamplingParams(
            max_tokens=min(wanted, self.llm.config.block_size // 2),
            temperature=float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0,
            stop=tuple([stops] if isinstance(stops, str) else stops),
        )
        room = self.llm.config.block_size - params.max_tokens
        prompt = self.llm.tokenizer.encode(context)[-room:]
        return self.llm.generate([prompt], params)[0].text

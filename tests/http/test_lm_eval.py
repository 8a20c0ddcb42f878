"""lm-eval over HTTP measures what ``nanogpt eval``'s own harness measures in this process: the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from http_support import Server
from support import ROOT, require_service

from nanogpt.llm import LLM

TEXT = "To be, or not to be"


@pytest.mark.filterwarnings("default")  # of the harness and what it imports
def test_local_completions_gives_the_same_numbers(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token ids by /tokenize, log probabilities by echo, four prompts a request: nothing is told of the model."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    try:
        import lm_eval
        import tenacity  # noqa: F401  (of the extra lm-eval[api])
        from lm_eval.api.instance import Instance
        from lm_eval.models.openai_completions import LocalCompletionsAPI
        from lm_eval.tasks import TaskManager
    except ImportError:
        require_service("lm-eval", False, "pip install lm-eval[api]")
    from nanogpt.eval.harness import HarnessModel

    folder = ROOT / "tests" / "eval" / "lm_eval_tasks"
    (tmp_path / "plays.yaml").write_text((folder / "plays.yaml").read_text().replace("TASKS_FOLDER", str(folder)))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    generate = [Instance("generate_until", {}, ("ROMEO:", {"until": ["\n\n"], "max_gen_toks": 20}), 0)]

    def measure(model: Any) -> Any:
        found = lm_eval.simple_evaluate(
            model=model, tasks=["plays"], task_manager=manager, bootstrap_iters=0, log_samples=True
        )
        answers = [sample["resps"] for sample in found["samples"]["plays"]]
        return found["results"]["plays"]["acc,none"], answers, model.generate_until(generate)

    url = f"{server.url}/v1/completions"
    with LLM("", threads=1) as llm:
        expected = measure(HarnessModel(llm))
        max_length = llm.config.block_size
    found = measure(LocalCompletionsAPI(model="default", base_url=url, max_length=max_length, batch_size=4))
    assert found == expected
    assert expected[2][0].strip(), "something was generated"

"""What policies read inside vLLM is what they read in bpkit's own decoder: same pair, same prompts, in float32."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bpkit_vllm.options import EngineError
from bpkit_vllm.refuse import check_policy, provided_features
from torch import Tensor

from bpkit import SpeculativeDecoder
from bpkit.registry.resolve import resolve_policy
from bpkit.types import OF_THE_ANCHOR
from tests.vllm.engine import METHODS, TARGET, Engine, token_prompts
from tests.vllm.noting import Noting

Notes = dict[tuple[int, int, str], Tensor]
NOTING = f"{Path(__file__).parent / 'noting.py'}:Noting"
TOKENS = 24
SIZES = {"dflash": 16, "draft_model": 6, "ngram": 7}
OF_TARGET = {"last_hidden", "prefill_hidden", "anchor_embedding", "anchor_log_probability", "anchor_entropy"}
OF_DRAFT = {"draft_tokens", "draft_probability", "draft_entropy", "draft_hidden"}
GIVEN = {
    "dflash": OF_TARGET | OF_DRAFT | {"target_features"},
    "draft_model": OF_TARGET | OF_DRAFT,
    "ngram": OF_TARGET | {"draft_tokens"},
}
SHIPPED = ("forecast", "ldlp", "ldlp_threshold", "specdecpp", "blockpilot:input=hidden", "svip", "confidence")


def some_prompts() -> list[list[int]]:
    """A few, of which no two are of one length."""
    by_length = {len(prompt): prompt for prompt in token_prompts(24)}
    return [by_length[length] for length in sorted(by_length)[:: max(1, len(by_length) // 6)]]


PROMPTS = some_prompts()


@pytest.fixture(scope="module")
def own() -> Callable[[str], tuple[list[list[int]], Notes]]:
    """Texts of bpkit's own decoder, and what a policy reads in it at each position."""
    known: dict[str, tuple[list[list[int]], Notes]] = {}

    def decoded(method: str) -> tuple[list[list[int]], Notes]:
        if method not in known:
            drafter = METHODS[method].get("model", "ngram")
            policy = Noting(block_size=SIZES[method], verify=False)
            decoder = SpeculativeDecoder.from_pretrained(TARGET, drafter=drafter, policy=policy, dtype=torch.float32)
            options: dict[str, Any] = {"max_new_tokens": TOKENS, "temperature": 0.0, "eos_token_id": []}
            results = [decoder.generate(torch.tensor([prompt]), **options) for prompt in PROMPTS]
            known[method] = [result.tokens[0].tolist() for result in results], policy.notes
        return known[method]

    return decoded


@pytest.fixture(scope="module", params=METHODS)
def served(request: pytest.FixtureRequest) -> Iterator[tuple[str, Engine]]:
    """An engine of each method that reads prompts in pieces, beside rows that draft."""
    method: str = request.param
    policy = {"name": NOTING, "block_size": SIZES[method], "ragged": method != "dflash"}
    options: dict[str, Any] = {"policy": policy, "policies": SHIPPED if method == "dflash" else ()}
    made = Engine(
        method,
        options,
        worker_cls="bpkit_vllm.FeatureWorker",
        async_scheduling=False,
        max_num_batched_tokens=64,
        max_num_seqs=8,
    )
    yield method, made
    made.close()


def test_features_are_those_of_our_own_decoder_position_by_position(
    served: tuple[str, Engine], own: Callable[[str], tuple[list[list[int]], Notes]]
) -> None:
    method, engine = served
    texts, expected = own(method)
    found = engine.run(PROMPTS, concurrency=4, max_tokens=TOKENS)
    assert found.texts == texts
    policy = engine.scheduler.policies.default.policy
    assert type(policy).__name__ == "Noting"
    widths, compared = set(), Counter[str]()
    for (prompt, position, name), values in policy.notes.items():
        if method == "ngram" and name in OF_DRAFT:  # which of several matches goes on, each decides for itself
            compared[name] += 1
            continue
        like = expected[prompt, position, name]
        if name in OF_DRAFT:
            widths.add(len(values))
            like = like[: len(values)]
        torch.testing.assert_close(values.to(like.dtype), like, atol=1e-4, rtol=1e-4)
        compared[name] += 1
    assert set(compared) == GIVEN[method]
    assert min(count for name, count in compared.items() if name != "prefill_hidden") > 5 * len(PROMPTS)
    assert compared["prefill_hidden"] == len(PROMPTS)
    if method == "draft_model":
        assert len(widths) > 2, "drafts of several lengths"


def test_policies_that_ship_read_what_they_want(
    served: tuple[str, Engine], own: Callable[[str], tuple[list[list[int]], Notes]]
) -> None:
    method, engine = served
    if method != "dflash":
        pytest.skip("they were trained for the DFlash drafter")
    found = engine.run(PROMPTS * 2, concurrency=8, max_tokens=TOKENS, policies=SHIPPED)
    assert found.texts == own(method)[0] * 2
    for name in SHIPPED:
        rows = engine.scheduler.policies._known[name]
        assert rows.steps > 0
        assert rows.fallbacks == 0


def config_of(method: str = "dflash", **changes: Any) -> Any:
    """As much of a `VllmConfig` as features depend on."""
    speculative = {
        "method": method,
        "draft_sample_method": "greedy",
        "use_local_argmax_reduction": False,
        "use_heterogeneous_vocab": False,
    }
    return SimpleNamespace(
        speculative_config=SimpleNamespace(**{**speculative, **changes}),
        parallel_config=SimpleNamespace(worker_cls=changes.get("worker_cls", "bpkit_vllm.FeatureWorker")),
        use_v2_model_runner=changes.get("use_v2_model_runner", False),
        lora_config=changes.get("lora_config"),
    )


@pytest.mark.parametrize(
    ("config", "policy", "says"),
    [
        (config_of(worker_cls="auto"), "confidence", "draft_probability: that is there with --no-async-scheduling"),
        (config_of(use_v2_model_runner=True), "ldlp", "--worker-cls bpkit_vllm.FeatureWorker and VLLM_USE_V2_MODEL"),
        (config_of("ngram"), "svip", "draft_entropy: n-gram drafts have no distribution"),
        (config_of(draft_sample_method="probabilistic"), "svip", "would bias the text; draft_sample_method='greedy'"),
        (config_of(draft_sample_method="probabilistic"), "confidence", "would bias the text"),
        (config_of("draft_model", use_heterogeneous_vocab=True), "svip", "under use_heterogeneous_vocab"),
        (config_of(use_local_argmax_reduction=True), "specdecpp", "under use_local_argmax_reduction"),
        (config_of("draft_model"), "forecast", "target_features: only DFlash drafters read layers of the target"),
        (config_of(lora_config=object()), Noting(), None),
        (
            config_of(),
            "blockpilot:input=logits",
            "prefill_logits: no mode of vLLM gives that; bpkit's own decoder does",
        ),
    ],
)
def test_what_a_mode_does_not_give_is_refused_with_one_that_does(config: Any, policy: Any, says: str | None) -> None:
    made, provided = resolve_policy(policy), provided_features(config, is_async=False)
    if says is None:
        assert made.wants_optional - provided > OF_THE_ANCHOR
        check_policy(made, "noting", provided, config)
        return
    with pytest.raises(EngineError, match=re.escape(says)):
        check_policy(made, str(policy), provided, config)
    assert not provided_features(config, is_async=True)

"""What the adapter relies on in vLLM, hook by hook. After an update of vLLM, what fails here says what moved."""

from __future__ import annotations

import dataclasses
import inspect
from importlib import import_module
from typing import Any

import pytest
from bpkit_vllm.versions import installed_version, is_tested
from vllm import SamplingParams
from vllm.v1.request import Request, RequestStatus

SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
PROPOSER = "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer"
METHODS = {
    f"{SCHEDULER}.schedule": "self throttle_prefills",
    f"{SCHEDULER}._update_after_schedule": "self scheduler_output",
    f"{SCHEDULER}.update_from_output": "self scheduler_output model_runner_output",
    f"{SCHEDULER}.update_draft_token_ids": "self draft_token_ids",
    f"{SCHEDULER}.add_request": "self request",
    f"{SCHEDULER}._free_request": "self request delay_free_blocks",
    f"{SCHEDULER}._preempt_request": "self request timestamp drop_stale_output",
    f"{SCHEDULER}.shutdown": "self",
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_after_schedule": "self scheduler_output",
    "vllm.v1.worker.cpu_worker:CPUWorker.load_model": "self load_dummy_weights",
    "vllm.v1.worker.cpu_worker:CPUWorker.take_draft_token_ids": "self",
    "vllm.v1.worker.gpu_worker:Worker.load_model": "self load_dummy_weights",
    "vllm.v1.worker.gpu_worker:Worker.take_draft_token_ids": "self",
    "vllm.v1.worker.gpu_worker:Worker.sample_tokens": "self grammar_output",
    f"{PROPOSER}._sample_draft_tokens": "self hidden_states sampling_metadata",
    f"{PROPOSER}._greedy_sample": "self hidden_states",
    "vllm.model_executor.models.qwen3_dflash:DFlashQwen3Model._normalize_context_k": "self all_k",
}
"""Methods that are overridden or wrapped, with the parameters that they have."""
FIELDS = {
    "vllm.v1.core.sched.output:SchedulerOutput": "num_spec_tokens_to_schedule scheduled_spec_decode_tokens "
    "num_scheduled_tokens total_num_scheduled_tokens",
    "vllm.v1.outputs:DraftTokenIds": "req_ids draft_token_ids",
    "vllm.v1.outputs:ModelRunnerOutput": "req_ids req_id_to_index sampled_token_ids",
    "vllm.config:SchedulerConfig": "async_scheduling scheduler_cls max_num_seqs",
    "vllm.config:SpeculativeConfig": "method model num_speculative_tokens draft_sample_method draft_model_config "
    "enable_adaptive_verification num_speculative_tokens_per_batch_size use_local_argmax_reduction "
    "use_heterogeneous_vocab",
    "vllm.v1.spec_decode.metadata:SpecDecodeMetadata": "num_draft_tokens logits_indices",
    "vllm.config:ParallelConfig": "data_parallel_size pipeline_parallel_size worker_cls",
    "vllm.config:VllmConfig": "additional_config model_config scheduler_config speculative_config parallel_config "
    "device_config lora_config",
}
"""Of records and configurations, what is read or set."""
OF_A_REQUEST = (
    "request_id status sampling_params spec_token_ids max_tokens num_output_tokens num_tokens num_prompt_tokens "
    "num_computed_tokens num_output_placeholders is_prefill_chunk output_token_ids"
)
CALLS = [
    (f"{SCHEDULER}.schedule", "self._update_after_schedule(scheduler_output)"),
    (f"{SCHEDULER}.schedule", "request.spec_token_ids"),
    (f"{SCHEDULER}.finish_requests", "self._free_request("),
    (f"{SCHEDULER}.update_from_output", "self._free_request("),
    ("vllm.v1.engine.core:EngineCore.post_step", "self.scheduler.update_draft_token_ids("),
    ("vllm.v1.engine.core:EngineCore.shutdown", "self.scheduler.shutdown()"),
    (f"{RUNNER}.propose_draft_token_ids", "scheduler_output.num_spec_tokens_to_schedule"),
    (f"{PROPOSER}.propose", "self._sample_draft_tokens("),
    (f"{PROPOSER}._greedy_sample", "self.model.compute_logits(hidden_states).argmax(dim=-1)"),
    ("vllm.v1.worker.gpu_worker:Worker.sample_tokens", "self.model_runner.sample_tokens("),
    (f"{RUNNER}.sample_tokens", ") = self.execute_model_state"),
    (f"{RUNNER}.execute_model", "sample_hidden_states = hidden_states[logits_indices]"),
]
"""Methods, and what has to be in them so that a hook is reached."""


def found(path: str) -> Any:
    """What lies at `module:name.name`. Fails the test with that path if it is not there."""
    module, _, names = path.partition(":")
    try:
        value: Any = import_module(module)
        for name in names.split("."):
            value = inspect.getattr_static(value, name)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"hook {path} moved in vLLM {installed_version()}: {error}")
    return value


def test_this_version_is_among_those_that_the_adapter_names() -> None:
    assert is_tested(installed_version())


@pytest.mark.parametrize(("path", "parameters"), METHODS.items(), ids=METHODS)
def test_methods_have_the_parameters_that_overrides_pass_on(path: str, parameters: str) -> None:
    signature = list(inspect.signature(found(path)).parameters)
    assert signature == parameters.split(), f"hook {path} has other parameters in vLLM {installed_version()}"


@pytest.mark.parametrize(("path", "names"), FIELDS.items(), ids=FIELDS)
def test_records_have_the_fields_that_are_read(path: str, names: str) -> None:
    gone = set(names.split()) - {field.name for field in dataclasses.fields(found(path))}
    assert not gone, f"{path} of vLLM {installed_version()} has no {', '.join(sorted(gone))}"


def test_a_pass_leaves_what_features_are_read_from() -> None:
    fields = found("vllm.v1.worker.gpu_model_runner:ExecuteModelState")._fields
    names = "sample_hidden_states aux_hidden_states spec_decode_metadata spec_decode_common_attn_metadata"
    assert set(names.split()) <= set(fields)


def test_a_request_has_the_attributes_that_are_read() -> None:
    request = Request("name", [1, 2], SamplingParams(max_tokens=3, extra_args={"bpkit_policy": "fixed:4"}), None)
    gone = [name for name in OF_A_REQUEST.split() if not hasattr(request, name)]
    assert not gone, f"Request of vLLM {installed_version()} has no {', '.join(gone)}"
    assert request.sampling_params is not None
    assert request.sampling_params.extra_args == {"bpkit_policy": "fixed:4"}
    assert {"RUNNING", "FINISHED_ABORTED", "FINISHED_ERROR"} <= set(RequestStatus.__members__)


@pytest.mark.parametrize(("path", "call"), CALLS, ids=[f"{path}: {call}" for path, call in CALLS])
def test_hooks_are_reached(path: str, call: str) -> None:
    assert call in inspect.getsource(found(path)), f"{path} of vLLM {installed_version()} no longer has {call}"

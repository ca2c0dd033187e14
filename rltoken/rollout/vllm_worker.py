"""What a vLLM worker can tell of itself: `--worker-extension-cls rltoken.rollout.vllm_worker.Fingerprinted`.

Imported by vLLM in its worker processes; the trainer asks by `/collective_rpc`, or in its own process.
"""

from __future__ import annotations

from typing import Any

from rltoken.rollout import fingerprint

METHOD = "served_weights"
"""The name to ask a worker by."""


class Fingerprinted:
    """Extends vLLM's worker."""

    model_runner: Any

    def served_weights(self) -> dict[str, Any]:
        """The dtype of the served weights, and their fingerprint: None where they cannot be compared.

        Workers that share a model hold a part of it each, and some parts all of them, so that no sum is the model's.
        """
        parameters = list(self.model_runner.get_model().named_parameters())
        parallel = self.model_runner.vllm_config.parallel_config
        whole = parallel.tensor_parallel_size == parallel.pipeline_parallel_size == 1
        return {
            "dtype": str(parameters[0][1].dtype).removeprefix("torch."),
            "fingerprint": fingerprint.of_model(parameters) if whole else None,
        }

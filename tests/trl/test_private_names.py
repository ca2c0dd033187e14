"""The private names of TRL and transformers that the modules `rltoken.trl_*` touch, as they were then.

When TRL changes, these tests say what exactly did; read the new code, mend those modules, then mend the snapshot.
"""

import ast
import hashlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest
from transformers import Trainer
from trl import GRPOTrainer, SFTTrainer
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import add_fused_lm_head

from rltoken.trl_compat import LOGIT_CHANGES

ROOT = Path(__file__).resolve().parents[2]

SIGNATURES = {
    "_generate_and_score_completions": "(self, inputs)",
    "_generate": "(self, prompts)",
    "_generate_single_turn": "(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images)",
    "_tokenize_prompts": "(self, prompts)",
    "_calculate_rewards": "(self, inputs, prompts, completions, completion_ids_list)",
    "_compute_loss": "(self, model, inputs)",
    "_get_per_token_logps_and_entropies": "(self, model, input_ids, attention_mask, logits_to_keep, batch_size, "
    "compute_entropy, compute_aux_loss, pixel_values, image_grid_thw, num_images, pixel_attention_mask, "
    "spatial_shapes, num_tiles, image_sizes, token_type_ids, mm_token_type_ids, image_position_ids)",
    "_prepare_inputs": "(self, generation_batch)",
    "_save": "(self, output_dir, state_dict)",
    "_save_checkpoint": "(self, model, trial)",
    "_get_output_dir": "(self, trial)",
    "_push_from_checkpoint": "(self, checkpoint_folder)",
    "_issue_warnings_after_load": "(self, load_result)",
    "_load_optimizer_and_scheduler": "(self, checkpoint)",
    "_get_train_sampler": "(self, dataset)",
    "_run_epoch": "(self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
    "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch)",
    "compute_loss": "(self, model, inputs, return_outputs, num_items_in_batch)",
    "_get_grad_norm": "(self, model, grad_norm)",
}
GENERATE_RETURNS = (
    "prompt_ids",
    "completion_ids",
    "tool_mask",
    "completions",
    "logprobs",
    "extra_fields",
    "images",
    "tool_images",
)
WINDOW_KEYS = {
    "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch",
    "old_per_token_logps", "importance_sampling_ratio", "sampling_per_token_logps", "ref_per_token_logps",
    "pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes", "token_type_ids",
    "mm_token_type_ids", "image_position_ids", "num_images", "num_tiles", "tool_mask",
}  # fmt: skip
ATTRIBUTES = {
    "_metrics", "_pending_extra_logs", "_step", "_buffered_inputs", "reward_func_names", "reward_weights",
    "epsilon_low", "epsilon_high", "generation_config", "eos_token_ids", "max_completion_length", "loss_type",
    "num_iterations", "use_vllm", "vllm_importance_sampling_correction", "aux_loss_enabled", "temperature",
    "importance_sampling_level", "top_entropy_quantile", "entropy_coef", "use_adaptive_entropy", "_last_loaded_step",
    "vllm_generation",
}  # fmt: skip
BODIES = {
    "_generate_and_score_completions": "739def7da67c5a5b",
    "_compute_loss": "6b861df63f5aaa7a",
    "_prepare_inputs": "b6f38f7a05aa4406",
    "_get_per_token_logps_and_entropies": "3a8a45615a711951",
    "_generate": "c43183674d09daf2",
    "_calculate_rewards": "a30f2929443bd289",
    "_generate_single_turn": "7e2f21bdaf91a7fb",
}
"""Hashes of the bodies whose inner workings the seams rely on, without comments and layout."""


VLLM_BODIES = {
    "VLLMGeneration._init_vllm": "a2daeb6b0d287c62",
    "VLLMGeneration._iter_named_params": "76dd868b0814e1fc",
    "VLLMGeneration.sync_weights": "71549bf6480a2ed5",
    "VLLMGeneration.generate": "f902129a8b88cd3e",
    "VLLMClient.__init__": "348d6c3979bd0020",
    "VLLMClient.init_communicator": "ce4dcf35ec5f4e77",
    "VLLMClient.generate": "bf05d21fc5452807",
    "VLLMClient.update_named_params": "aa56c32bc52216bb",
    "VLLMClient.reset_prefix_cache": "4b98911caeb85e6a",
}
"""The same for what `trl_vllm` and `trl_vllm_client` rely on."""


def parameters(function):
    return f"({', '.join(inspect.signature(function).parameters)})"


def body_hash(function):
    """A hash of what the code does, blind to comments and layout."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    assert parameters(getattr(GRPOTrainer, name)) == SIGNATURES[name], f"TRL changed the parameters of {name}"


@pytest.mark.parametrize("name", BODIES)
def test_bodies(name):
    assert body_hash(getattr(GRPOTrainer, name)) == BODIES[name], (
        f"TRL changed the body of GRPOTrainer.{name}: read what changed, see that rltoken/trl_compat.py still fits and "
        "that tests/trl passes, then put the new hash here"
    )


@pytest.mark.parametrize("name", VLLM_BODIES)
def test_bodies_of_the_vllm_path(name):
    cls, _, method = name.partition(".")
    found = getattr({"VLLMGeneration": VLLMGeneration, "VLLMClient": VLLMClient}[cls], method)
    assert body_hash(found) == VLLM_BODIES[name], (
        f"TRL changed the body of {name}: read what changed, see that rltoken/trl_vllm.py and trl_vllm_client.py still "
        "fit and that scripts/test_vllm.sh passes, then put the new hash here"
    )


def test_what_generate_returns():
    source = inspect.getsource(GRPOTrainer._generate)
    returned = re.findall(r"return (prompt_ids.*)", source)[-1]
    assert tuple(name.strip() for name in returned.split(",")) == GENERATE_RETURNS


def test_the_keys_of_a_window():
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    found = set(re.findall(r'output\["(\w+)"\]', source))
    found |= set(re.findall(r'^            "(\w+)": ', source[source.index("output = {") :], re.MULTILINE))
    assert found == WINDOW_KEYS, f"new: {found - WINDOW_KEYS}, gone: {WINDOW_KEYS - found}"


def test_what_saving_relies_on():
    source = inspect.getsource(Trainer._save_checkpoint)
    assert source.count("self._get_output_dir(trial=trial)") == 1, "the scratch folder is slipped in there"
    assert source.count("self.state.best_global_step") == 2, "no other use, so that hiding it skips its barrier only"
    assert "self._push_from_checkpoint(output_dir)" in source
    assert "save_total_limit=self.args.save_total_limit" in source, "no limit, nothing removed"


def test_what_skipping_a_step_relies_on():
    source = inspect.getsource(Trainer._run_epoch)
    norm, step = source.index("self._get_grad_norm(model"), source.index("self.optimizer.step()")
    assert source.count("self._get_grad_norm(") == source.count("self.optimizer.step()") == 1 and norm < step
    assert "if do_sync_step:" in source[:norm], "once for each optimizer step"


def test_what_makes_a_head_no_plain_linear_map():
    source = inspect.getsource(add_fused_lm_head)
    found = set(re.findall(r'getattr\(text_config, "(\w+)"', source)) - {"output_router_logits", "router_aux_loss_coef"}
    assert found == set(LOGIT_CHANGES), "TRL's fused head reads other settings: see SeamTrainer.has_plain_head"


def test_what_an_evaluation_by_the_engine_relies_on():
    source = inspect.getsource(GRPOTrainer._generate_single_turn)
    assert source.count("if self.state.global_step != self._last_loaded_step") == 1, "weights are handed over by that"
    source = inspect.getsource(VLLMGeneration)
    assert 'if self.mode == "colocate" and self.enable_sleep_mode and self._llm_weights_sleeping' in source
    assert "self.llm.sleep(level=2)\n                self._llm_weights_sleeping = True" in source
    assert "self.llm.reset_prefix_cache()" in inspect.getsource(VLLMGeneration.sync_weights)


@pytest.mark.parametrize("name", sorted(ATTRIBUTES))
def test_attributes_are_still_set(name):
    source = inspect.getsource(GRPOTrainer.__init__)
    assert re.search(rf"self\.{name}\b.*=", source), f"GRPOTrainer.__init__ sets no {name} any more"


def test_only_trl_compat_touches_private_names():
    private = {name for cls in (GRPOTrainer, Trainer) for name in vars(cls) if name.startswith("_") and name[1] != "_"}
    private |= {name for cls in (VLLMGeneration, VLLMClient) for name in vars(cls) if name[0] == "_" != name[1]}
    private |= {name for name in ATTRIBUTES if name.startswith("_")}
    own = {"_check"}
    offenders = []
    for path in [*ROOT.glob("rltoken/**/*.py"), *ROOT.glob("rewards/**/*.py"), *ROOT.glob("scripts/*.py")]:
        if path.name.startswith("trl_"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "name", "")
            if name in private - own and isinstance(node, ast.Attribute | ast.FunctionDef):
                offenders.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trl."):
                offenders.append(f"{path.relative_to(ROOT)}:{node.lineno} from {node.module}")
    assert not offenders, offenders


def test_the_subclass_hides_no_new_name():
    """A name of ours that TRL also has would silently replace TRL's: only the seams may."""
    from rltoken.trainer import TokenGRPOTrainer
    from rltoken.trl_compat import SeamTrainer
    from rltoken.trl_saving import SavingTrainer, WholeCheckpoints
    from rltoken.trl_steps import FiniteSteps
    from rltoken.trl_vllm import VLLMTrainer

    ours = {
        name
        for cls in (FiniteSteps, WholeCheckpoints, SavingTrainer, VLLMTrainer, SeamTrainer, TokenGRPOTrainer)
        for name in vars(cls)
        if not name.startswith("__")
    }
    theirs = {name for cls in GRPOTrainer.__mro__ for name in vars(cls)}
    seams = {
        "_generate_and_score_completions", "_generate", "_generate_single_turn", "_calculate_rewards", "_compute_loss",
        "_get_per_token_logps_and_entropies", "_save_checkpoint", "_load_optimizer_and_scheduler", "_get_train_sampler",
        "_get_output_dir", "_push_from_checkpoint", "_issue_warnings_after_load", "_run_epoch", "_save", "compute_loss",
        "evaluate", "create_model_card", "_get_grad_norm", "log",
    }  # fmt: skip
    assert ours & theirs == seams


SUPERVISED_SEAMS = {
    "_save_checkpoint", "_load_optimizer_and_scheduler", "_get_output_dir", "_push_from_checkpoint",
    "_issue_warnings_after_load", "_run_epoch", "create_model_card", "compute_loss", "_get_grad_norm",
}  # fmt: skip


def test_the_supervised_trainer_hides_no_new_name():
    from rltoken.trl_saving import SupervisedTrainer, WholeCheckpoints
    from rltoken.trl_steps import FiniteSteps

    ours = {
        name
        for cls in (FiniteSteps, WholeCheckpoints, SupervisedTrainer)
        for name in vars(cls)
        if not name.startswith("__")
    }
    assert ours & {name for cls in SFTTrainer.__mro__ for name in vars(cls)} == SUPERVISED_SEAMS
    for name in SUPERVISED_SEAMS & SIGNATURES.keys():
        assert parameters(getattr(SFTTrainer, name)) == SIGNATURES[name], f"TRL changed the parameters of {name}"


@pytest.mark.parametrize("name", ["_metrics", "_total_train_tokens"])
def test_attributes_of_the_supervised_trainer_are_still_set(name):
    source = inspect.getsource(SFTTrainer.__init__)
    assert re.search(rf"self\.{name}\b.*=", source), f"SFTTrainer.__init__ sets no {name} any more"

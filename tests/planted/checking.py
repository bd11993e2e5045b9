"""Mistakes in what is compared and what is used again. Signatures are those of what they replace."""

from __future__ import annotations

import json

import test_code
import test_identity
import test_integrity
import test_plan
import test_tables
import torch

from flowdistill.models import code, foreign, probe
from flowdistill.runner import due, identity, plan, references
from flowdistill.training import checkpoint, weights

from .bug import bug

own_code, fingerprint = foreign._code, plan.fingerprint


@bug(
    test_tables,
    "baseline_key",
    test_tables.test_runs_are_compared_with_a_base_run_that_differs_in_nothing_but_what_may,
    {"key": "inputs.student.size"},
)
def what_must_agree_listed_by_hand(run):
    """The first baseline key: a list of what must agree, which forgot the images that the student sees."""
    data = [run.config["data"].get(key) for key in ("crop", "pad", "flip", "randaugment")]
    return json.dumps([run.student, run.student_fingerprint, run.data_hash, data, run.config["train"], run.split])


@bug(plan, "fingerprint", test_plan.test_every_key_changes_the_fingerprint_or_says_why_not, {"key": "train.weight_decay"})
def a_key_left_out_of_the_fingerprint(job, made_of):
    """A recipe's key that no hash has: the run of another value is given back."""
    train = job.config.train.model_copy(update={"weight_decay": 0.0})
    return fingerprint(plan.replace(job, config=job.config.model_copy(update={"train": train})), made_of)


@bug(plan, "_of_student", test_plan.test_what_a_base_run_does_not_use_is_dropped, {"key": "inputs.teacher.size"})
def a_base_run_keeps_its_teachers_images(table):
    """What the command says of the teacher makes its base runs a variant, and nobody's base."""
    return table


@bug(foreign, "_code", test_identity.test_another_network_under_the_same_name_is_another_run, {"how": "neighbour"})
def the_named_file_alone_is_code(name):
    """A file that nets.py imports may change as it likes."""
    found = own_code(name)
    return dict(list(found.items())[:1])


@bug(code, "_cell", test_code.test_what_computes_otherwise_has_other_contents)
def what_a_function_closes_over_is_nothing(cell):
    """Equal source is taken for an equal network."""
    return "cell"


@bug(identity, "difference", test_identity.test_another_version_of_a_library_is_another_run, {"role": "student"})
def answers_are_stored_and_not_compared(then, now):
    """Nobody reads them."""
    return ""


@bug(
    probe,
    "_apart",
    test_code.test_another_computation_answers_otherwise,
    {"text": test_code.PLAIN.replace("torch.relu(", "torch.tanh("), "what": "logits in eval mode"},
)
def norms_alone_are_compared(one, other):
    """A tolerance for everything."""
    return 0.0


@bug(references, "meet_changes", test_identity.test_a_trained_network_of_ours_that_answers_otherwise_is_refused)
def old_weights_in_new_code(origin, model, sizes, weights, told, changes):
    """A state dict that fits is taken for the network that was trained."""
    return ""


@bug(references, "meet_damage", test_integrity.test_a_resumed_run_is_not_taught_by_a_spoilt_teacher)
def a_hash_that_nobody_reads(run, ledger):
    """The ledger knows what the file was."""
    return ""


@bug(weights, "is_whole", test_integrity.test_a_seal_can_not_be_taken_away_by_one_change)
def a_seal_that_may_be_missing(tensors, metadata):
    """A file without a hash passes, so one flipped bit of the hash's name opens it."""
    return weights.SEAL not in metadata or metadata[weights.SEAL] == json.dumps(weights.seal(tensors, metadata))


@bug(checkpoint, "is_whole", test_integrity.test_no_flipped_bit_of_a_checkpoint_is_silent)
def tensors_alone_are_hashed(tensors, metadata):
    """How many epochs are done stands in the metadata."""
    try:
        torch.stack([value.float().sum() for value in tensors.values()]).sum()
    except RuntimeError:
        return False
    return True


@bug(
    due,
    "missing",
    test_integrity.test_a_finished_run_whose_files_are_gone_is_trained_anew,
    {"gone": "student.safetensors"},
)
def a_run_without_files_is_had_already(run, ledger):
    """The row says finished."""
    return ""

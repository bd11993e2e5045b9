"""Mistakes in what keeps a run: checkpoint, resume, lock, ledger. Signatures are those of what they replace."""

from __future__ import annotations

import test_ledger
import test_merge
import test_resume as suite
import test_shards
import test_weights
import torch

from flowdistill.config import validate
from flowdistill.data.batches import SeedBatches
from flowdistill.device import computing
from flowdistill.ledger import Ledger, merge
from flowdistill.runner import execute, partition, references
from flowdistill.training import checkpoint, weights
from flowdistill.training.student import Student

from .bug import bug

STRAIGHT = suite.test_resumed_is_straight_bit_for_bit
load, state, restore, save = Student.load, Student.state, checkpoint.restore, execute._save
epoch_of_stream, save_weights = SeedBatches.epoch, weights.save_weights


@bug(Student, "state", STRAIGHT, {"kind": "base"})
def momentum_not_saved(self):
    """model.state_dict() alone: the optimiser starts cold, and the figures differ a little."""
    tensors, counters = state(self)
    return {name: value for name, value in tensors.items() if not name.startswith("optimizer.")}, counters


@bug(Student, "load", suite.test_channels_last_and_the_fused_optimiser)
def momentum_in_another_memory_layout(self, tensors, counters, *, phase):
    """optimizer.load_state_dict from contiguous tensors: fused SGD adds it to channels_last weights wrongly, without a word."""
    load(self, tensors, counters, phase=phase)
    for slot in self.optimizer.state.values():
        slot["momentum_buffer"] = slot["momentum_buffer"].contiguous()


@bug(Student, "state", STRAIGHT, {"kind": "an adapter and a memory"})
def momentum_of_the_network_alone(self):
    """The adapters' share of the optimiser is forgotten."""
    tensors, counters = state(self)
    owned = len(list(self.net.parameters()))
    return {n: v for n, v in tensors.items() if not n.startswith("optimizer.") or int(n.split(".")[-1]) < owned}, counters


@bug(Student, "load", STRAIGHT, {"kind": "an adapter and a memory"})
def memory_of_a_method_not_restored(self, tensors, counters, *, phase):
    """Buffers of the method (banks, running means) start empty."""
    fresh = {f"method.{name}": value.clone() for name, value in self.method.named_buffers()}
    load(self, {**tensors, **fresh}, counters, phase=phase)


@bug(Student, "load", STRAIGHT, {"kind": "an adapter and a memory"})
def adapters_not_restored(self, tensors, counters, *, phase):
    """Adapters are thrown away at the end, so they were left out of the checkpoint."""
    fresh = {f"method.{name}": value.clone() for name, value in self.method.named_parameters()}
    load(self, {**tensors, **fresh}, counters, phase=phase)


@bug(Student, "load", STRAIGHT, {"kind": "at the end of stage one"})
def momentum_carried_into_the_next_stage(self, tensors, counters, *, phase):
    """Resumed between two stages with the optimiser of the first: where no kill falls nothing is noticed."""
    self.begin_phase(0 if phase is None else phase)
    load(self, tensors, counters, phase=0 if phase is None else phase)
    self.begin_phase = lambda number: None if phase is None else Student.begin_phase(self, number)


@bug(Student, "load", suite.test_the_best_epoch_of_a_holdout_run_survives)
def chosen_weights_forgotten(self, tensors, counters, *, phase):
    """The best epoch so far is not in the checkpoint: after a resume the best of the rest ships."""
    load(self, tensors, {"chosen_epoch": 0, "chosen_correct": -1}, phase=phase)


@bug(checkpoint, "restore", suite.test_resumed_is_straight_bit_for_bit, {"kind": "base"})
def epochs_counted_from_nought_again(cohort, keys, saved):
    """Weights are loaded, the epoch is not: order and augmentation of the first epochs come twice."""
    restore(cohort, keys, saved)
    cohort.done = 0


@bug(SeedBatches, "epoch", STRAIGHT, {"kind": "base"})
def order_drawn_from_the_global_generator(self, epoch):
    """A generator's state that no checkpoint holds."""
    return epoch_of_stream(self, int(torch.randint(1000, ())))


@bug(checkpoint, "hash_weights", suite.test_a_damaged_checkpoint_is_told_and_the_one_before_is_used, {"damage": "one bit flipped"})
def checkpoint_hash_of_names_alone(tensors):
    """The file parses and has the right names, so it is believed."""
    return " ".join(sorted(tensors))


@bug(checkpoint, "save_weights", suite.test_a_damaged_checkpoint_is_told_and_the_one_before_is_used, {"damage": "truncated"})
def one_checkpoint_alone(path, tensors, about, keep=None, *, make_folder=True):
    """The one before is overwritten: a file that was cut short costs the whole run."""
    save_weights(path, tensors, about)


@bug(weights, "write_whole", test_weights.test_a_failing_write_leaves_the_old_file, {"call": "fsync"})
def written_in_place(path, content, keep=None, *, make_folder=True):
    """open(path, "wb"): a full disk leaves half a file where a whole one was."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        weights.os.fsync(file.fileno())


@bug(execute, "_save", suite.test_a_full_disk_ends_no_run)
def full_disk_passed_over(cohort, members, folder, watcher):
    """except OSError: pass: nobody hears that there has been no checkpoint for days."""
    with execute.contextlib.suppress(OSError):
        save(cohort, members, folder, execute.Watcher())


@bug(references, "recorded_teacher", suite.test_it_keeps_the_teacher_it_began_with)
def teacher_chosen_anew(reference, run, ledger):
    """Resolved by name as for a new run: others have been trained since."""
    query = references.TeacherQuery(validate(run.config).data, run.data_hash, run.split, run.seed, run.init_hash, run.config["train"], "")
    return references.choose_teacher(reference, query, ledger)


@bug(Ledger, "reopen", test_ledger.test_reopening_forgets_what_comes_after_the_checkpoint)
def later_epochs_kept(self, numbers, epochs):
    """The ledger is believed, not the checkpoint: an epoch is on record twice."""
    for no in numbers:
        self._db.execute("UPDATE runs SET status = 'running', error = '', finished = NULL, resumed = resumed + 1 WHERE no = ?", (no,))


@bug(Ledger, "_alive", test_ledger.test_a_running_run_without_its_lock_is_dead_and_its_cohort_with_it)
def status_believed(self, home):
    """`running` as it stands on record, though its process was killed days ago."""
    return True


@bug(execute, "computing", suite.test_threads_and_determinism_are_those_it_began_with)
def threads_of_this_machine(device, *, deterministic=False, cores=None):
    """As many threads as there are cores today: sums are rounded in another order."""
    return computing(device, deterministic=deterministic)


TWO_RESULTS = test_merge.test_a_run_with_two_results_is_refused_and_nothing_is_copied
ONE_SHARD = test_shards.test_every_run_is_in_one_shard_and_what_shares_a_seed_stays_together


@bug(
    merge,
    "_refuse_contradiction",
    TWO_RESULTS,
    {"changes": {"correct": 9199}, "told": "correct 9199 and 9200", "started": "2022-01-01T00:00:00"},
)
def the_second_result_added_beside_the_first(entries, before):
    """Two ledgers that contradict each other become one in which the newer run wins, without a word."""


@bug(
    merge._Entry,
    "result",
    TWO_RESULTS,
    {"changes": {"weights_hash": "f" * 64}, "told": r"weights ffffffff and \w{8}", "started": "2021-09-01T08:10:43"},
)
def equal_by_accuracy(self):
    """Two students that get the same number of images right are taken for one."""
    return [self.run.status, self.run.correct]


@bug(partition, "by_seed", ONE_SHARD, {"count": 3})
def shards_of_single_runs(cohort):
    """Students of one seed go to several shards: batches and teacher are computed again in each, and peers are torn apart."""
    return [[job] for job in cohort]

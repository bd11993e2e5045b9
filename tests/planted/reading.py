"""Mistakes in what is counted, read and tabulated."""

from __future__ import annotations

import math
import statistics

import test_evaluate
import test_plots
import test_stats
import test_tables as suite
import torch
from scipy.special import stdtrit

from flowdistill import stats
from flowdistill.data.interfaces import BATCH
from flowdistill.report import plots, tables
from flowdistill.report.tables import Group, Reading
from flowdistill.training import evaluate as evaluation
from flowdistill.training.evaluate import Evaluation, evaluate

from .bug import bug

# Evaluation


@torch.no_grad()
def most_probable(net, images):
    """The most probable class and its probability of each image of a batch."""
    return net(images).logits.float().softmax(1).max(1)


@bug(evaluation, "evaluate", test_evaluate.test_every_image_is_counted_and_correct_equals_a_naive_loop, {"n": BATCH + 1})
def last_partial_batch_dropped(net, on, precision):
    """drop_last in the test loader: 9,984 of 10,000 images: the reference log."""
    whole = len(on.images) // BATCH * BATCH
    labelled = type(on)(on.images[:whole], on.labels[:whole], on.normalise)
    return evaluate(net, labelled, precision)


@bug(evaluation, "evaluate", test_evaluate.test_every_image_is_counted_and_correct_equals_a_naive_loop, {"n": BATCH + 1})
def mean_of_the_batches_accuracies(net, on, precision):
    """An image of the last, smaller batch counts for more than another."""
    found = evaluate(net, on, precision)
    hits = (found.classes == on.labels).float()
    mean = torch.stack([batch.mean() for batch in hits.split(BATCH)]).mean()
    return found._replace(correct=(mean * len(hits)).round())


@bug(evaluation, "evaluate", test_evaluate.test_an_answer_that_is_no_number_is_never_right)
def no_number_counted_as_the_first_class(net, on, precision):
    """argmax of NaN is 0, and so is a label in ten."""
    found = evaluate(net, on, precision)
    return found._replace(correct=(found.classes == on.labels).sum())


@bug(evaluation, "evaluate", test_evaluate.test_mode_is_put_back, {"training": True})
def evaluation_in_train_mode(net, on, precision):
    """No eval(): the batch's statistics in place of the network's."""
    tops = [most_probable(net, images) for images, _ in on.batches()]
    probabilities, classes = (torch.cat(parts) for parts in zip(*tops, strict=True))
    right = classes == on.labels
    return Evaluation(right.sum(), classes, probabilities, on.labels, right)


@bug(evaluation, "evaluate", test_evaluate.test_mode_is_put_back, {"training": True})
def student_left_in_eval_mode(net, on, precision):
    """eval() and no train() after it."""
    found = evaluate(net, on, precision)
    net.eval()
    return found


# Tables


def reading(run, best):
    correct, epoch = (run.best_correct, run.best_epoch) if best else (run.correct, run.epoch)
    return None if correct is None or epoch is None or not run.images else Reading(100 * correct / run.images, epoch)


@bug(tables, "read", suite.test_last_and_best_read_the_same_runs_otherwise)
def best_epoch_on_test_read_as_the_last(run, protocol):
    """The best of 200 looks at test, under the name of a final accuracy: the reference log."""
    covered = run.status == "finished" and (run.split == "holdout") == (protocol == "holdout")
    return reading(run, best=run.split == "full") if covered else None


@bug(tables, "read", suite.test_the_summary_reads_by_its_protocol, {"protocol": "best"})
def last_epoch_read_as_the_best(run, protocol):
    """The heading says best, the figures are those of the last epoch."""
    covered = run.status == "finished" and (run.split == "holdout") == (protocol == "holdout")
    return reading(run, best=False) if covered else None


@bug(tables, "read", suite.test_a_table_never_mixes_splits, {"protocol": "last"})
def mean_over_all_splits(run, protocol):
    """Runs on all of train and on nine tenths of it in one mean."""
    return reading(run, best=protocol == "best") if run.status == "finished" else None


@bug(tables, "read", suite.test_unfinished_runs_never_appear, {"status": "failed", "split": "full"})
def failed_runs_read(run, protocol):
    """The last figure of a run that diverged counts as its result."""
    return reading(run, best=protocol == "best") if (run.split == "holdout") == (protocol == "holdout") else None


@bug(tables, "newest", suite.test_of_repeats_only_the_newest)
def repeats_counted_twice(runs):
    """A seed that was run again is two of n."""
    return list(runs)


@bug(tables, "group", suite.test_seeds_are_one_group_and_recipes_are_not)
def recipes_in_one_mean(runs, protocol):
    """Grouped by method and networks, whatever the recipe."""
    found = {}
    for run in runs:
        found.setdefault((run.student, run.teacher, run.dataset, run.method), []).append(run)
    return [Group(tuple(members), tuple(tables.read(run, protocol) for run in members)) for members in found.values()]


@bug(tables, "baseline_key", suite.test_no_difference_to_a_base_of_something_else, {"other": {"lr": 0.05}})
def baseline_of_another_recipe(run):
    """The difference is to the first base run of that model and data."""
    return run.student, run.data_hash, run.split


# Statistics


@bug(stats, "sample_std", test_stats.test_sample_std_divides_by_n_less_one)
def std_divided_by_n(values):
    """numpy's default: a fifth too small for three runs."""
    return statistics.pstdev(values) if len(values) > 1 else None


def interval(values, reference, freedom):
    """Welch's, with ``freedom`` degrees."""
    value = statistics.fmean(values) - statistics.fmean(reference)
    error = math.sqrt(sum(statistics.variance(group) / len(group) for group in (values, reference)))
    reach = float(stdtrit(freedom, 0.975)) * error
    return stats.Difference(value, value - reach, value + reach, reach)


@bug(stats, "welch", test_stats.test_no_verdict_below_three, {"values": [1.0, 2.0], "reference": [1.0, 2.0, 3.0]})
def interval_for_two_runs(values, reference):
    """An interval and a verdict from two values."""
    if min(len(values), len(reference)) < 2:
        return None
    return interval(values, reference, min(len(values), len(reference)) - 1)


@bug(stats, "welch", test_stats.test_welch_is_scipys_interval, dict(zip(("values", "reference"), test_stats.GROUPS[0], strict=True)))
def degrees_of_equal_variances(values, reference):
    """n1 + n2 - 2 for two groups whose spreads differ: too narrow."""
    return interval(values, reference, len(values) + len(reference) - 2)


@bug(stats, "welch", test_stats.test_welch_is_scipys_interval, dict(zip(("values", "reference"), test_stats.GROUPS[0], strict=True)))
def normal_quantile_for_a_few_runs(values, reference):
    """1.96 standard errors whatever n."""
    return interval(values, reference, math.inf)


@bug(plots, "_images", test_plots.test_accuracy_on_held_out_images_is_not_called_test)
def curves_of_held_out_images_called_test(run):
    """What chose the epoch is shown as if nothing had been chosen by it."""
    return "test"


@bug(plots, "_row_names", test_plots.test_rows_of_one_method_and_pair_have_names_of_their_own)
def rows_by_method_and_pair(rows):
    """Recipes with the same name become one row of the picture, with the dots of both."""
    return [f"{row['method']} {row['pair']}" for row in rows]

"""Mistakes in what travels between the driver of a plan and its workers. Signatures are those of what they replace."""

from __future__ import annotations

import re

import test_remote

from flowdistill.runner.remote.storage import States

from .bug import bug

TWO_STATES = test_remote.test_an_attempt_keeps_two_states_and_leaves_those_of_others
save = States.save


@bug(States, "_newest_first", TWO_STATES)
def oldest_state_first(self):
    """A worker goes on from the oldest state that is kept, and trains again what another had trained."""
    return sorted(path for path in self.folder.iterdir() if re.fullmatch(r"\d{6}-\w+\.zip", path.name))


@bug(States, "save", TWO_STATES)
def states_of_others_removed(self, done, root, paths):
    """An attempt that is taken for dead and lives on removes the states of the one that took its place."""
    save(self, done, root, paths)
    for path in self.folder.iterdir():
        if path not in self._own:
            path.unlink()

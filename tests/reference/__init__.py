"""Every method from its formula, as slow loops over float64 numpy arrays, and what the suites are to know of it.

A file a method, with

- ``reference(student, teacher, options)``: term -> value. ``student.logits``, ``.embedding``, ``.maps[tap]`` are arrays;
  ``options`` holds the method's options that were given; of the batch ``labels``, ``indices``, ``epoch`` and ``peers`` (as ``student``);
  and the method's learned ``parameters`` and its ``buffers``.
- ``CASES``: the option sets that every check is run with.
- ``BF16``: how far the loss may move (relative) when its inputs are rounded to bfloat16; what was measured stands beside it.
- ``WRONG``: pairs that are refused: options, student, teacher, words of the refusal.
- ``PULLS``: what of the student it pulls at beside the taps that it needs: ``{"logits"}``, ``{"embedding"}``; ``pulls(options)`` where
  that depends on the options.
- ``DETACHED``, where the formula holds something constant: how many tensors the method detaches.
- ``pairs(options)``: the names of the pairs of ``pairs.py`` that it is tried on, where those are not the usual ones.
- ``GOLDEN``, where the formula sheet has it: key of ``golden.json`` -> the package's value, float64. ``OTHER_LOSSES``: keys of losses that
  the package does not have, and why.

A wrapper such as ``ls:`` has in the place of all but the last two ``WRAPPED``: name in full -> a namespace with the rest.
"""

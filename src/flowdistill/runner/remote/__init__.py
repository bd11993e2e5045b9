"""Cohorts on other machines: a driver plans and keeps the ledger, workers train, and what travels between them.

``driver.py`` hands a ``Kit`` (``kit.py``) for each cohort to a crew. ``worker.py`` trains it in a folder of its own, and keeps its state in
the ``storage.py``. ``mirror.py`` enters into the driver's ledger what the worker tells. ``ray_cluster.py`` joins a Ray cluster, and
``ray_crew.py`` is the crew that Ray makes of it; nothing else here knows Ray.
"""

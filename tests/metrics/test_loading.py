"""Metrics load by name and by path, without a network, in several processes at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest

from trl_custom_losses import LossConfigError, metrics

FOLDER = Path(metrics.__file__).parent

_WORKER = """
import sys
import evaluate
from trl_custom_losses import metrics
for name in metrics.names():
    metrics.load(name)
    evaluate.load(f"{sys.argv[1]}/{name}/{name}.py")
for _ in range(20):
    margins = [float(sys.argv[2])] * 3
    assert metrics.load("preference_accuracy").compute(margins=margins)["margin"] == margins[0]
"""


def test_every_folder_is_a_metric_that_says_what_it_does():
    folders = {path.parent.name for path in FOLDER.glob("*/*.py")}
    assert folders == set(metrics.names())
    for name in metrics.names():
        metric = metrics.load(name)
        assert isinstance(metric, evaluate.Metric) and metric.name == name
        assert metric.description and "Args:" in metric.inputs_description and "Returns:" in metric.inputs_description


def test_an_unknown_name_lists_the_nearest():
    with pytest.raises(LossConfigError, match=r"no metric named 'diversty'.*did you mean 'diversity'"):
        metrics.load("diversty")


def test_importing_the_package_of_metrics_does_not_import_evaluate():
    program = "import sys, trl_custom_losses.metrics; assert not {'evaluate', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_processes_load_and_compute_at_once_without_a_network(tmp_path):
    places = {"HF_HOME": str(tmp_path), "HF_EVALUATE_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(FOLDER), str(number)],
            env=os.environ | places,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0], errors


def test_inputs_stay_in_memory():
    """A file of inputs in the shared folder is what processes would have to wait for."""
    metric = metrics.load("preference_accuracy")
    metric.add(margins=1.0)
    assert metric.cache_file_name is None and metric.buf_writer is not None
    assert metric.compute()["pairs"] == 1

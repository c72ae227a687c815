"""Does post-training help? A few-shot evaluation that compares methods, and its parts.

    FewShotExperiment   a grid of methods, shots and draws: resumes, never repeats a cell, writes tables and a plot
    draw                k labelled texts of every class
    fine_tune           a classifier on a few labels, scored on texts it has not seen

Example:
    >>> FewShotExperiment("bert-base-uncased", "train.tsv", "out", test="test.tsv", shots=(8, 16)).run()
"""

from .draws import draw
from .experiment import FewShotExperiment
from .finetune import FewShotScore, fine_tune

__all__ = ["FewShotExperiment", "FewShotScore", "draw", "fine_tune"]

"""Retraining of derived networks and their assessment.

recipe.py    how a network is trained: settings, learning rate, which weights decay
ema.py       averaged weights, and batch norm statistics for weights that were not trained as they stand
retrain.py   the resumable training loop
assess.py    accuracy and loss on a split; the only reader of the test split
"""

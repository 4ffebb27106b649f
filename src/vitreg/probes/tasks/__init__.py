"""One file a probe: a function of features to train on, of others of the same model to judge by, and of its protocol.

All take a `device`, which trains and sums, and `on_progress`, which is called with what is done and the total.
"""

"""The loop that all recipes share: state, optimizer, processes, checkpoints, logs."""

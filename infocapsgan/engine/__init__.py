"""The training loop and all that it needs: settings, state, checkpoints, run directories, distribution."""

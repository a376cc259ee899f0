"""Train a PyTorch model with many workers, and know what it costs."""

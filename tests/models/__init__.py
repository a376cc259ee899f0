"""Claims about `manyhands.models`."""
